"""Adapters in files of other programs: which tensors there are, and one of them as the start of training.

Input: a .safetensors file with the keys of ComfyUI, kohya or diffusers, or original names without a prefix. A file's
own scale (alpha / rank, or 1 where it names no alpha) is part of what it does.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor, nn

from shared.config import Config
from shared.errors import ConfigError, ModelError, RunError
from shared.names import original_name
from shared.single_file import expert_file
from shared.tensors import read_header

# last part of a key -> what it is; LyCORIS' names are ours already
PARTS = {
    **dict.fromkeys(("lora_A.weight", "lora_down.weight", "lora_A.default.weight"), "lora_A"),
    **dict.fromkeys(("lora_B.weight", "lora_up.weight", "lora_B.default.weight"), "lora_B"),
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"), "dora_scale"),
    **{name: name for name in ("alpha", "diff", "diff_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{f"lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
SUFFIXES = sorted(PARTS, key=len, reverse=True)


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds: tensors by module as the file spells it, then by part."""

    path: Path
    keys: dict[str, dict[str, str]]
    alpha: float | None  # of modules without one of their own, from peft's settings in the metadata

    def part(self, module: str, name: str) -> Tensor:
        """A tensor, as stored."""
        with safe_open(self.path, "pt") as file:
            return cast(Tensor, file.get_tensor(self.keys[module][name]))

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank of a module; 1 where no alpha is named, as ComfyUI and diffusers take it."""
        alpha = float(self.part(module, "alpha")) if "alpha" in self.keys[module] else self.alpha
        return 1.0 if alpha is None else alpha / rank

    def module_of(self, names: Iterable[str]) -> dict[str, str]:
        """Module as the file spells it -> one of `names`, which are diffusers names; RunError when one has no place."""
        known = {spelling: name for name in names for spelling in spellings(name)}
        if odd := sorted(self.keys.keys() - known.keys()):
            raise RunError(f"{self.path}: {len(odd)} modules fit nothing in the model (first: {odd[0]}); it was made "
                           "for another model")  # fmt: skip
        return {module: known[module] for module in self.keys}


def spellings(module: str) -> list[str]:
    """A module's name in all formats."""
    original = original_name(module)
    flat = f"lora_unet_{original.replace('.', '_')}"
    return [f"diffusion_model.{original}", f"transformer.{module}", flat, original, module]


def adapter_path(config: Config, expert: str) -> Path:
    """resume_from_adapter of an expert: a name with high_noise in it stands for the pair, any other for all experts."""
    return expert_file(Path(config.resume_from_adapter or "").expanduser(), expert)


def base_adapters(config: Config, expert: str) -> tuple[tuple[Path, float], ...]:
    """(file, strength) of what is merged into an expert; raises ConfigError when a file is missing."""
    found = tuple((expert_file(Path(item.file).expanduser(), expert), item.strength) for item in config.base_adapters)
    for path, _ in found:
        if not path.is_file():
            raise ConfigError(f"base_adapters: {path}: no such file; give the path of a .safetensors adapter")
    return found


def refuse_missing(config: Config, experts: Iterable[str]) -> None:
    """Raise ConfigError for an adapter that is not there, before anything is loaded."""
    for expert in experts:
        base_adapters(config, expert)
        wanted = config.expert in ("both", expert)
        if config.resume_from_adapter and wanted and not (path := adapter_path(config, expert)).is_file():
            raise ConfigError(f"resume_from_adapter: {path}: no such file; give the path of a .safetensors adapter")


def read_adapter(path: Path, setting: str) -> AdapterFile:
    """The tensors of an adapter by module; raises RunError when the file is none."""
    try:
        header = read_header(path)
    except (OSError, ModelError) as error:
        raise RunError(f"{setting}={path}: {error}") from None
    keys: dict[str, dict[str, str]] = {}
    for key in header.entries:
        suffix = next((suffix for suffix in SUFFIXES if key.endswith(f".{suffix}")), None)
        if suffix is None:
            raise RunError(f"{setting}={path}: {key} is no part of an adapter that is known here")
        keys.setdefault(key.removesuffix(f".{suffix}"), {})[PARTS[suffix]] = key
    if not keys:
        raise RunError(f"{setting}={path}: holds no adapter")
    return AdapterFile(path, keys, peft_alpha(header.metadata.get("lora_adapter_metadata", "{}"), f"{setting}={path}"))


def peft_alpha(text: str, where: str) -> float | None:
    """lora_alpha of peft's settings in a file's metadata; raises RunError for settings that are not known here."""
    try:
        settings: dict[str, Any] = json.loads(text)
        alpha = settings.get("transformer.lora_alpha")
        scaled = settings.get("transformer.use_rslora") or settings.get("transformer.alpha_pattern")
        found = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError):
        raise RunError(f"{where}: its lora_adapter_metadata is not what peft writes; download it again") from None
    if scaled:
        raise RunError(f"{where}: its rsLoRA or alpha_pattern is not known here; export it with alpha keys")
    return found


def start_from(path: Path, trained: Mapping[str, nn.Parameter], config: Config) -> None:
    """Copy a file's plain LoRA into a fresh one, so that the model starts exactly as another program would run it."""
    file = read_adapter(path, "resume_from_adapter")
    if other := sorted({part for parts in file.keys.values() for part in parts} - {"lora_A", "lora_B", "alpha"}):
        raise RunError(f"resume_from_adapter={path}: holds {other[0]}; only plain LoRA files can be started from")
    if half := next((name for name, parts in file.keys.items() if not {"lora_A", "lora_B"} <= parts.keys()), None):
        raise RunError(f"resume_from_adapter={path}: {half} lacks one of its two matrices; the file is incomplete")
    own = {name.removesuffix(".weight").rpartition(".")[0] for name in trained}
    places = {name: module for module, name in trained_places(file, own).items()}
    for name, parameter in trained.items():
        module, half = name.removesuffix(".weight").rsplit(".", 1)
        if module in places:
            copy_half(file, places[module], half, parameter, config)
        elif half == "lora_B":
            parameter.data.zero_()


def trained_places(file: AdapterFile, own: set[str]) -> dict[str, str]:
    """Module of the file -> trained module; kohya's zeros for modules that are not trained may be left."""
    known = {spelling: name for name in own for spelling in spellings(name)}
    if odd := sorted(module for module in file.keys if module not in known and not is_zero(file, module)):
        raise RunError(f"{file.path}: {len(odd)} modules fit nothing that is trained (first: {odd[0]}); check the "
                       "model and lora_targets")  # fmt: skip
    return {module: known[module] for module in file.keys if module in known}


def is_zero(file: AdapterFile, module: str) -> bool:
    """Whether a module of a file changes nothing."""
    return not bool(file.part(module, "lora_B").any())


def copy_half(file: AdapterFile, module: str, half: str, parameter: nn.Parameter, config: Config) -> None:
    """A as it is; B with the file's scale in it, in place of this run's."""
    value = file.part(module, half).to(parameter.device, parameter.dtype)
    if value.shape != parameter.shape:
        raise RunError(f"{file.path}: {module} has shape {tuple(value.shape)}, lora_rank={config.lora_rank} needs "
                       f"{tuple(parameter.shape)}; set lora_rank to the file's {min(value.shape)}")  # fmt: skip
    factor = file.scale(module, min(value.shape)) * config.lora_rank / config.lora_alpha
    parameter.data.copy_(value * factor if half == "lora_B" else value)
