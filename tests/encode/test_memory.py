"""Memory of an encode does not grow with the number of clips: four times as many take no more than a few of them."""

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.commands import ROOT, peak_mib
from tests.encode.make import add_shard, index_of

SIZE = (9, 192, 192)
PER_SHARD = 3
PIXELS_MIB = 9 * 192 * 192 * 3 / 2**20  # of one clip, decoded: 0.95
# memory that is freed goes back to the system at once, so that what is counted is what is held
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}


def peak_of_an_encode(work: Path, model: Path, shards: int) -> float:
    """MiB at the highest of samples taken every few milliseconds; the store is complete afterwards."""
    index_of(work, [add_shard(work, f"{n}.tar", range(PER_SHARD * n, PER_SHARD * (n + 1)), size=SIZE)
                    for n in range(shards)])  # fmt: skip
    command = [sys.executable, "-m", "encode", "--work", str(work), "--model", str(model), "--preset", "demo"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | GIVE_BACK, stdout=subprocess.PIPE) as process:
        peak = peak_mib(process, "RssAnon")  # what no file backs
        assert process.stdout is not None and b"complete" in process.stdout.read()
    return peak


def test_four_times_the_clips_take_no_more_memory(tmp_path: Path, model: Path) -> None:
    few, many = (peak_of_an_encode(tmp_path / str(shards), model, shards) for shards in (2, 8))
    more = PER_SHARD * (8 - 2) * PIXELS_MIB  # 17 MiB, if their pixels were kept
    assert many - few < more / 2, f"{few:.0f} MiB, then {many:.0f} MiB"
