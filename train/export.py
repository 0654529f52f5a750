"""From trained tensors to the files other programs load. Input: tensors by our names. Output: one safetensors file.

    COMFY_LORA       diffusion_model.<original Wan name>.lora_A.weight / .lora_B.weight / .alpha
    DIFFUSERS_LORA   transformer.<diffusers name>.lora_A.weight / .lora_B.weight, alpha in the file's metadata

ComfyUI's loader and diffusers both apply the alpha keys of the first form; of the second, diffusers reads the rank and
alpha from `lora_adapter_metadata` (huggingface/diffusers `loaders/lora_base.py`). Two experts give two files.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from shared.config import Config, OutputFormat
from shared.files import atomic_write
from shared.models import ModelSpec
from shared.resolve import to_json
from shared.weights import model_folder, torch_dtype, weights_fingerprint

# diffusers -> original, in order (huggingface/diffusers scripts/convert_wan_to_diffusers.py, reversed)
ORIGINAL_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "o"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
)


def original_name(name: str) -> str:
    """Name in Wan's own code of a linear, given its diffusers name."""
    parts = f".{name}."
    for ours, theirs in ORIGINAL_NAMES:
        parts = parts.replace(f".{ours}.", f".{theirs}.")
    return parts.strip(".")


def comfy_lora(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Keys of COMFY_LORA; the scale is alpha / rank, so alpha is written beside each pair."""
    named = {f"diffusion_model.{original_name(name)}": value for name, value in tensors.items()}
    modules = {name.removesuffix(".lora_A.weight") for name in named if name.endswith(".lora_A.weight")}
    return named | {f"{module}.alpha": torch.tensor(config.lora_alpha) for module in modules}


def diffusers_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of DIFFUSERS_LORA."""
    return {f"transformer.{name}": value for name, value in tensors.items()}


def peft_metadata(config: Config) -> str:
    """`lora_adapter_metadata`: peft's settings of the adapter, under the component's name."""
    settings = {
        "peft_type": "LORA",
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": config.lora_targets,
        "bias": "none",
    }
    return json.dumps({f"transformer.{key}": value for key, value in settings.items()}, sort_keys=True)


def describe(config: Config, spec: ModelSpec, expert: str, steps: int, data: str) -> dict[str, str]:
    """What a file says of its origin; tags as kohya-ss (ss_*) and the ModelSpec standard (modelspec.*) name them."""
    part = dict(spec.expert_folders)[expert]
    base = weights_fingerprint(model_folder(spec, (part,)) / part)
    settings = to_json(config)
    facts = {
        "base_model": config.base_model_name,
        "base_model_hash": base,
        "expert": expert,
        "steps": str(steps),
        "store_fingerprint": data,
        "config": json.dumps(settings, sort_keys=True),
    }
    if config.training_method == "LORA":
        facts |= {
            "lora_adapter_metadata": peft_metadata(config),
            "ss_network_dim": str(config.lora_rank),
            "ss_network_alpha": str(config.lora_alpha),
            "ss_network_module": "networks.lora",
        }
    return facts | {
        "format": "pt",
        "ss_base_model_version": f"wan_{spec.name}",
        "ss_steps": str(steps),
        "ss_learning_rate": str(config.learning_rate),
        "ss_seed": str(config.seed),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"wan_{spec.name}/{config.training_method.lower()}",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.2",
        "modelspec.title": f"{spec.name} {config.training_method.lower()}",
        "modelspec.resolution": config.resolution,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
    }


def formatted(tensors: Mapping[str, Tensor], config: Config, form: OutputFormat) -> dict[str, Tensor]:
    """Tensors under the names of a format, in output_dtype; alpha stays float32."""
    named = comfy_lora(tensors, config) if form == "COMFY_LORA" else diffusers_lora(tensors)
    dtype = torch_dtype(config.output_dtype)
    return {
        name: value.detach().cpu().to(torch.float32 if name.endswith(".alpha") else dtype).contiguous()
        for name, value in named.items()
    }


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file, atomically."""
    with atomic_write(path) as file:
        file.write(save(dict(tensors), metadata))


def result_path(folder: Path, name: str, expert: str) -> Path:
    """<name>.safetensors, or <name>_high_noise / _low_noise of a two-expert model."""
    return folder / (f"{name}.safetensors" if expert == "single" else f"{name}_{expert}.safetensors")
