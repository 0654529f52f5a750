"""Adapter dropout that no division of a batch changes: a mask follows from (seed, step, slot in the batch, layer).

Cells are dropped by a hash of their place, not by a generator's state: micro-batches, processes, devices, longer texts
beside a slot's own and blocks that are computed again change nothing. Cost: a few int32 passes over a layer's input.
LoHa and LoKr have another dropout, of whole layers (peft's module_dropout): it is the same for all of a step.

Names: B samples, N tokens, d hidden size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class SlotDropout(nn.Dropout):
    """Dropout of one layer's input (B, N, d); `seed_B`, int32, is set before each micro-batch."""

    seed_B: Tensor

    def forward(self, hidden_BNd: Tensor) -> Tensor:
        """Cells are 0 with probability p, and the others scaled by 1 / (1 - p)."""
        if not self.training:
            return hidden_BNd
        return torch.where(kept_cells(self.seed_B, hidden_BNd.shape[1:], self.p), hidden_BNd, 0) / (1 - self.p)


def kept_cells(seed_B: Tensor, shape_Nd: Sequence[int], p: float) -> Tensor:
    """(B, N, d) bool: True with probability 1 - p, a function of the sample's seed, the row and the column."""
    row_N, column_d = (torch.arange(size, dtype=torch.int32, device=seed_B.device) for size in shape_Nd)
    key_BN1 = mixed(mixed(seed_B[:, None, None]) + row_N[:, None])
    return mixed(key_BN1 ^ mixed(column_d)) >= int(p * 2**32) - 2**31


def mixed(bits: Tensor) -> Tensor:
    """`lowbias32` (github.com/skeeto/hash-prospector): a bijection of 32 bits that leaves no pattern; int32 wraps."""
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return bits ^ (bits >> 16 & 0xFFFF)


def use_slot_dropout(transformer: Any, adapter: str) -> None:
    """Replace peft's dropout in every LoRA or DoRA layer that has one."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer) and isinstance(drop := layer.lora_dropout[adapter], nn.Dropout):
            layer.lora_dropout[adapter] = SlotDropout(drop.p)


def seed_dropout(transformer: Any, dice: Sequence[int], device: torch.device) -> None:
    """Before a micro-batch: `dice` of the step, then of each sample (train/data.py)."""
    torch.manual_seed(dice[0])  # what module_dropout draws from
    layers = [module for module in transformer.modules() if isinstance(module, SlotDropout)]
    seeds = [np.random.default_rng(die).integers(-(2**31), 2**31, len(layers), np.int32) for die in dice[1:]]
    for layer, seed_B in zip(layers, torch.from_numpy(np.stack(seeds, 1)).to(device), strict=True):
        layer.seed_B = seed_B
