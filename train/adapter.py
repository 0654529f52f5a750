"""LoRA in peft layers: add it to a loaded DiT, name its tensors, copy them in and out, switch it off.

The adapter's weights are float32 whatever the base is stored in, because small updates vanish in bfloat16.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shared.config import Config
from shared.errors import ConfigError, RunError
from train.dropout import use_slot_dropout
from train.flow import wide

ADAPTER = "default"  # peft's name for the only adapter


def add_adapter(transformer: Any, config: Config, seed: int) -> dict[str, nn.Parameter]:
    """Wrap the targeted linears; returns the trainable parameters by name, such as blocks.0.attn1.to_q.lora_A.weight.

    The start is peft's: A random from `seed`, B zero, so the model is unchanged.
    """
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    if not any(re.fullmatch(config.lora_targets, name) for name in linears):
        raise ConfigError(f"lora_targets={config.lora_targets!r} matches no linear of the model, such as {linears[-1]}")
    settings = peft_settings(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, transformer, ADAPTER)
    use_slot_dropout(transformer, ADAPTER)
    transformer.eval()  # dropout is switched on by those who want it
    trained = adapter_parameters(transformer)
    for parameter in trained.values():
        parameter.data = wide(parameter.data)
    return trained


def peft_settings(config: Config) -> PeftConfig:
    """peft's configuration of peft_type."""
    plain: dict[str, Any] = {"r": config.lora_rank, "target_modules": config.lora_targets}
    if config.peft_type in ("LOHA", "LOKR"):
        kind = LoHaConfig if config.peft_type == "LOHA" else LoKrConfig
        return kind(**plain, alpha=config.lora_alpha, module_dropout=config.lora_dropout)
    dropout, dora = config.lora_dropout, config.peft_type == "DORA"
    return LoraConfig(**plain, lora_alpha=config.lora_alpha, lora_dropout=dropout, use_dora=dora)


def adapter_parameters(transformer: Any) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, without peft's adapter name in it."""
    named = transformer.named_parameters()
    return {name.replace(f".{ADAPTER}", ""): part for name, part in named if part.requires_grad}


def copy_into(trained: dict[str, nn.Parameter], saved: dict[str, Tensor], origin: str) -> None:
    """Overwrite parameters with saved tensors of the same names and shapes."""
    if trained.keys() != saved.keys():
        odd = sorted(trained.keys() ^ saved.keys())[0]
        raise RunError(f"{origin} does not fit this model and config: {odd} is on one side only; start with RESUME=no")
    with torch.no_grad():
        for name, part in trained.items():
            part.copy_(saved[name])


@contextmanager
def adapter_off(transformer: Any) -> Iterator[None]:
    """The base model alone."""
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
