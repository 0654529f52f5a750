"""Runs in float64, so that what must be equal by algebra is equal to 1e-10. Under torchrun: several processes as one.

Arguments: run folders, each with its plan.json; folder@4 goes on with a copy of a run as it was after step 4.
"""

import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from shared.config import Config
from shared.files import read_json, write_json
from shared.resolve import to_json
from tests.train.make import make_run
from train.group import ALONE, Group, join, leave
from train.model import Model, load_model
from train.run import Run
from train.session import start
from train.text_encoder import TextEncoder, load_encoder


def load_double(*wanted: Any) -> Model:
    """An expert in float64, arithmetic and all."""
    model = load_model(*wanted)
    return Model(model.transformer.double(), model.device, torch.float64, model.options)


def load_double_encoder(*wanted: Any) -> TextEncoder:
    """UMT5 in float64, but for the float32 inside its norms and softmax, which see one text at a time."""
    encoder = load_encoder(*wanted)
    return replace(encoder, stack=encoder.stack.double(), table_Vd=encoder.table_Vd.double(), dtype=torch.float64)


def train_double(run: Run, group: Group = ALONE) -> None:
    """Train a run in float64."""
    with patch("train.method.load_encoder", load_double_encoder):
        start(run, finished=False, group=group, loader=load_double)


def plan_run(folder: Path, settings: Config, store: Path) -> Run:
    """A run that processes of their own can start."""
    write_json(folder / "plan.json", {"config": to_json(settings), "store": str(store)})
    return make_run(folder, settings, store)


def planned(folder: Path) -> Run:
    """The run of a plan."""
    plan = read_json(folder / "plan.json")
    return make_run(folder, Config.model_validate(plan["config"]), Path(plan["store"]))


def rewind(copy: Path, original: Path, step: int) -> None:
    """Copy a finished run, without what came after a checkpoint."""
    shutil.copytree(original, copy)
    (copy / "done").unlink()
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    together = join()
    for name in sys.argv[1:]:
        original, _, step = name.partition("@")
        if step:
            together.agree(partial(rewind, Path(name), Path(original), int(step)))
        train_double(planned(Path(name)), together)
    leave(together)
