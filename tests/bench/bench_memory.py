"""Peak memory of each stage on the demo's clips, beside that of importing what the stage is made of."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench.harness import Pair
from tests.demo.dataset import write_dataset

ROOT = Path(__file__).parents[2]
CLIPS = 4  # of either kind
IMPORTS = {"ingest": "ingest.__main__, av, ffmpeg", "encode": "encode.worker", "train": "train.session"}


def peak_of(*words: Any) -> Callable[[], float]:
    """MiB of the largest moment of a Python process with these arguments; its own children do not count.

    It is read off the running process (VmHWM of proc(5)): ru_maxrss of a child starts with what its parent holds.
    """

    def call() -> float:
        command, peak = [sys.executable, *map(str, words)], 0.0
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                peak = max(peak, high_water(process.pid))
                time.sleep(0.01)
        assert process.returncode == 0, command
        return peak

    return call


def high_water(process: int) -> float:
    """MiB; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def positive(ours: float, theirs: float) -> None:
    """Both ran to their end."""
    assert ours > 0 and theirs > 0


def memory_pairs() -> Iterator[Pair]:
    """memory: ingest, encode and a training of three steps on eight of the demo's clips."""
    folder = Path(tempfile.mkdtemp())
    write_dataset(folder / "dataset", CLIPS, CLIPS)
    work, demo = folder / "work", ("--preset", "demo")
    few = ("--set", "max_steps=3 sample_after=null sample_prompts=[] warmup_steps=0")
    stages = {
        "ingest": anew(work, peak_of("-m", "ingest", "--data", folder / "dataset", "--work", work, *demo)),
        "encode": anew(work / "latents.zarr", peak_of("-m", "encode", "--work", work, *demo, *few)),
        "train": anew(folder / "run", peak_of("-m", "train", "--work", work, "--run", folder / "run", *demo, *few)),
    }
    for stage, call in stages.items():
        imports = peak_of("-c", f"import {IMPORTS[stage]}")
        yield Pair(f"memory {stage}", call, imports, "its imports alone", positive, clock="MiB", rounds=2)
    shutil.rmtree(folder)


def anew(result: Path, call: Callable[[], float]) -> Callable[[], float]:
    """The call, each time without the result of an earlier one."""

    def measured() -> float:
        shutil.rmtree(result, ignore_errors=True)
        return call()

    return measured


ITEMS = {"memory": memory_pairs}
