"""An adapter from a file as the start of training. Input: a LoRA in any of the three formats. Output: our tensors.

The file's own scale (alpha / rank, or 1 where it names no alpha) is carried into B, so that the model starts exactly as
another program would run it with that file.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.config import Config
from shared.errors import RunError
from train.export import original_name

HALVES = {"lora_A": ("lora_A", "lora_down"), "lora_B": ("lora_B", "lora_up")}


def adapter_path(config: Config, expert: str) -> Path:
    """The file of an expert: ..._high_noise.safetensors stands for the pair of both."""
    path = Path(config.resume_from_adapter or "").expanduser()
    stem = path.stem.removesuffix("_high_noise").removesuffix("_low_noise")
    return path if expert == "single" or stem == path.stem else path.with_name(f"{stem}_{expert}{path.suffix}")


def start_from(path: Path, trained: dict[str, nn.Parameter], config: Config) -> None:
    """Copy a file's adapter into a fresh one; every tensor of the file must find its place."""
    tensors, scales = read_file(path)
    used: set[str] = set()
    for name, part in trained.items():
        module, half = name.removesuffix(".weight").rsplit(".", 1)
        key = next((key for key in spellings(module, half) if key in tensors), None)
        if key is None:
            if half == "lora_B":
                part.data.zero_()
            continue
        value = tensors[key].to(part.device, part.dtype)
        if value.shape != part.shape:
            raise RunError(
                f"{path}: {key} has shape {tuple(value.shape)}, lora_rank={config.lora_rank} needs "
                f"{tuple(part.shape)}; set lora_rank to the file's {min(value.shape)}"
            )
        rank = min(value.shape)
        own = scales.get(key.rpartition(".lora_")[0], rank) / rank
        part.data.copy_(value * (own * config.lora_rank / config.lora_alpha) if half == "lora_B" else value)
        used.add(key)
    if odd := sorted(tensors.keys() - used):
        raise RunError(
            f"{path}: {len(odd)} tensors fit nothing that is trained (first: {odd[0]}); check the model and "
            "lora_targets"
        )


def spellings(module: str, half: str) -> list[str]:
    """Keys of one tensor in all formats."""
    original = original_name(module)
    stems = [f"diffusion_model.{original}", f"transformer.{module}", f"lora_unet_{original.replace('.', '_')}"]
    return [f"{stem}.{word}.weight" for stem in stems for word in HALVES.get(half, ())]


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(A and B tensors by key, alpha by module); raises RunError when it is no adapter."""
    try:
        with safe_open(path, "pt") as file:
            everything = {key: file.get_tensor(key) for key in sorted(file.keys())}
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError) as error:
        raise RunError(f"resume_from_adapter={path}: {error}") from None
    tensors = {key: value for key, value in everything.items() if ".lora_" in key}
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in everything.items() if key.endswith(".alpha")}
    if not tensors:
        raise RunError(f"resume_from_adapter={path}: holds no LoRA; only plain LoRA files can be started from")
    for key in tensors if "transformer.lora_alpha" in settings else ():
        alphas.setdefault(key.rpartition(".lora_")[0], float(settings["transformer.lora_alpha"]))
    return tensors, alphas
