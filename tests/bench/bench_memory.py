"""Peak memory of each stage on the demo's clips, beside that of importing what the stage is made of."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench.harness import Pair
from tests.demo.dataset import write_dataset
from tests.e2e.commands import ROOT, peak_mib

CLIPS = 4  # of either kind
IMPORTS = {"ingest": "ingest.__main__, av, ffmpeg", "encode": "encode.worker", "train": "train.session"}


def peak_of(*words: Any) -> Callable[[], float]:
    """MiB of the largest moment of a Python process with these arguments."""

    def call() -> float:
        command = [sys.executable, *map(str, words)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            peak = peak_mib(process, "VmHWM")
        assert process.returncode == 0, command
        return peak

    return call


def positive(ours: float, theirs: float) -> None:
    """Both measured something."""
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
        yield Pair(f"memory {stage}", call, imports, "its imports alone", positive, clock="MiB", rounds=2,
                   warm_up=False)  # fmt: skip
    shutil.rmtree(folder)


def anew(result: Path, call: Callable[[], float]) -> Callable[[], float]:
    """The call, each time without the result of an earlier one."""

    def measured() -> float:
        shutil.rmtree(result, ignore_errors=True)
        return call()

    return measured


ITEMS = {"memory": memory_pairs}
