"""Each adapter of a pair acts on its expert's range of sigma alone: with one of them, the other range is the base's.

Bit for bit, by the code that validates and samples. What an adapter would do on the other range, where nothing ever
applies it, is measured in tests/e2e/test_experts.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shared.models import ModelSpec
from tests.train.make import caption, config, make_run
from train.model import TextBank, load_model
from train.phases import sigma_law
from train.run import Run
from train.sample import sample_range, scene_of, start_of, steps_of
from train.session import Weights, open_data, sample_latents, start, trained_bank
from train.validate import validate

Made = tuple[Path, ModelSpec, Path]
EXPERTS = ("high_noise", "low_noise")


class Seen(NamedTuple):
    """What an expert does: losses by quantile and bucket, and where its steps of the sampler lead."""

    losses: dict[str, float]
    state: Tensor


def seen(run: Run, expert: str, weights: Weights) -> Seen:
    """Of the pair as it was, or with what the run has trained; on the clips it was trained on."""
    data, _ = open_data(run.resolved, run.stores, run.work)
    bank = TextBank(load_model(run.spec, expert, run.config, torch.device("cpu")), data.reader)
    bank = trained_bank(run, expert, weights, bank, [])
    law = sigma_law(run.config, run.spec, expert)
    losses = validate(bank, replace(data, validation=data.train), law, run.config)
    scene = replace(scene_of(run.config, run.spec), prompts=(caption(0),), steps=8)
    assert steps_of(scene, run.spec, expert)
    state, _ = sample_range(bank, run.spec, scene, expert, start_of(scene, run))
    return Seen(losses, state)


@pytest.mark.parametrize("expert", EXPERTS)
def test_with_one_adapter_the_other_range_is_the_base_bit_for_bit(pair: Made, tmp_path: Path, expert: str) -> None:
    model, _, store = pair
    settings = config(model, expert=expert, max_steps=12, learning_rate=0.02, warmup_steps=0, batch_size=8)
    run = make_run(tmp_path / "run", settings, store)
    start(run, finished=False)
    for name in EXPERTS:
        base, ours = seen(run, name, "base"), seen(run, name, "weights")
        assert base.losses.keys() == ours.losses.keys() and len(base.losses) == 6
        if name == expert:
            assert all(ours.losses[key] < 0.98 * loss for key, loss in base.losses.items())
            assert not torch.equal(ours.state, base.state)
        else:
            assert ours.losses == base.losses
            assert torch.equal(ours.state, base.state)
    scene = replace(scene_of(settings, run.spec), prompts=(caption(0),), steps=8)
    assert not torch.equal(*(sample_latents(run, scene, weights) for weights in ("weights", "base")))
