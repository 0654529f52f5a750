"""The embedded tiny Wan and its structural variants, for the demo and the tests.

`tiny` is the trained model in shared/tiny; `tiny-a14b` uses its DiT as both experts. `tiny-i2v` and `tiny-ti2v` have
random weights of the right structure, written on the spot (seeded, under a second) to the user's store of such files.
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.files import built_once
from shared.models import TINY_FOLDER, ModelSpec, spec_of_folder

VARIANTS_VERSION = 1
DIT = {"num_attention_heads": 2, "attention_head_dim": 24, "freq_dim": 64, "ffn_dim": 96, "num_layers": 2}
# the two VAE kinds of Wan at the smallest faithful size
VAE_21: dict[str, Any] = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
VAE_22: dict[str, Any] = {
    "base_dim": 4,
    "decoder_base_dim": 4,
    "z_dim": 48,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def tiny_spec(name: str) -> ModelSpec:
    """Spec of one of the four tiny models; makes the random ones when they are not on disk yet."""
    if not (TINY_FOLDER / "model_index.json").is_file():
        raise ModelError(f"{TINY_FOLDER} has no tiny model; make it with: make tiny")
    sampling: dict[str, Any] = {
        "train_shift": 1.0,
        "sample_shift": 1.0,
        "sample_steps": 20,
        "fps": 8,
        "guidance": (2.0, 2.0),
    }
    if name == "tiny":
        return replace(spec_of_folder(TINY_FOLDER, name), **sampling)
    if name == "tiny-a14b":
        pair = (("high_noise", "transformer"), ("low_noise", "transformer"))
        return replace(spec_of_folder(TINY_FOLDER, name), **sampling, boundary=0.875, expert_folders=pair)
    return replace(spec_of_folder(random_variant(name), name), **sampling)


def random_variant(name: str) -> Path:
    """Folder of `tiny-i2v` (36 input channels) or `tiny-ti2v` (Wan 2.2 VAE kind)."""
    return built_once(f"{name}-{VARIANTS_VERSION}", partial(_write_variant, name))


def _write_variant(name: str, folder: Path) -> None:
    """Save a random pipeline in diffusers layout; text encoder and tokenizer are those of `tiny`."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel

    ti2v = name == "tiny-ti2v"
    channels, inputs = (48, 48) if ti2v else (16, 36)
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    text_dim = spec_of_folder(TINY_FOLDER).text_dim
    dit = WanTransformer3DModel(in_channels=inputs, out_channels=channels, text_dim=text_dim, **DIT)
    vae = AutoencoderKLWan(**(VAE_22 if ti2v else VAE_21))
    torch.random.set_rng_state(torch_state)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    dit.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(TINY_FOLDER / part, folder / part)
    index = _PIPELINE_INDEX.replace("EXPAND", "true" if ti2v else "false")
    (folder / "model_index.json").write_text(index)


_PIPELINE_INDEX = """{
  "_class_name": "WanPipeline",
  "boundary_ratio": null,
  "expand_timesteps": EXPAND,
  "scheduler": ["diffusers", "UniPCMultistepScheduler"],
  "text_encoder": ["transformers", "UMT5EncoderModel"],
  "tokenizer": ["transformers", "T5TokenizerFast"],
  "transformer": ["diffusers", "WanTransformer3DModel"],
  "transformer_2": [null, null],
  "vae": ["diffusers", "AutoencoderKLWan"]
}
"""
