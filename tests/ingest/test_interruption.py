"""kill -9 at any moment: the next run ends with the index, tars and pixels of a run that was never interrupted."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ingest.__main__ import bundled_ffmpeg
from shared.shards import Index, read_index, shard_folder
from tests.ingest.make import ROOT, ingest_process, make_dataset, run_ingest

# every kind of job but scenes: the crop is looked for, black bars too
SETTINGS = "windows_per_clip=2 shard_megabytes=1 gates.near_duplicate=null crop=smart resolution=96x64"


def left_by(work: Path) -> tuple[Index, dict[str, bytes]]:
    """The index, whose dataset id is drawn, without it; and every file beside it that encode reads."""
    index = read_index(work).model_copy(update={"dataset": ""})
    return index, {path.name: path.read_bytes() for path in shard_folder(work).iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, tuple[Index, dict[str, bytes]]]:
    """A dataset, how long its ingest takes, and what it leaves."""
    root = tmp_path_factory.mktemp("kill")
    data = make_dataset(root / "data", {f"clip{n}.mp4": f"board {n}" for n in range(8)})
    start = time.monotonic()
    subprocess.run(ingest_process(data, root / "work", SETTINGS), cwd=ROOT, check=True, capture_output=True)
    return data, time.monotonic() - start, left_by(root / "work")


def run_killed(command: list[str], seconds: float, how: signal.Signals) -> int:
    """Run a command and send it a signal after some seconds; its exit code."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(how)
    return process.wait()


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(3, 20))])
def test_a_killed_run_is_finished_by_the_next(
    finished: tuple[Path, float, tuple[Index, dict[str, bytes]]], tmp_path: Path, seed: int
) -> None:
    data, seconds, truth = finished
    draw = random.Random(seed)
    command = ingest_process(data, tmp_path / "work", SETTINGS)
    for _ in range(2):
        run_killed(command, draw.uniform(0.2, 1.1) * seconds, signal.SIGKILL)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert left_by(tmp_path / "work") == truth
    assert not list((tmp_path / "work" / "staging").iterdir())


def test_ctrl_c_says_so_and_keeps_what_is_finished(
    finished: tuple[Path, float, tuple[Index, dict[str, bytes]]], tmp_path: Path
) -> None:
    data, _, truth = finished
    slow = tmp_path / "ffmpeg"  # so that clips are left to do, however busy the machine is
    slow.write_text(f'#!/bin/sh\nsleep 0.3\nexec "{bundled_ffmpeg()}" "$@"\n')
    slow.chmod(0o755)
    command, work = [*ingest_process(data, tmp_path / "work", SETTINGS), "--ffmpeg", str(slow)], tmp_path / "work"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list((work / "staging").glob("*.mp4")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors.splitlines()[-1]) == (130, "interrupted; the same command goes on from here")
    assert not list((work / "staging").glob("*.part"))
    assert not list((work / "staging").glob("*.json"))
    assert list((work / "staging").glob("*.mp4"))
    run_ingest(data, work, SETTINGS)
    assert left_by(work) == truth


def test_two_ingests_of_one_work_folder_do_not_meet(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {f"clip{n}.mp4": f"board {n}" for n in range(3)})
    command = ingest_process(data, tmp_path / "work", SETTINGS)
    pair = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in pair]
    codes = sorted(process.returncode for process in pair)
    assert codes in ([0, 2], [0, 0])
    assert codes == [0, 0] or any("another ingest is at work" in error for error in errors)
    assert len(read_index(tmp_path / "work").samples) == 6
