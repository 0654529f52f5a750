"""It learns, on the shipped tiny model: each expert lowers the loss on its own range of sigma; a fine-tune memorises.

Thresholds allow half the gain, or twice the loss, that three seeds reached when this was written.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import Config
from shared.models import model_spec
from shared.resolve import PRESETS, read_layer
from shared.store_read import StoreReader
from tests.train.make import events, listed, make_run, make_store, trained
from train.adapter import add_adapter, copy_into
from train.data import Draw, load_step
from train.flow import SigmaLaw
from train.model import TextBank, load_model
from train.objective import micro_loss
from train.session import start

SEEDS = [0, pytest.param(1, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.soak)]
SIZE = (5, 32, 32)


def tiny(**changes: Any) -> Config:
    small = {"resolution": "32x32", "frames": 5, "batch_size": 4, "sample_prompts": [], "warmup_steps": 0}
    plain = {"timestep_distribution": "UNIFORM", "lora_rank": 8, "lora_alpha": 8, "caption_dropout_probability": 0.0}
    return Config.model_validate(read_layer(PRESETS / "demo.json") | small | plain | changes)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_expert_lowers_the_loss_on_its_own_range(tmp_path: Path, seed: int) -> None:
    settings = tiny(base_model_name="tiny-a14b", max_steps=80, expert_share=0.5, seed=seed)
    spec = model_spec("tiny-a14b")
    store = make_store(tmp_path / "s.zarr", spec, [listed(number, spec, SIZE) for number in range(4)])
    run = make_run(tmp_path / "run", settings, store)
    start(run, finished=False)
    reader = StoreReader([store])
    draws = [Draw(listed(number, spec, SIZE), f"sample{number}") for number in range(4)]
    ranges = {"high_noise": SigmaLaw("UNIFORM", 1.0, 0.875, 1.0), "low_noise": SigmaLaw("UNIFORM", 1.0, 0.0, 0.875)}

    def losses(expert: str | None) -> dict[str, float]:
        model = load_model(spec, "high_noise", settings, torch.device("cpu"))
        if expert is not None:
            copy_into(add_adapter(model.transformer, settings, 0), trained(run, expert), "run")
        bank, found = TextBank(model, reader), dict.fromkeys(ranges, 0.0)
        for name, law in ranges.items():
            for step in range(1000, 1008):
                (slots,) = load_step(reader, settings, law, step, draws)
                with torch.no_grad():
                    found[name] += float(micro_loss(model, bank, slots, settings))
        return found

    base, gains = losses(None), {}
    for expert in ranges:
        found = losses(expert)
        gains[expert] = {name: 1 - found[name] / base[name] for name in ranges}
    for expert, other in (("high_noise", "low_noise"), ("low_noise", "high_noise")):
        assert gains[expert][expert] > {"high_noise": 0.2, "low_noise": 0.35}[expert]
        assert gains[expert][expert] > gains[other][expert]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fine_tune_memorises_four_clips(tmp_path: Path, seed: int) -> None:
    settings = tiny(training_method="FINE_TUNE", output_model_format="SAFETENSORS", learning_rate=1e-3, max_steps=120,
                    seed=seed, timestep_stratified=True)  # fmt: skip
    spec = model_spec("tiny")
    store = make_store(tmp_path / "s.zarr", spec, [listed(number, spec, SIZE) for number in range(4)])
    run = make_run(tmp_path / "run", settings, store)
    start(run, finished=False)
    losses = [row["loss"] for row in events(run) if row["event"] == "step"]
    assert sum(losses[-10:]) / 10 < 0.14 * losses[0]
