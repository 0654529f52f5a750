"""The demo at a few steps: killed at random moments and run again, it ends where an undisturbed one does."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.e2e.commands import ROOT

SHORT = "max_steps=6 backup_after=2 sample_steps=2"
SECONDS = 45  # about what the short demo takes; kills fall anywhere in it


def demo(work: Path, run: Path, kill_after: float | None = None) -> int:
    """Run the short demo, killing it and its children (-9) after some seconds; returns the exit code."""
    command = [sys.executable, "-m", "tests.demo", "--no-check", "--set", SHORT, "--work", work, "--run", run]
    with (work.parent / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert demo(folder / "work", folder / "run") == 0, (folder / "log").read_text()
    return folder


def kill_and_finish(undisturbed: Path, folder: Path, seed: int, kills: int) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        demo(folder / "work", folder / "run", kill_after=rng.uniform(1, SECONDS))
    assert demo(folder / "work", folder / "run") == 0, (folder / "log").read_text()
    ours, theirs = (load_file(next((root / "run").glob("*.safetensors"))) for root in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    for name in ("work/samples/sheet.png", "work/index.json"):
        assert (folder / name).exists()


def test_a_killed_demo_run_again_gives_the_same_adapter(undisturbed: Path, tmp_path: Path) -> None:
    kill_and_finish(undisturbed, tmp_path, seed=1, kills=2)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_a_demo_killed_again_and_again_gives_the_same_adapter(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    kill_and_finish(undisturbed, tmp_path, seed=100 + seed, kills=4)
