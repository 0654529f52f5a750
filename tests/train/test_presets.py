"""Laws of the shipped presets: they differ where they say so, they train, and streaming does not change the result."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import Config
from shared.files import read_json
from shared.models import ModelSpec
from shared.resolve import Choice, merge, preset_names, resolve, to_json
from tests.train.make import events, make_run, trained
from train.run import changed_keys
from train.session import start

Made = tuple[Path, ModelSpec, Path]
SIZE = {
    "resolution": "32x32",
    "frames": 9,
    "batch_size": 2,
    "max_steps": 2,
    "sample_prompts": [],
    "prior": {"folders": []},
}
FINE_TUNE = {"training_method", "learning_rate", "optimizer.name", "optimizer.rounding", "output_model_format", "clip"}
LORA_SIZE = {"batch_size", "transformer.weight_dtype"}
SIBLINGS = {
    ("8gb", "16gb"): {*LORA_SIZE, "frames", "resolution", "lora_rank", "lora_alpha",
                      "video_config.video_batch_size_multiplier"},
    ("24gb", "16gb"): {*LORA_SIZE, "gradient_checkpointing"},
    ("24gb-finetune", "24gb"): {*FINE_TUNE, "gradient_checkpointing",
                                "video_config.video_batch_size_multiplier"},
    ("48gb", "24gb-finetune"): {"batch_size", "frames", "resolution", "optimizer.name"},
    ("embedding", "16gb"): {"training_method", "batch_size", "frames", "learning_rate", "embedding_learning_rate",
                            "output_model_format", "warmup_steps"},
}  # fmt: skip


def small(preset: str, model: Path, **changes: Any) -> Config:
    """A preset at the size of the made model."""
    values = to_json(resolve(Choice(preset)).config)
    merge(values, SIZE | {"base_model_name": str(model)} | changes)
    return Config.model_validate(values)


@pytest.mark.parametrize("names", SIBLINGS, ids="-".join)
def test_a_preset_differs_from_its_sibling_only_where_it_says_so(names: tuple[str, str]) -> None:
    ours, theirs = (to_json(resolve(Choice(name)).config) for name in names)
    assert set(changed_keys(ours, theirs)) == SIBLINGS[names]


@pytest.mark.parametrize("preset", [name for name in preset_names() if name != "embedding"])
def test_every_preset_trains(single: Made, tmp_path: Path, preset: str) -> None:
    model, _, store = single
    run = make_run(tmp_path / "run", small(preset, model), store)
    start(run, finished=False)
    losses = [row["loss"] for row in events(run) if row["event"] == "step"]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    peak = read_json(run.folder / "memory.json")["RAM of the process"]
    assert peak["predicted"] > 0.1 and peak["measured"] > 0.1


@pytest.mark.parametrize("preset", ["8gb", "16gb", "24gb-finetune"])
def test_the_guides_fractions_give_the_bits_of_fraction_zero(single: Made, tmp_path: Path, preset: str) -> None:
    model, _, store = single
    results = []
    for fraction in (0.0, 0.5, 0.8, "AUTO"):
        run = make_run(tmp_path / str(fraction), small(preset, model, layer_offload_fraction=fraction), store)
        start(run, finished=False)
        results.append(trained(run))
    for other in results[1:]:
        assert all(torch.equal(other[name], part) for name, part in results[0].items())
