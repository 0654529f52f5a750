"""A store is all that another machine needs: moved, without its shards, or over http, the losses are the same bits."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.store_share import push
from tests.e2e.commands import ROOT
from tests.encode.make import add_shard, index_of
from tests.shared.servers import plain_server

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


@contextmanager
def served(store: Path) -> Iterator[str]:
    """The store on a web server."""
    push(store, str(store), lambda files, size: lambda count: None)
    with plain_server(store.parent) as url:
        yield f"{url}/{store.name}"


def test_a_moved_store_trains_to_the_same_losses(tmp_path: Path) -> None:
    work = tmp_path / "here" / "work"
    index_of(work, [add_shard(work, "a.tar", range(4), size=(9, 64, 64))])
    python(sys.executable, ROOT, "encode", "--work", work, *SETTINGS)
    python(sys.executable, ROOT, "train", "--work", work, "--run", tmp_path / "here/run", *SETTINGS)

    there = tmp_path / "there" / "someone"
    there.mkdir(parents=True)
    shutil.move(work / "latents.zarr", there / "shared.zarr")
    shutil.rmtree(work)
    other = fresh_environment(tmp_path / "there" / "venv")
    over_http = there / "over http"
    with served(there / "shared.zarr") as url:
        python(other, there, "train", "--work", there / "work", "--store", url, "--run", over_http, *SETTINGS,
               XDG_CACHE_HOME=str(there / "cache"))  # fmt: skip
    assert losses(over_http) == losses(tmp_path / "here/run")

    moved = ("--work", there / "work", "--store", there / "shared.zarr", "--run", there / "run")
    python(other, there, "train", *moved, *SETTINGS, HOME=str(there), XDG_CACHE_HOME=str(there / "cache"))
    assert len(losses(there / "run")) == STEPS
    assert losses(there / "run") == losses(tmp_path / "here/run")
