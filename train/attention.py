"""Which kernel self-attention runs on: what is installed, and legal for training. Input: config, device; said at start.

Self-attention goes through diffusers' dispatcher. Cross-attention stays with torch's own SDPA: it adds log(n) to the
score of the one row that stands for n rows of padding (lean.py), and the flash kernels take no such bias; it is a few
percent of the work. A backend must have gradients: SageAttention's kernels have none.
"""

import importlib.util
from typing import NamedTuple

import torch

from shared.config import Config
from shared.errors import ConfigError

NATIVE, FLASH_2, FLASH_3, XFORMERS, FLEX = "native", "flash", "_flash_3", "xformers", "flex"  # diffusers' names
HOPPER = (9, 0)  # the capability that FlashAttention 3 is made for
WAYS_OUT = {"FLASH": "pip install flash-attn --no-build-isolation", "XFORMERS": "pip install xformers"}


class Backend(NamedTuple):
    """diffusers' name of it, and what the user is told."""

    name: str
    said: str


def choose(config: Config, device: torch.device) -> Backend:
    """The backend of a run; raises ConfigError when the one asked for is missing, or cannot train here."""
    refuse_unfit(config, device)
    if config.attention == "XFORMERS":
        return Backend(XFORMERS, "attention: xformers")
    if config.attention == "FLEX":
        return Backend(FLEX, "attention: torch's flex attention, compiled with the blocks")
    if config.attention in ("AUTO", "FLASH") and runs_flash_3(config, device):
        return Backend(FLASH_3, "attention: FlashAttention 3")
    if config.attention == "FLASH":
        return Backend(FLASH_2, "attention: FlashAttention 2")
    return Backend(NATIVE, "attention: torch SDPA")


def runs_flash_3(config: Config, device: torch.device) -> bool:
    """Whether FlashAttention 3 is here and made for this card. (FlashAttention 2 is part of torch's SDPA.)"""
    on_card = device.type == "cuda" and config.train_dtype != "FLOAT_32"
    return on_card and installed("flash_attn_interface") and torch.cuda.get_device_capability(device) == HOPPER


def refuse_unfit(config: Config, device: torch.device) -> None:
    """Raise ConfigError, naming the way out, when the backend asked for is missing or cannot train here."""
    asked = config.attention
    if asked in ("AUTO", "SDPA"):
        return
    if asked == "SAGE":
        raise ConfigError("attention=SAGE: SageAttention has no gradients; use AUTO, SDPA or FLASH")
    if asked == "FLEX" and not config.compile:
        raise ConfigError("attention=FLEX: uncompiled it writes out all scores; give compile=true too, or use SDPA")
    if device.type != "cuda":
        raise ConfigError(f"attention={asked}: it trains on a GPU only, and there is none; use AUTO or SDPA")
    if asked != "FLEX" and config.train_dtype == "FLOAT_32":
        raise ConfigError(f"attention={asked}: its kernels are for 16 bits; set train_dtype=BFLOAT_16, or use SDPA")
    packages = {"FLASH": ("flash_attn", "flash_attn_interface"), "XFORMERS": ("xformers",), "FLEX": ("torch",)}[asked]
    if not any(map(installed, packages)):
        raise ConfigError(f"attention={asked}: {packages[0]} is not installed; {WAYS_OUT[asked]}, or use AUTO")


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None
