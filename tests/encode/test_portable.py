"""A store is all that another machine needs: moved, without its shards, or over http, the losses are the same bits."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.e2e.commands import ROOT
from tests.encode.make import add_shard, index_of
from tests.shared.places import place

STEPS = 3
SETTINGS = (
    "--preset",
    "demo",
    "--set",
    f"max_steps={STEPS} batch_size=2 sample_after=null sample_prompts=[] warmup_steps=0",
)


def python(executable: str, folder: Path, *arguments: object, **environment: str) -> str:
    """Run a module as somebody who stands in `folder`."""
    command = [executable, "-m", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


def fresh_environment(folder: Path) -> str:
    """Python of a new virtual environment elsewhere, which borrows the installed packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = f"{sysconfig.get_paths()['purelib']}\n{ROOT}\n"
    (folder / "lib" / version / "site-packages" / "borrowed.pth").write_text(borrowed)
    return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Encode and train; the store, and the losses. Everything else is deleted."""
    folder = tmp_path_factory.mktemp("here")
    work = folder / "work"
    index_of(work, [add_shard(work, "a.tar", range(4), size=(9, 64, 64))])
    python(sys.executable, ROOT, "encode", "--work", work, *SETTINGS)
    python(sys.executable, ROOT, "train", "--work", work, "--run", folder / "run", *SETTINGS)
    shutil.move(work / "latents.zarr", folder / "latents.zarr")
    shutil.rmtree(work)
    return folder / "latents.zarr", losses(folder / "run")


def trained_there(folder: Path, store: object) -> list[float]:
    """Train as somebody else, elsewhere, with another Python, from nothing but the store."""
    folder.mkdir()
    other = fresh_environment(folder / "venv")
    places = ("--work", folder / "work", "--store", store, "--run", folder / "run")
    python(other, folder, "train", *places, *SETTINGS, HOME=str(folder), XDG_CACHE_HOME=str(folder / "cache"))
    return losses(folder / "run")


def test_a_moved_store_trains_to_the_same_losses(tmp_path: Path, trained: tuple[Path, list[float]]) -> None:
    store, expected = trained
    moved = shutil.move(store, tmp_path / "moved.zarr")
    found = trained_there(tmp_path / "there", moved)
    shutil.move(moved, store)
    assert len(found) == STEPS
    assert found == expected


@pytest.mark.parametrize("kind", ["hf", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("plain", "gs"))])
def test_a_pushed_store_trains_from_its_url_to_the_same_losses(
    tmp_path: Path, trained: tuple[Path, list[float]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, expected = trained
    with place(kind, tmp_path / "pushed.zarr", monkeypatch) as url:
        to = tmp_path / "pushed.zarr" if kind == "plain" else url
        said = python(sys.executable, ROOT, "encode", "push", "--store", store, "--to", to)
        assert f"{to}: " in said
        assert trained_there(tmp_path / "there", url) == expected
