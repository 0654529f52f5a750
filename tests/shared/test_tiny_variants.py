"""The structural variants of the tiny Wan: made once, whole, loadable by stock diffusers, of the promised kind."""

from pathlib import Path

import pytest
from diffusers import WanPipeline

from shared.models import model_spec
from shared.tiny_variants import random_variant


@pytest.mark.parametrize(
    ("name", "inputs", "channels", "stride", "condition"),
    [("tiny-i2v", 36, 16, 8, "concat"), ("tiny-ti2v", 48, 48, 16, "first_frame")],
)
def test_a_variant_is_a_stock_pipeline_of_its_kind(
    name: str, inputs: int, channels: int, stride: int, condition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = model_spec(name)
    assert (spec.in_channels, spec.vae.channels, spec.vae.stride_THW) == (inputs, channels, (4, stride, stride))
    assert spec.image_condition == condition
    pipeline = WanPipeline.from_pretrained(random_variant(name))
    assert pipeline.transformer.config.in_channels == inputs
    assert pipeline.vae.config.z_dim == channels
    assert [path.name for path in (tmp_path / "prewan").iterdir()] == [Path(spec.repo).name]


def test_the_pair_uses_the_trained_dit_twice() -> None:
    pair, single = model_spec("tiny-a14b"), model_spec("tiny")
    assert pair.boundary == 0.875
    assert pair.experts == ("high_noise", "low_noise")
    assert {part for _, part in pair.expert_folders} == {"transformer"}
    assert (pair.repo, pair.vae) == (single.repo, single.vae)
