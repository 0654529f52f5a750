"""Validation measures held-out samples at fixed timesteps and noise: its numbers move with the weights alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from shared.models import ModelSpec
from tests.train.make import config, events, make_run, trained
from train.data import VALIDATION, epoch_batches, random_of
from train.flow import SigmaLaw, sigma_at
from train.model import TextBank, load_model
from train.phases import sigma_law
from train.session import start
from train.stores import open_dataset
from train.validate import names_of, quantiles, validate

Made = tuple[Path, ModelSpec, Path]
CPU = torch.device("cpu")
BOTH = {"resolution": "32x32,48x32", "validation": {"timesteps": 3}}


@torch.no_grad()
def reference(made: Made, settings: Any) -> dict[tuple[str, int], float]:
    """Squared error of the stock DiT in float64, per (bucket, quantile), averaged over the held-out samples."""
    folder, spec, store = made
    dit = WanTransformer3DModel.from_pretrained(folder / "transformer").double()
    data = open_dataset([store], store.parent, settings, spec)
    errors: dict[tuple[str, int], list[float]] = {}
    for number, sample in enumerate(data.validation):
        clean = torch.tensor(data.reader.latent(sample.keys[0]).astype(np.float64))
        rows = torch.tensor(data.reader.text(sample.captions[0]).embedding_Sd.astype(np.float64))
        text = torch.cat([rows, rows.new_zeros(512 - len(rows), rows.shape[1])])[None]
        for place in range(3):
            at = sigma_at(sigma_law(settings, spec, "single"), torch.tensor([(place + 0.5) / 3], dtype=torch.float64))
            noise = torch.tensor(random_of(settings.seed, VALIDATION, number, place).standard_normal(clean.shape, "f"))
            noisy = (1 - at) * clean + at * noise
            said = dit(noisy[None], 1000 * at, text).sample[0]
            errors.setdefault((str(sample.bucket), place), []).append(float((said - (noise - clean)).square().mean()))
    return {key: float(np.mean(values)) for key, values in errors.items()}


def test_validation_is_the_stock_models_error_at_every_quantile_and_bucket(mixed: Made) -> None:
    folder, spec, store = mixed
    settings = config(folder, **BOTH)
    data = open_dataset([store], store.parent, settings, spec)
    bank = TextBank(load_model(spec, "single", settings, CPU), data.reader)
    ours = validate(bank, data, sigma_law(settings, spec, "single"), settings)
    wanted = reference(mixed, settings)
    assert {bucket for bucket, _ in wanted} == {"32x32x9", "48x32x9"}
    by_place = [np.mean([loss for (_, at), loss in wanted.items() if at == place]) for place in range(3)]
    names = [name for name in ours if name.startswith("t")]
    assert [ours[name] for name in names] == pytest.approx(by_place, rel=1e-4)
    for bucket in ("32x32x9", "48x32x9"):
        mean = np.mean([loss for (of, _), loss in wanted.items() if of == bucket])
        assert ours[f"bucket {bucket}"] == pytest.approx(mean, rel=1e-4)
    assert ours["loss"] == pytest.approx(np.mean(by_place), rel=1e-4)


def test_each_quantile_is_reported_under_a_name_of_its_own() -> None:
    """With a large shift, 64 quantiles lie less than a timestep apart near 1."""
    crowded = quantiles(SigmaLaw("UNIFORM", 50.0, 0.875, 1.0), 64)
    names = names_of(crowded)
    assert len({f"{1000 * sigma:.0f}" for sigma in crowded}) < len(set(names)) == 64
    assert names_of([0.9991, 0.25, 0.9989]) == ["t0999.00", "t0250", "t0999.02"]


def test_weights_that_do_not_move_give_the_very_same_numbers(mixed: Made, tmp_path: Path) -> None:
    settings = config(mixed[0], max_steps=3, learning_rate=1e-30, validate_after=1, **BOTH)
    run = make_run(tmp_path / "run", settings, mixed[2])
    start(run, finished=False)
    rows = [row for row in events(run) if row["event"] == "validation"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all({**row, "step": 0} == rows[0] for row in rows)


def test_validation_changes_nothing_of_the_training(mixed: Made, tmp_path: Path) -> None:
    weights, losses = [], []
    for name, every in (("often", 1), ("never", None)):
        settings = config(mixed[0], max_steps=4, validate_after=every, lora_dropout=0.1, **BOTH)
        run = make_run(tmp_path / name, settings, mixed[2])
        start(run, finished=False)
        weights.append(trained(run))
        losses.append([row["loss"] for row in events(run) if row["event"] == "step"])
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_held_out_samples_are_never_trained(mixed: Made) -> None:
    settings = config(mixed[0], **BOTH)
    data = open_dataset([mixed[2]], mixed[2].parent, settings, mixed[1])
    held_out = {sample.keys[0] for sample in data.validation}
    drawn = {
        draw.key for epoch in range(3) for batch in epoch_batches(data.train, settings, epoch, 4) for draw in batch
    }
    assert len(held_out) == 2 and len(drawn) == 8 and not held_out & drawn


@pytest.mark.parametrize("law", [SigmaLaw("UNIFORM", 5.0, 0.0, 0.875), SigmaLaw("LOGIT_NORMAL", 1.0, 0.875, 1.0)])
def test_quantiles_stand_for_equal_shares_of_an_experts_own_range(law: SigmaLaw) -> None:
    sigmas = quantiles(law, 4)
    assert sigmas == sorted(sigmas) and law.low < sigmas[0] and sigmas[-1] < law.high
    drawn = sigma_at(law, torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    shares = [float((drawn < sigma).double().mean()) for sigma in sigmas]
    assert shares == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.01)
