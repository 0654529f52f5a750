"""Two processes with half the batch each do what one process does with the whole."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from shared.files import write_json
from shared.models import ModelSpec
from shared.resolve import to_json
from tests.train.make import config, events, make_run, trained
from train import checkpoint
from train.session import start

Made = tuple[Path, ModelSpec, Path]
ROOT = Path(__file__).parents[2]


def command(settings: Path, store: Path, run: Path) -> list[str]:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "--",
        "train",
    ]
    return [*launch, "--work", str(run.parent), "--store", str(store), "--config", str(settings), "--run", str(run)]


def test_two_processes_give_the_weights_of_one_and_survive_a_kill(single: Made, tmp_path: Path) -> None:
    model, _, store = single
    shared: dict[str, Any] = {"max_steps": 30, "ema": 0.9, "backup_after": 3, "optimizer": {"eps": 1e-3}}
    one = make_run(tmp_path / "one", config(model, batch_size=4, **shared), store)
    start(one, finished=False)
    write_json(tmp_path / "c.json", to_json(config(model, batch_size=2, **shared)))
    two = make_run(tmp_path / "two", config(model, batch_size=2, **shared), store)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = command(tmp_path / "c.json", store, two.folder)
    with (tmp_path / "log").open("wb") as log:
        launcher = psutil.Popen(launch, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while launcher.poll() is None and checkpoint.latest(two.folder) is None:
            time.sleep(0.01)
        for process in [*launcher.children(recursive=True), launcher]:
            process.kill()
        launcher.wait()
        assert not (two.folder / "done").exists()
        again = subprocess.run(launch, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False, timeout=240)
    said = (tmp_path / "log").read_text()
    assert again.returncode == 0 and "processes: 2" in said and "resuming" in said, said[-3000:]
    for kind in ("weights", "average"):
        ours, theirs = trained(one, kind=kind), trained(two, kind=kind)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)
    for row, other in zip(events(one), events(two), strict=True):
        assert json.dumps(row)[:40] == json.dumps(other)[:40]
        if row["event"] == "step":
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
