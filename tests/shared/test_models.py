"""The model table against diffusers: sizes on the meta device, VAE statistics, latent shapes."""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from shared.errors import ModelError
from shared.models import SPECS, WAN21_VAE, ModelSpec, model_spec, refuse_unsupported, vae_kind

PARAMETERS = {  # counted on the meta device from the configs of scripts/convert_wan_to_diffusers.py
    "ti2v-5b": 4_999_787_712,
    "t2v-a14b": 14_288_491_584,
    "i2v-a14b": 14_288_901_184,
    "t2v-1.3b": 1_418_996_800,
    "t2v-14b": 14_288_491_584,
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_the_tables_sizes_give_the_known_parameter_counts(spec: ModelSpec) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=spec.heads,
            attention_head_dim=spec.head_dim,
            ffn_dim=spec.ffn_dim,
            text_dim=spec.text_dim,
            num_layers=spec.num_layers,
            in_channels=spec.in_channels,
            out_channels=spec.vae.channels,
        )
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[spec.name]


def test_the_vae_table_is_what_diffusers_normalises_with() -> None:
    config = AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1).config
    assert vae_kind(dict(config)) == WAN21_VAE


@pytest.mark.parametrize(("name", "shape"), [("ti2v-5b", (48, 5, 32, 32)), ("t2v-a14b", (16, 5, 64, 64))])
def test_latent_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert SPECS[name].latent_shape(17, 512, 512) == shape


@pytest.mark.parametrize("name", ["wan-ai/WAN_2_2", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "TI2V-5B"])
def test_names_of_the_default_model(name: str) -> None:
    assert model_spec(name) is SPECS["ti2v-5b"]


def test_unknown_and_unsupported_models_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="'sdxl' is none of ti2v-5b"):
        model_spec("sdxl")
    for config in ({"_class_name": "WanVACETransformer3DModel"}, {"vace_layers": [0]}, {"image_dim": 1280}):
        with pytest.raises(ModelError, match="cannot be trained here"):
            refuse_unsupported(config, "folder")
