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
from train.run import Run
from train.session import start

SEEDS = [0, pytest.param(1, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.soak)]
SIZE = (5, 32, 32)
CLIPS = [listed(number, model_spec("tiny"), SIZE) for number in range(4)]


def tiny(**changes: Any) -> Config:
    small = {"resolution": "32x32", "frames": 5, "batch_size": 4, "sample_prompts": [], "warmup_steps": 0}
    plain = {"timestep_distribution": "UNIFORM", "lora_rank": 8, "lora_alpha": 8, "caption_dropout_probability": 0.0}
    return Config.model_validate(read_layer(PRESETS / "demo.json") | small | plain | changes)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_expert_lowers_the_loss_on_its_own_range(tmp_path: Path, seed: int) -> None:
    settings = tiny(base_model_name="tiny-a14b", max_steps=80, expert_share=0.5, seed=seed)
    spec = model_spec("tiny-a14b")
    store = make_store(tmp_path / "s.zarr", spec, CLIPS)
    run = make_run(tmp_path / "run", settings, store)
    start(run, finished=False)
    reader = StoreReader([store])
    draws = [Draw(clip, clip.keys[0]) for clip in CLIPS]
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


def fine_tune(folder: Path, seed: int, **changes: Any) -> Run:
    """All weights of the tiny model trained on four clips of noise, each with a caption of its own."""
    spec = model_spec("tiny")
    settings = tiny(training_method="FINE_TUNE", output_model_format="SAFETENSORS", timestep_stratified=True, seed=seed,
                    **changes)  # fmt: skip
    run = make_run(folder / "run", settings, make_store(folder / "s.zarr", spec, CLIPS))
    start(run, finished=False)
    return run


def step_losses(run: Run) -> list[float]:
    return [row["loss"] for row in events(run) if row["event"] == "step"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fine_tune_memorises_four_clips(tmp_path: Path, seed: int) -> None:
    """7 % of the first loss is left after 120 updates."""
    losses = step_losses(fine_tune(tmp_path, seed, learning_rate=1e-3, max_steps=120))
    assert sum(losses[-10:]) / 10 < 0.14 * losses[0]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_a_longer_fine_tune_brings_the_loss_of_four_clips_near_zero(tmp_path: Path, seed: int) -> None:
    """0.36, 0.58 and 0.61 % of the first loss are left over the last 50 updates, with seeds 0, 1 and 2.

    Of what is left nearly all is near sigma 0: 0.63 to 0.67 for sigma below 0.02, 0.08 up to 0.1 and 0.007 above,
    where it was 11, 12 and 4. The caption says which clip it is, so the noise follows from it and the input, and the
    least loss is 0; but that divides a small difference by sigma: near 0 a model that knows the clip and cannot tell
    the noise at all has a loss of 1.
    """
    changes = {"learning_rate": 3e-3, "lr_scheduler": "COSINE", "max_steps": 2000}
    run = fine_tune(tmp_path, seed, **changes)
    losses = step_losses(run)
    assert sum(losses[-50:]) / 50 < 0.0125 * losses[0]
    reader = StoreReader(run.stores)
    model = load_model(run.spec, "single", run.config, torch.device("cpu"))
    copy_into(dict(model.transformer.named_parameters()), trained(run), "run")
    bank, draws = TextBank(model, reader, trained=True), [Draw(clip, clip.keys[0]) for clip in CLIPS]
    for low, high, most in ((0.0, 0.02, 1.0), (0.02, 0.1, 0.2), (0.1, 1.0, 0.015)):
        parts = load_step(reader, run.config, SigmaLaw("UNIFORM", 1.0, low, high), 10_000, draws * 16)
        with torch.no_grad():
            assert sum(float(micro_loss(model, bank, slots, run.config)) for slots in parts) < most
