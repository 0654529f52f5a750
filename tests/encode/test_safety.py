"""Whatever happens to an encoder, the store stays readable and holds only whole rows, and the next run completes it."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import encode.worker
from encode.lock import writing
from encode.plan import Part
from encode.verify import check_files
from shared.errors import StoreError
from shared.shards import read_index
from shared.store import read_datasets, read_markers
from shared.store_read import StoreReader
from tests.e2e.commands import ROOT
from tests.encode.make import add_shard, index_of
from tests.encode.test_encode import run

assert encode.worker  # loaded here once, so that forked encoders start at once
FORK = multiprocessing.get_context("fork")


def contents(store: Path) -> dict[str, bytes]:
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def small_shards(work: Path) -> Path:
    """Six shards of two clips: many moments at which a unit is half done."""
    index_of(work, [add_shard(work, f"{number}.tar", (2 * number, 2 * number + 1)) for number in range(6)])
    return work


def start(work: Path, model: Path, part: str = "") -> multiprocessing.process.BaseProcess:
    process = FORK.Process(target=run, args=(work, model, "", part))
    process.start()
    return process


def kill_and_complete(work: Path, model: Path, rounds: int, seed: int) -> None:
    """Kill encoders at random moments of their work; the store is sound after each, and complete after one more run."""
    small_shards(work)
    began = time.monotonic()
    whole = contents(run(work, model))
    lasted = time.monotonic() - began
    (work / "latents.zarr").rename(work / "whole.zarr")
    draw = random.Random(seed)
    for number in range(rounds):
        if number % 4 == 0:
            shutil.rmtree(work / "latents.zarr", ignore_errors=True)
        process = start(work, model)
        time.sleep(draw.uniform(0, lasted))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        sound(work)
    run(work, model)
    assert contents(work / "latents.zarr") == whole


def sound(work: Path) -> None:
    """Every unit of the store is whole, and every row can be read."""
    store = work / "latents.zarr"
    if (store / "zarr.json").is_file():
        check_files(store, read_markers(store), lambda count: None)
        reader = StoreReader([store])
        assert all(reader.latent(key).size for key in reader.latents)
        assert all(len(reader.text(key).ids_S) for key in reader.texts)
        assert len(read_datasets(store)) <= 1


def test_killed_at_random_moments_it_completes_to_the_same_content(tmp_path: Path, model: Path) -> None:
    kill_and_complete(tmp_path / "work", model, rounds=3, seed=0)


@pytest.mark.soak
def test_killed_twenty_times_it_completes_to_the_same_content(tmp_path: Path, model: Path) -> None:
    kill_and_complete(tmp_path / "work", model, rounds=20, seed=1)


def test_leftovers_of_a_crash_are_swept(work: Path, model: Path) -> None:
    store = run(work, model)
    before = contents(store)
    (store / "latents/0123.part/c/0").mkdir(parents=True)
    (store / "latents/0123.part/c/0/0").write_bytes(b"half a unit")
    (store / "units/0123.json.77.part").write_bytes(b"{")
    run(work, model)
    assert contents(store) == before


def test_a_unit_left_without_its_marker_is_taken_up(work: Path, model: Path) -> None:
    store = run(work, model)
    before = contents(store)
    for path in (store / "units").iterdir():
        path.unlink()
    broken = next(path for path in (store / "latents").rglob("0") if path.is_file())
    broken.write_bytes(b"")  # a power cut
    run(work, model)
    assert contents(store) == before


def test_a_second_encoder_of_the_same_part_is_refused_by_name(work: Path, model: Path) -> None:
    with writing(work / "latents.zarr", Part()), pytest.raises(StoreError, match=f"process {os.getpid()} on"):
        run(work, model)
    run(work, model)


def test_a_killed_encoder_leaves_no_lock(work: Path, model: Path) -> None:
    process = start(work, model)
    time.sleep(0.05)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    run(work, model)


def test_a_sweep_waits_until_nobody_writes(work: Path, model: Path) -> None:
    store = run(work, model)
    draft = store / "latents/0123.part"
    draft.mkdir()
    with writing(store, Part(1, 2)):
        draft.mkdir(exist_ok=True)
        with writing(store, Part(2, 2)):
            assert draft.is_dir()
    with writing(store, Part()):
        assert not draft.exists()


def test_parts_encode_one_store_at_the_same_time(tmp_path: Path, model: Path) -> None:
    work = small_shards(tmp_path / "work")
    parts = [start(work, model, f"{number}/3") for number in (1, 2, 3)]
    for process in parts:
        process.join()
        assert process.exitcode == 0
    sound(work)
    reader, index = StoreReader([work / "latents.zarr"]), read_index(work)
    assert set(reader.latents) == {sample.key for sample in index.samples}
    assert contents(run(work, model)) == contents(work / "latents.zarr")


def on_a_disk(folder: Path, options: str, *arguments: object) -> tuple[int, str]:
    """Run `python -m encode` with a small or read-only file system of its own mounted at `folder`."""
    folder.mkdir()
    mount = f'mount -t tmpfs -o {options} tmpfs "{folder}" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-m", "encode", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("options", "reason"), [("size=60k", "No space left"), ("ro", "Read-only file system")])
def test_a_full_or_read_only_disk_is_one_line(
    work: Path, model: Path, tmp_path: Path, options: str, reason: str
) -> None:
    disk = tmp_path / "disk"
    code, said = on_a_disk(
        disk, options, "--work", work, "--store", disk / "latents.zarr", "--model", model, "--preset", "demo"
    )
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert (code, len(errors), "Traceback" in said) == (2, 1, False), said
    assert reason in errors[0]


def test_a_moved_store_is_complete_without_shards(work: Path, model: Path, tmp_path: Path) -> None:
    store, elsewhere = run(work, model), tmp_path / "another machine" / "shared.zarr"
    keys = {sample.key for sample in read_index(work).samples}
    elsewhere.parent.mkdir()
    shutil.move(store, elsewhere)
    shutil.rmtree(work)
    reader = StoreReader([elsewhere])
    (dataset,) = read_datasets(elsewhere)
    assert {key for sample in dataset.samples for key in sample.keys} == keys == set(reader.latents)
    assert all(reader.text(key) for key in dataset.texts)
    assert str(work) not in json.dumps([json.loads(path.read_text()) for path in elsewhere.rglob("*.json")])
