"""Adapter dropout is a function of (seed, step, slot, layer): however a batch is divided, the same cells drop out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.config import Config
from shared.models import ModelSpec
from shared.store_read import StoreReader
from tests.train.make import config, listed
from train.adapter import add_adapter
from train.data import Draw, load_step
from train.dropout import SlotDropout, kept_cells
from train.flow import SigmaLaw
from train.group import Group
from train.model import Model, TextBank, load_model
from train.objective import micro_loss

Made = tuple[Path, ModelSpec, Path]
CPU, LAW = torch.device("cpu"), SigmaLaw("UNIFORM", 3.0)
SEEDS = torch.randint(-(2**31), 2**31, (64,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_cells_are_dropped_at_their_rate_and_independently(p: float) -> None:
    """Deviations in units of what chance gives; 64 samples of 128 tokens of 256 columns."""
    kept = kept_cells(SEEDS, (128, 256), p).double() - (1 - p)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.mean()) < 4 * sigma / kept.numel() ** 0.5
    for sums, worst in ((kept.sum((0, 1)), 4.5), (kept.sum((0, 2)), 4.5), (kept.sum((1, 2)), 4.5)):
        assert (sums / sigma / (kept.numel() / len(sums)) ** 0.5).abs().max() < worst
    beside = [(kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[:, :, 1:], kept[:, :, :-1]),
              (kept[:, 1:, 1:], kept[:, :-1, :-1]), (kept[:, :, 16:], kept[:, :, :-16])]  # fmt: skip
    for ours, theirs in beside:
        assert abs((ours * theirs).sum()) < 4 * sigma**2 * ours.numel() ** 0.5


def test_a_samples_mask_depends_on_no_other_sample_or_row() -> None:
    whole = kept_cells(SEEDS, (20, 33), 0.4)
    assert torch.equal(kept_cells(SEEDS[2:4], (7, 33), 0.4), whole[2:4, :7])
    assert not torch.equal(whole[0], whole[1])


def test_what_is_kept_is_scaled_and_nothing_is_dropped_outside_training() -> None:
    drop, hidden_BNd = SlotDropout(0.2), torch.randn(2, 5, 7)
    drop.seed_B = SEEDS[:2]
    kept = kept_cells(SEEDS[:2], (5, 7), 0.2)
    torch.testing.assert_close(drop(hidden_BNd), hidden_BNd * kept / 0.8)
    assert drop.eval()(hidden_BNd) is hidden_BNd


def test_processes_and_micro_batches_give_a_slot_the_same_dice(single: Made) -> None:
    model, spec, store = single
    settings, reader = config(model, lora_dropout=0.1, batch_size=5), StoreReader([store])
    draws = [Draw(listed(number, spec), f"sample{number}") for number in range(5)]
    (whole,) = load_step(reader, settings, LAW, 3, draws)
    step, *slots = whole.dice
    assert len(set(whole.dice)) == 6
    for rank in range(2):
        cut = config(model, lora_dropout=0.1, batch_size=5, video_config={"video_batch_size_multiplier": 0.2})
        parts = load_step(reader, cut, LAW, 3, draws, Group(rank, 2))
        assert [part.dice for part in parts] == [(step, slot) for slot in slots[rank::2]]
    (other,) = load_step(reader, settings, LAW, 4, draws)
    assert not set(other.dice) & set(whole.dice)
    assert load_step(reader, config(model), LAW, 3, draws)[0].dice == ()


def gradients(made: Made, settings: Config, fuse: bool = True, step: int = 0) -> dict[str, Tensor]:
    """Of one step's loss, in float64, by name; 'loss' is the loss."""
    _, spec, store = made
    reader, found = StoreReader([store]), load_model(spec, "single", settings, CPU)
    model = Model(found.transformer.double(), CPU, torch.float64, found.options)
    object.__setattr__(model.options, "fuse_qkv", fuse)
    trained = add_adapter(model.transformer, settings, 0)
    model.transformer.train()
    for index, part in enumerate(trained.values()):
        part.data = 0.3 * torch.randn(part.shape, generator=torch.Generator().manual_seed(index)).double()
    draws = [Draw(listed(number, spec), f"sample{number}") for number in range(4)]
    loss = torch.zeros((), dtype=torch.float64)
    for slots in load_step(reader, settings, LAW, step, draws):
        part_of_loss = micro_loss(model, TextBank(model, reader), slots, settings)
        part_of_loss.backward()
        loss += part_of_loss.detach()
    return {"loss": loss} | {name: part.grad for name, part in trained.items() if part.grad is not None}


WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "one by one": ({"video_config": {"video_batch_size_multiplier": 0.25}}, True),
    "computed again": ({"gradient_checkpointing": "DEFAULT", "layer_offload_fraction": 1.0}, True),
    "by peft's layers": ({}, False),
}


@pytest.mark.parametrize("kind", ["LORA", "DORA", "LOKR"])
def test_no_way_of_computing_a_step_changes_what_is_dropped(single: Made, kind: str) -> None:
    plain: dict[str, Any] = {"peft_type": kind, "lora_dropout": 0.3, "batch_size": 4}
    wanted = gradients(single, config(single[0], **plain))
    for changes, fuse in WAYS.values():
        ours = gradients(single, config(single[0], **plain, **changes), fuse)
        assert ours.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-10)
    losses = {float(gradients(single, config(single[0], **plain | {"lora_dropout": p}), step=step)["loss"])
              for p, step in ((0.3, 0), (0.3, 1), (0.0, 0))}  # fmt: skip
    assert len(losses) == 3
