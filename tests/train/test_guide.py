"""Every JSON fragment of the training guide is accepted as it is printed, in every spelling its keys have had."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.config import Config
from shared.errors import ConfigError
from shared.geometry import geometry
from shared.resolve import Choice, Resolved, resolve
from tests.train.guide import FRAGMENTS
from train.explain import derived, settings
from train.model import refuse_mismatch


def layered(tmp_path: Path, preset: str, values: dict[str, Any]) -> Resolved:
    (tmp_path / "guide.json").write_text(json.dumps(values))
    return resolve(Choice(preset=preset, config=tmp_path / "guide.json"), tmp_path / "none")


@pytest.mark.parametrize(("section", "preset", "fragment"), FRAGMENTS, ids=[row[0].split("(")[0] for row in FRAGMENTS])
def test_a_fragment_is_accepted_unchanged(section: str, preset: str, fragment: dict[str, Any], tmp_path: Path) -> None:
    resolved = layered(tmp_path, preset, fragment)
    refuse_mismatch(resolved.config, resolved.spec)
    complete = resolved.config.model_dump(mode="json")
    for key, value in fragment.items():
        told = complete[key] if not isinstance(value, dict) else {name: complete[key][name] for name in value}
        assert told == value, f"{section}: {key}"
    assert geometry(resolved.config, resolved.spec).num_frames % 4 == 1
    named = [line for line in settings(resolved) if line.endswith("guide.json")]
    assert len(named) >= len(fragment) and derived(resolved)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"gradient_checkpointing": "OFF"}, {"gradient_checkpointing": "NONE"}),
        ({"gradient_checkpointing": "ON"}, {"gradient_checkpointing": "DEFAULT"}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": "DEFAULT"}),
        ({"gradient_checkpointing": "CPU_OFFLOADED"}, {"gradient_checkpointing": "CPU_OFFLOADED"}),
        ({"transformer": {"offload_fraction": 0.5}}, {"layer_offload_fraction": 0.5}),
        ({"sample_after": 2, "sample_after_unit": "EPOCH"}, {"sample_after": 2, "sample_after_unit": "EPOCH"}),
        ({"sample_after": 2, "sample_after_unit": "NEVER"}, {"sample_after": None}),
        (
            {"samples": [{"prompt": "a cat", "seed": 7, "cfg_scale": 4.0}, {"prompt": "b", "enabled": False},
                         {"prompt": "a dog", "seed": 7, "diffusion_steps": 20, "random_seed": False}]},
            {"sample_prompts": ["a cat", "a dog"], "sample_seed": 7, "sample_steps": 20, "sample_guidance_scale": 4.0},
        ),
        ({"clip_grad_norm": 0.5, "learning_rate_warmup_steps": 10}, {"max_grad_norm": 0.5, "warmup_steps": 10}),
        ({"learning_rate_scheduler": "COSINE"}, {"lr_scheduler": "COSINE"}),
    ],
)  # fmt: skip
def test_other_spellings_mean_the_same(theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path) -> None:
    for preset in ("16gb", "8gb"):
        assert layered(tmp_path, preset, theirs).config == layered(tmp_path, preset, ours).config
    source = layered(tmp_path, "16gb", theirs).sources
    assert all(source[key].endswith("guide.json") for key in ours)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"concept_file_name": "x.json"}, "the dataset is what make ingest"),
        ({"latent_caching": True}, "latents always come from the store"),
        ({"text_encoder": {"train_embedding": True}}, "training_method EMBEDDING"),
        ({"samples": [{"prompt": "a", "height": 512}]}, "previews have the size of the clips"),
        ({"samples": [{"prompt": "a", "random_seed": True}]}, "their seed is fixed"),
        ({"samples": [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 2}]}, "seed differs between samples"),
        ({"samples": ["a cat"]}, "or use sample_prompts"),
        ({"samples": [{"prompt": "a"}], "sample_prompts": ["b"]}, "keep one of them"),
        ({"transformer": {"offload_fraction": 0.5}, "layer_offload_fraction": 0.2}, "keep one of them"),
        ({"sample_after_unit": "ALWAYS"}, "sample_after_unit"),
        ({"gradient_checkpointing": "SOMETIMES"}, "gradient_checkpointing"),
    ],
)
def test_what_cannot_mean_anything_is_refused_with_the_reason(
    values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        layered(tmp_path, "16gb", values)


def test_other_spellings_work_on_the_command_line_too() -> None:
    config: Config = resolve(Choice(preset="16gb", set="transformer.offload_fraction=0.25")).config
    assert config.layer_offload_fraction == 0.25
