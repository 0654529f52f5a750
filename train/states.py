"""Bytes that belong to trained parameters: gradients, optimizer states, averages. Input: config and shapes.

A full fine-tune keeps them per block, so that they go where the block's weights go: to RAM with a streamed block
(blockwise.py), or in equal parts to several processes (shard.py).
"""

import math
from collections.abc import Iterable

import torch

from shared.config import Config
from train.dryrun import WeightCost
from train.quantize import TORCH_DTYPES
from train.updates import is_fused, parts_of_weights

SLOTS = 2  # device buffers of streamed blocks
GATHERED = 2  # blocks' gradients that FSDP2 has whole: those being made, and those being summed over the processes
# bytes of optimizer state per trained element, in units of the element's size; torch keeps states in its dtype
MOMENTS = {"ADAMW": 2, "MUON": 1, "LION": 1, "PRODIGY": 4, "CAME": 1, "SCHEDULE_FREE_ADAMW": 2}

Bytes = dict[str, int]


def state_of(config: Config, shapes: list[torch.Size], size: int) -> Bytes:
    """Bytes beside trained parameters of so many bytes per element."""
    elements = sum(shape.numel() for shape in shapes)
    return {
        "gradients": elements * size,
        "optimizer": states_bytes(config, shapes, size),
        "averages": elements * 4 if config.ema is not None else 0,
    }


def trained_bytes(config: Config, weights: WeightCost, streamed: int) -> tuple[Bytes, Bytes]:
    """Adapter, gradients, optimizer states, averages: (on the device, in RAM).

    Adapters are float32; a full fine-tune has the weights' dtype, and what belongs to streamed blocks in RAM.
    """
    if config.trains_dit:
        return tuned_bytes(config, weights, streamed)
    shapes = [*weights.trained_per_block * weights.blocks, *weights.trained_outside]
    if config.training_method == "EMBEDDING":
        shapes = [torch.Size((config.embedding.token_count, 4096))]
    return {"adapter": 4 * sum(map(torch.Size.numel, shapes)), **state_of(config, shapes, 4)}, {}


def tuned_bytes(config: Config, weights: WeightCost, streamed: int) -> tuple[Bytes, Bytes]:
    """Likewise of a full fine-tune. Fused, one block's gradients are alive; else all, of streamed blocks in RAM."""
    size, parts = TORCH_DTYPES[config.transformer.weight_dtype].itemsize, parts_of_weights(config)
    whole = [shape for shape in weights.trained_per_block if len(shape) == 2]
    small = [shape for shape in weights.trained_per_block if len(shape) != 2]
    matrix, rest, outside = (sum(map(torch.Size.numel, shapes)) for shapes in (whole, small, weights.trained_outside))
    matrices = matrix // parts
    state = states_bytes(config, whole, size) // parts + states_bytes(config, small, size)
    slots, kept = SLOTS if streamed else 0, weights.blocks - streamed
    if is_fused(config):
        gradients = matrices + rest
    else:
        passing = GATHERED if parts > 1 else slots + 1
        gradients = weights.blocks * rest + kept * matrices + passing * matrix
    waiting = 0 if is_fused(config) else streamed * matrices
    mean = 4 if config.ema is not None else 0
    device = {
        "gradients": (gradients + outside) * size,
        "optimizer": (kept + slots) * state + states_bytes(config, weights.trained_outside, size),
        "averages": mean * (weights.blocks * rest + kept * matrices + outside),
    }
    host = {
        "gradients of streamed blocks": waiting * size,
        "optimizer of streamed blocks": streamed * state,
        "averages of streamed blocks": mean * streamed * matrices,
    }
    return device, host


def update_bytes(config: Config, weights: WeightCost) -> int:
    """Bytes alive while the optimizer updates one tensor, or one block of them (dry runs, torch 2.13)."""
    if not config.trains_dit:
        return 0
    name, rounding = config.optimizer.name, config.optimizer.rounding
    sizes = [shape.numel() for shape in (*weights.trained_per_block, *weights.trained_outside)]
    if name == "CAME":
        return 24 * max(sizes)
    if rounding != "NEAREST":  # a float32 copy of weight and gradient, of one tensor at a time
        return (12 if name == "ADAFACTOR" or rounding == "KAHAN" else 8) * max(sizes)
    together = sum(shape.numel() for shape in weights.trained_per_block)
    return 2 * TORCH_DTYPES[config.transformer.weight_dtype].itemsize * together if name == "ADAFACTOR" else 0


def states_bytes(config: Config, shapes: Iterable[torch.Size], size: int) -> int:
    """Optimizer state of parameters of so many bytes per element."""
    lost = size if config.optimizer.rounding == "KAHAN" else 0  # what rounding dropped of each weight
    return sum(state_bytes(config, shape, size) + lost * shape.numel() for shape in shapes)


def state_bytes(config: Config, shape: torch.Size, size: int) -> int:
    """Optimizer state of one parameter. Adafactor keeps a row and a column; 8-bit states begin at 4096 elements."""
    name, elements = config.optimizer.name, shape.numel()
    size = size if config.optimizer.rounding == "NEAREST" else 4  # rounding.py keeps states in float32
    if name == "ADAFACTOR":
        factored = sum(shape[-2:]) * math.prod(shape[:-2]) if len(shape) > 1 else elements
        return factored * size
    if name == "ADAMW_8BIT":
        return 2 * elements if elements >= 4096 else 8 * elements
    return MOMENTS[name] * elements * size
