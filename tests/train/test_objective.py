"""The loss of a step is the published objective: against a reference in float64 with the stock diffusers forward."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.config import Config
from shared.models import ModelSpec, spec_of_folder
from shared.store_read import StoreReader
from tests.train.make import config, listed, make_model, make_store
from train.adapter import add_adapter
from train.data import Draw, Slots, load_step
from train.flow import SigmaLaw
from train.model import Model, TextBank, load_model, predict
from train.objective import micro_loss

Made = tuple[Path, ModelSpec, Path]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """A t2v, an i2v and a ti2v model, each with a store of 6 samples."""
    made = {}
    for name, changes in {"t2v": {}, "i2v": {"in_channels": 36}, "ti2v": {"first_frame": True}}.items():
        folder = tmp_path_factory.mktemp(name)
        model = make_model(folder / "model", **changes)  # type: ignore[arg-type]
        spec = spec_of_folder(model)
        samples = [listed(number, spec, prior=number > 3) for number in range(6)]
        made[name] = model, spec, make_store(folder / "s.zarr", spec, samples)
    return made


class PickedRope(nn.Module):
    """The stock rotary tables of some frames of a longer clip."""

    def __init__(self, rope: nn.Module, positions: tuple[int, ...], total: int) -> None:
        super().__init__()
        self.rope, self.positions, self.total = rope, positions, total

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        whole = latent.new_zeros(1, 1, self.total, *latent.shape[3:])
        per_frame = latent.shape[3] * latent.shape[4] // 4
        index = torch.cat([torch.arange(per_frame) + place * per_frame for place in self.positions])
        return tuple(table[:, index] for table in self.rope(whole))


def reference(stock: Any, slots: Slots, settings: Config, reader: StoreReader) -> float:
    """The mean loss of a batch, sample by sample, from the formulas."""
    total, positions = 0.0, list(slots.frames.positions)
    stock.rope = PickedRope(stock.rope, slots.frames.positions, slots.frames.total)
    for number, key in enumerate(slots.captions):
        latent, noise = slots.latent_BCthw[number].double(), slots.noise_BCthw[number].double()
        sigma = slots.sigma_B[number].double()
        clean = slots.frames.clean_B is not None and bool(slots.frames.clean_B[number])
        noisy = (1 - sigma) * latent + sigma * noise
        if clean:
            noisy[:, 0] = latent[:, 0]
        noisy, target = noisy[:, positions], (noise - latent)[:, positions]
        tokens = noisy[0].numel() // 4
        timestep = torch.full((1, tokens), float(1000 * sigma), dtype=torch.float64)
        timestep[:, : tokens // len(positions)] *= 0 if clean else 1
        inputs = noisy
        if slots.cond_BCthw is not None:
            mask = torch.zeros(4, *noisy.shape[1:], dtype=torch.float64)
            mask[:, 0] = 1
            inputs = torch.cat([noisy, mask, slots.cond_BCthw[number].double()[:, positions]])
        rows = torch.from_numpy(reader.text(key).embedding_Sd.astype(np.float64))
        text = torch.cat([rows, rows.new_zeros(512 - len(rows), rows.shape[1])])
        with torch.no_grad():
            predicted = stock(inputs[None], timestep if clean else timestep[:, -1], text[None]).sample[0]
        error = predicted - target
        counted = error[:, 1:] if clean else error
        loss = counted.square() if settings.loss == "MSE" else torch.where(
            counted.abs() <= 1, counted.square(), 2 * counted.abs() - 1)  # fmt: skip
        value = loss.mean()
        pairs = [(i, i + 1) for i in range(int(clean), len(positions) - 1) if positions[i + 1] == positions[i] + 1]
        if pairs:
            changes = torch.stack([(error[:, j] - error[:, i]).square().mean() / 2 for i, j in pairs])
            value = value + settings.video_config.temporal_consistency_weight * changes.mean()
        total += float(value * slots.weight_B[number])
    return total


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("t2v", {}),
    "huber": ("t2v", {"loss": "HUBER"}),
    "temporal": ("t2v", {"video_config": {"temporal_consistency_weight": 1.5}}),
    "frames dropped": ("t2v", {"video_config": {"frame_dropout_probability": 0.5, "temporal_consistency_weight": 1.0}}),
    "weights": ("t2v", {"prior": {"weight": 0.3}, "caption_dropout_probability": 1.0}),
    "i2v": ("i2v", {}),
    "i2v, frames dropped": ("i2v", {"video_config": {"frame_dropout_probability": 0.5}}),
    "first frame": ("ti2v", {"first_frame_conditioning_probability": 0.5}),
    "all": ("ti2v", {"first_frame_conditioning_probability": 0.5, "loss": "HUBER",
                     "video_config": {"temporal_consistency_weight": 0.7, "frame_dropout_probability": 0.3}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_reference(kinds: dict[str, Made], case: str) -> None:
    kind, changes = CASES[case]
    folder, spec, store = kinds[kind]
    settings = config(folder, batch_size=6, **changes)
    reader = StoreReader([store])
    draws = [Draw(sample, sample.keys[0]) for sample in (listed(n, spec, prior=n > 3) for n in range(6))]
    model = load_model(spec, "single", settings, CPU)
    double = Model(model.transformer.double(), CPU, torch.float64, model.options)
    for step in range(3):
        (slots,) = load_step(reader, settings, SigmaLaw("UNIFORM", 2.0), step, draws)
        found = float(micro_loss(double, TextBank(double, reader), slots, settings))
        wanted = reference(deepcopy(double.transformer), slots, settings, reader)
        assert found == pytest.approx(wanted, rel=3e-6)


def test_no_temporal_weight_is_plain_flow_matching_bit_for_bit(kinds: dict[str, Made]) -> None:
    folder, spec, store = kinds["t2v"]
    plain, zero = config(folder), config(folder, video_config={"temporal_consistency_weight": 0.0})
    model, reader = load_model(spec, "single", plain, CPU), StoreReader([store])
    draws = [Draw(listed(0, spec), "sample0")]
    losses = []
    for each in (plain, zero):
        (slots,) = load_step(reader, each, SigmaLaw("UNIFORM", 1.0), 0, draws)
        losses.append(micro_loss(model, TextBank(model, reader), slots, each).detach())
    assert torch.equal(*losses)


def test_attention_inside_frames_lets_no_frame_see_another(kinds: dict[str, Made]) -> None:
    folder, spec, store = kinds["t2v"]
    reader = StoreReader([store])
    draws = [Draw(listed(0, spec), "sample0")]
    for whole in (True, False):
        settings = config(folder, video_config={"use_temporal_attention": whole})
        model = load_model(spec, "single", settings, CPU)
        (slots,) = load_step(reader, settings, SigmaLaw("UNIFORM", 1.0), 0, draws)
        other = slots.latent_BCthw.clone()
        other[:, :, 2] += 1
        text = TextBank(model, reader).batch(slots.captions)
        with torch.no_grad():
            first, second = (
                predict(model, latent, torch.tensor([[500.0]]), text) for latent in (slots.latent_BCthw, other)
            )
        assert torch.equal(first[:, :, 0], second[:, :, 0]) is not whole


def test_prior_prediction_pulls_prior_samples_nowhere(kinds: dict[str, Made]) -> None:
    """With the adapter at its start the loss of prior samples is 0; of the others it is what it was."""
    folder, spec, store = kinds["t2v"]
    settings = config(folder, prior={"prediction": True}, batch_size=6)
    reader = StoreReader([store])
    model = load_model(spec, "single", settings, CPU)
    add_adapter(model.transformer, settings, 0)
    bank = TextBank(model, reader)
    for prior in (True, False):
        draws = [Draw(listed(number, spec, prior=prior), f"sample{number}") for number in range(3)]
        (slots,) = load_step(reader, settings, SigmaLaw("UNIFORM", 1.0), 0, draws)
        plain = settings.model_copy(update={"prior": settings.prior.model_copy(update={"prediction": False})})
        with torch.no_grad():
            loss, without = (micro_loss(model, bank, slots, each) for each in (settings, plain))
        assert float(loss) == 0 if prior else torch.equal(loss, without)


def test_a_mean_over_micro_batches_is_the_mean_over_the_batch(kinds: dict[str, Made]) -> None:
    folder, spec, store = kinds["t2v"]
    reader, law = StoreReader([store]), SigmaLaw("UNIFORM", 1.0)
    draws = [Draw(listed(number, spec), f"sample{number}") for number in range(6)]
    losses = []
    for share in (1.0, 0.5, 0.17):
        settings = config(folder, batch_size=6, video_config={"video_batch_size_multiplier": share})
        model = load_model(spec, "single", settings, CPU)
        parts = load_step(reader, settings, law, 0, draws)
        assert len(parts) == math.ceil(6 / max(1, round(6 * share)))
        losses.append(sum(float(micro_loss(model, TextBank(model, reader), part, settings)) for part in parts))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
