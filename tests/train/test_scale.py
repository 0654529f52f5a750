"""Loss scaling follows torch.amp.GradScaler, is part of a checkpoint, and is not taken for a run that is lost."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import RunError
from shared.models import ModelSpec
from tests.train.make import config, events, listed, make_run, make_store, trained
from train import checkpoint
from train.run import Run
from train.scale import PATIENCE, LossScale
from train.session import start

Made = tuple[Path, ModelSpec, Path]
HALF: dict[str, Any] = {"train_dtype": "FLOAT_16", "transformer": {"weight_dtype": "FLOAT_16"}}


def test_the_scale_is_that_of_torchs_scaler() -> None:
    part = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([part], lr=0.0)
    theirs, ours = torch.amp.GradScaler("cpu"), LossScale()
    overflows = {5, 2100, 2101, 4200}
    for step in range(4300):
        theirs.scale(part.sum()).backward()
        if step in overflows:
            part.grad = torch.full_like(part, torch.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.after(step in overflows)
        assert ours.value == theirs.get_scale()
    assert PATIENCE == 2000 and ours.good == theirs.state_dict()["_growth_tracker"]


def overflowing(single: Made, folder: Path, **changes: Any) -> Run:
    """A run whose loss weight makes gradients overflow FLOAT_16 until the scale is small."""
    model, spec, _ = single
    store = folder / "s.zarr"
    if not store.exists():
        make_store(store, spec, [listed(number, spec, prior=True) for number in range(4)])
    plain = {"max_steps": 18, "backup_after": 5, "lr_scheduler": "CONSTANT", "prior": {"weight": 6e4}}
    settings = config(model, **plain | HALF | changes)
    return make_run(folder / "run", settings, store)


def test_overflows_at_a_high_scale_are_skipped_counted_and_said(single: Made, tmp_path: Path, capsys: Any) -> None:
    run = overflowing(single, tmp_path)
    start(run, finished=False)
    losses = [row["loss"] for row in events(run) if row["event"] == "step"]
    skipped = losses.index(next(loss for loss in losses if loss is not None))
    assert 10 < skipped < 18 and None not in losses[skipped:]  # more than may fail in a row without a scale
    state = checkpoint.read_state(checkpoint.latest(run.folder) or Path())
    assert state.loss_scale == 2.0 ** (16 - skipped) and state.steps_at_scale == 18 - skipped
    assert state.skipped == skipped and state.skipped_in_a_row == 0
    assert capsys.readouterr().err.count("update skipped, the loss scale is") == skipped
    at_five = checkpoint.read_state(run.folder / "checkpoints" / "15")
    assert at_five.loss_scale == state.loss_scale and at_five.steps_at_scale == 15 - skipped


def test_a_scale_goes_on_where_its_checkpoint_left_it(single: Made, tmp_path: Path) -> None:
    whole = overflowing(single, tmp_path)
    start(whole, finished=False)
    half = overflowing(single, tmp_path / "half", max_steps=7)
    start(half, finished=False)
    start(overflowing(single, tmp_path / "half"), finished=False)
    assert all(torch.equal(trained(half)[name], value) for name, value in trained(whole).items())
    assert events(half) == events(whole)


def test_overflows_at_the_floor_end_a_run(single: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = overflowing(single, tmp_path, max_steps=60)
    monkeypatch.setattr("train.scale.FLOOR", 2.0**14)
    with pytest.raises(RunError, match="10 updates in a row were not finite"):
        start(run, finished=False)
    assert sum(row["event"] == "step" for row in events(run)) == 2 + 9  # two halvings, and the tenth ends it
