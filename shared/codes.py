"""Codes and scales of weights in 8 and 4 bits, and back. Input: rows of a float32 weight. Output: two plain tensors.

torch is imported inside functions. Names: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The 16 values of NF4 (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E)
NF4_TABLE = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
             -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
             0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
             1.0)  # fmt: skip
NF4_BLOCK = 64  # weights per scale
FP8_MAX = 448.0  # largest finite e4m3fn
INT8_MAX = 127.0
TINY = 1e-38  # floor of a block's largest magnitude, as in bitsandbytes: an all-zero block divides by it
CHUNK = 1 << 18  # weights stored at a time; larger temporaries left holes of up to 260 MB in the heap (glibc 2.36)
DECODED = 1 << 24  # NF4 weights decoded at a time without bitsandbytes: fewer, larger operations


class Stored(NamedTuple):
    """A weight as stored: what the codes and the scale are depends on the storage dtype."""

    codes: Tensor
    scale: Tensor


class Scheme(NamedTuple):
    """To codes: from rows of a float32 weight (rows a multiple of 64, or all). Back: (stored, (O, I), dtype)."""

    encode: Callable[[Tensor], Stored]
    decode: Callable[[Stored, tuple[int, int], torch.dtype], Tensor]


def to_fp8(rows_OI: Tensor) -> Stored:
    """e4m3 codes and a scale per row: its largest magnitude is 448."""
    import torch

    scale_O1 = rows_OI.abs().amax(dim=1, keepdim=True).clamp_min(TINY * FP8_MAX) / FP8_MAX
    return Stored((rows_OI / scale_O1).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale_O1)


def to_int8(rows_OI: Tensor) -> Stored:
    """8-bit codes and a scale per row: its largest magnitude is 127."""
    import torch

    scale_O1 = rows_OI.abs().amax(dim=1, keepdim=True).clamp_min(TINY * INT8_MAX) / INT8_MAX
    return Stored((rows_OI / scale_O1).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale_O1)


def from_scaled(stored: Stored, shape_OI: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The product is computed in float32 and rounded once; codes are exact in every float dtype."""
    import torch

    if stored.codes.is_cuda or dtype == torch.float32:
        return stored.codes.to(dtype).mul_(stored.scale)
    weight = torch.empty(shape_OI, dtype=dtype)  # torch's CPU has no fast kernel of mixed dtypes
    rows = max(1, CHUNK // shape_OI[1])
    for start in range(0, shape_OI[0], rows):
        part = slice(start, start + rows)
        weight[part] = stored.codes[part].float().mul_(stored.scale[part])
    return weight


def to_nf4(rows_OI: Tensor) -> Stored:
    """Two 4-bit codes per byte, the first one high, and the largest magnitude of each 64 weights in reading order.

    Multiplying by the reciprocal, and the lower code on a tie, make the codes those of bitsandbytes 0.50
    (bitsandbytes-foundation/bitsandbytes, bitsandbytes/backends/default/ops.py, quantize_4bit).
    """
    import torch

    flat = rows_OI.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    largest = blocks.abs().amax(dim=1)
    table = rows_OI.new_tensor(NF4_TABLE)
    scaled = blocks * (1.0 / largest.clamp_min(TINY)).unsqueeze(1)
    nearest = torch.bucketize(scaled.clamp_(-1, 1), (table[:-1] + table[1:]) / 2, out_int32=True)
    codes = nearest.to(torch.uint8).flatten()
    return Stored((codes[0::2] << 4) | codes[1::2], largest)


def from_nf4(stored: Stored, shape_OI: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Table value times block scale in float32, rounded once; by bitsandbytes' kernel where that is installed."""
    import torch

    count = shape_OI[0] * shape_OI[1]
    if _has_bitsandbytes() and stored.codes.is_cuda and count == 2 * len(stored.codes):
        return _from_nf4_by_bitsandbytes(stored, shape_OI, dtype)
    table = torch.tensor(NF4_TABLE, device=stored.codes.device)
    pairs = torch.cartesian_prod(table, table)  # the two weights of each of the 256 bytes
    weight = torch.empty(2 * len(stored.codes), dtype=dtype, device=stored.codes.device)
    step = DECODED // NF4_BLOCK
    for start in range(0, len(stored.scale), step):
        scale = stored.scale[start : start + step].unsqueeze(1)
        codes = stored.codes[start * NF4_BLOCK // 2 : (start + step) * NF4_BLOCK // 2]
        values = pairs[codes.int()].view(-1, NF4_BLOCK) * scale
        weight[start * NF4_BLOCK : (start + step) * NF4_BLOCK] = values.flatten()
    return weight[:count].view(shape_OI)


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _from_nf4_by_bitsandbytes(stored: Stored, shape_OI: tuple[int, int], dtype: torch.dtype) -> Tensor:
    import torch

    importlib.import_module("bitsandbytes")  # registers the operator
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        stored.codes.unsqueeze(1), stored.scale, NF4_BLOCK, "nf4", shape_OI, dtype
    )
    return weight


SCHEMES: dict[str, Scheme] = {
    "FLOAT_8": Scheme(to_fp8, from_scaled),
    "INT_8": Scheme(to_int8, from_scaled),
    "NFLOAT_4": Scheme(to_nf4, from_nf4),
}
