"""Winograd convolution for the causal 3x3x3 layers on a CPU: six times fewer multiplications, in float32.

F(4x4, 3x3) in the plane and F(2, 3) in time, of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"
(arXiv 1509.09308). Every frame is transformed once; two frames of output share four products. The same algebra as the
layer, other rounding: a whole encode differs by less than 5e-5 relative. Layers in half precision are computed in
float32 from their own weights, so they come nearer to the float32 answer than the layer itself.

The norm and SiLU in front of a layer are applied block by block while its pixels are in the cache, so their result is
never stored. Cost: transformed weights, 144 float32 values for 27 of the layer's, kept for the life of the model; when
all of them take a quarter of free memory, further layers are left as they are.

Names: T H W frames and sides, C channels, P tiles of 4x4 pixels; 36 values stand for the 6x6 inputs of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Conv2d | nn.Conv3d

_INPUT = torch.tensor([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
                       [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0],
                       [0, 4, 0, -5, 0, 1]], dtype=torch.float64)  # fmt: skip
_WEIGHT = torch.tensor([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
                        [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]], dtype=torch.float64)  # fmt: skip
_OUTPUT = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0],
                        [0, 1, -1, 8, -8, 1]], dtype=torch.float64)  # fmt: skip
_TIME_WEIGHT = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
INPUT_36_36 = torch.kron(_INPUT, _INPUT).float()
OUTPUT_16_36 = torch.kron(_OUTPUT, _OUTPUT).float()
CONSTANT = 7  # the one of 36 values that adds the same to all 16 outputs of a tile: a bias goes there
EPSILON = 1e-12  # of F.normalize
SHARE_OF_FREE = 0.25
TILES_PER_CHANNEL = 2  # of all frames together, in a block; about this many values per frequency and channel

_transformed: "WeakKeyDictionary[nn.Module, tuple[int, list[Tensor]]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Block:
    """Rows and columns of tiles, and the pixels that they need: one more on each side, as far as there are any."""

    rows: slice
    columns: slice
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def pixels(self) -> tuple[slice, slice]:
        """Of the frame."""
        top, left = max(4 * self.rows.start - 1, 0), max(4 * self.columns.start - 1, 0)
        bottom, right = min(4 * self.rows.stop + 1, self.height), min(4 * self.columns.stop + 1, self.width)
        return slice(top, bottom), slice(left, right)

    @property
    def inner(self) -> tuple[slice, slice]:
        """The same pixels within the block's own square, which has zeros where the frame has no pixels."""
        (top, left), (down, across) = (4 * self.rows.start - 1, 4 * self.columns.start - 1), self.pixels
        return slice(down.start - top, down.stop - top), slice(across.start - left, across.stop - left)


@dataclass(frozen=True)
class Source:
    """Frames of one clip and how to prepare them: divided by their norm over channels, times a gain, SiLU; or as is."""

    frames_THWC: Tensor
    gain_C: Tensor | None
    norm_THW1: Tensor | None

    def write(self, block: Block, out_THWC: Tensor) -> None:
        """Prepare a block's pixels in float32."""
        down, across = block.pixels
        pixels_THWC = self.frames_THWC[:, down, across]
        if self.gain_C is None or self.norm_THW1 is None:
            out_THWC.copy_(pixels_THWC)
            return
        torch.div(pixels_THWC, self.norm_THW1[:, down, across], out=out_THWC)
        F.silu(out_THWC.mul_(self.gain_C), inplace=True)


def fewest(dtype: torch.dtype) -> tuple[int, int]:
    """From how many channels and pixels of a frame on this is faster than the layer itself, on this processor.

    AVX512-BF16 multiplies bfloat16 twice as fast as float32 (measured: even at 160 channels; at 16x16 pixels 1.5x
    behind, where reading the transformed weights takes longest), AMX eight times or more; without either, bfloat16 is
    slower than float32.
    """
    if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return 2**31, 2**31
    return (192, 512) if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else (48, 64)


def fits(hidden_BCTHW: Tensor, conv: Layer) -> bool:
    """Whether this layer gains: on a CPU, without gradients, 3x3 in the plane, wide, large, its weights affordable.

    The same for every pass of a clip, whatever its number of frames: the layer's history is kept in front of its norm
    or behind it.
    """
    channels, _, height, width = hidden_BCTHW.shape[1:]
    plain = hidden_BCTHW.dtype != torch.float64 and hidden_BCTHW.device.type == "cpu" and not torch.is_grad_enabled()
    square = tuple(conv.weight.shape[-2:]) == (3, 3) and conv.stride[-1] == 1
    least_channels, least_pixels = fewest(hidden_BCTHW.dtype)
    large = channels >= least_channels and height * width >= least_pixels
    return plain and square and large and bool(transformed_weight(conv))


def causal_conv(hidden_BCTHW: Tensor, past_BCTHW: Tensor | None, conv: Layer, gain_C: Tensor | None = None) -> Tensor:
    """The layer with zeros around each frame; before the frames come the two of `past`, or zeros.

    With a gain the layer sees SiLU(gain * x / |x|), the norm over channels.
    """
    batch, _, frames, height, width = hidden_BCTHW.shape
    sides = 4 * -(-height // 4), 4 * -(-width // 4)
    out_BTHWC = hidden_BCTHW.new_empty(batch, frames, *sides, conv.weight.shape[0])
    for clip in range(batch):
        given = [hidden_BCTHW] if past_BCTHW is None else [past_BCTHW, hidden_BCTHW]
        sources = [_source(frames_BCTHW[clip].permute(1, 2, 3, 0), gain_C) for frames_BCTHW in given]
        for block in _blocks(hidden_BCTHW, conv):
            _convolve(sources, block, conv, out_BTHWC[clip])
    return out_BTHWC[:, :, :height, :width].permute(0, 4, 1, 2, 3)


def transformed_weight(conv: Layer) -> list[Tensor]:
    """(36, C_in, C_out) weights of a layer, made once: 4 for three temporal taps, 1 for one, none if out of memory."""
    known = _transformed.get(conv)
    if known is None or known[0] != conv.weight._version:
        known = _transformed[conv] = (conv.weight._version, _transform(conv.weight.detach()))
    return known[1]


def _transform(weight: Tensor) -> list[Tensor]:
    weight_OIKHW = weight if weight.ndim == 5 else weight.unsqueeze(2)
    out_channels, channels, taps = weight_OIKHW.shape[:3]
    time = _TIME_WEIGHT if taps == 3 else torch.ones(1, 1, dtype=torch.float64)
    wanted = 36 * len(time) * out_channels * channels * 4
    kept = sum(tap.nbytes for _, known in _transformed.values() for tap in known)
    if kept + wanted > SHARE_OF_FREE * (kept + psutil.virtual_memory().available):
        return []
    plane_36_9 = torch.kron(_WEIGHT, _WEIGHT)
    weight_KHWIO = weight_OIKHW.permute(2, 3, 4, 1, 0).reshape(taps, 9, -1)
    rows = [(time_K.view(-1, 1, 1) * weight_KHWIO).sum(0, dtype=torch.float64) for time_K in time]
    return [(plane_36_9 @ row).float().view(36, channels, out_channels) for row in rows]


def _source(frames_THWC: Tensor, gain_C: Tensor | None) -> Source:
    if gain_C is None:
        return Source(frames_THWC, None, None)
    norms = [torch.linalg.vector_norm(frame.float(), dim=-1, keepdim=True) for frame in frames_THWC]
    return Source(frames_THWC, gain_C, torch.stack(norms).clamp_min_(EPSILON))


def _blocks(hidden_BCTHW: Tensor, conv: Layer) -> Iterator[Block]:
    """Blocks that are about square, of as many values per frequency as there are channels: weights and values are
    then read from memory about as often, and what a block needs stays in the cache."""
    channels, frames, height, width = hidden_BCTHW.shape[1:]
    rows, columns = -(-height // 4), -(-width // 4)
    tiles = (
        max(16, int(TILES_PER_CHANNEL * max(channels, conv.weight.shape[0])) // (frames + 1)) * torch.get_num_threads()
    )
    down = min(rows, max(1, round(tiles**0.5)))
    across = min(columns, max(1, tiles // down))
    down = min(rows, max(1, tiles // across))
    for row in range(0, rows, down):
        for column in range(0, columns, across):
            yield Block(slice(row, min(row + down, rows)), slice(column, min(column + across, columns)), height, width)


def _convolve(sources: list[Source], block: Block, conv: Layer, out_THWC: Tensor) -> None:
    """Write the layer's output for one block of tiles."""
    taps = transformed_weight(conv)
    values_36TPC = _values(sources, block, blank=len(taps) > 1 and len(sources) == 1)
    rows, columns = block.shape
    frames, height, width, channels = out_THWC.shape
    tiles = out_THWC.view(frames, height // 4, 4, width // 4, 4, channels)[:, block.rows, :, block.columns]
    for wanted, sum_36NC in _products(values_36TPC, taps, lead=len(sources) == 1):
        if conv.bias is not None:
            sum_36NC[CONSTANT].add_(conv.bias)
        out_16N = OUTPUT_16_36 @ sum_36NC.view(36, -1)
        tiles[wanted].copy_(out_16N.view(4, 4, -1, rows, columns, channels).permute(2, 3, 0, 4, 1, 5))


def _values(sources: list[Source], block: Block, blank: bool) -> Tensor:
    """Transformed inputs (36, T, P, C) of all frames of the sources, after a frame of zeros if `blank`."""
    counts = [len(source.frames_THWC) for source in sources]
    (rows, columns), channels = block.shape, sources[0].frames_THWC.shape[3]
    square_THWC = torch.zeros(sum(counts), 4 * rows + 2, 4 * columns + 2, channels)
    for source, frames_THWC in zip(sources, torch.split(square_THWC[:, *block.inner], counts), strict=True):
        source.write(block, frames_THWC)
    stride_T, stride_H, stride_W, _ = square_THWC.stride()
    windows = square_THWC.as_strided((6, 6, sum(counts), rows, columns, channels),
                                     (stride_H, stride_W, stride_T, 4 * stride_H, 4 * stride_W, 1))  # fmt: skip
    values_36TPC = torch.empty(36, blank + sum(counts), rows * columns, channels)
    values_36TPC[:, :blank] = 0.0
    torch.mm(INPUT_36_36, windows.reshape(36, -1), out=values_36TPC[:, blank:].flatten(1))
    return values_36TPC


def _products(values_36TPC: Tensor, taps: list[Tensor], lead: bool) -> Iterator[tuple[slice, Tensor]]:
    """Yield which frames of the output, and their sums (36, frames * P, C_out).

    The values start with the two frames before the output's first; if `lead`, with one of zeros before its second.
    """
    if len(taps) == 1:
        yield slice(None), torch.bmm(values_36TPC.flatten(1, 2), taps[0])
        return
    if lead:
        yield slice(0, 1), torch.bmm(values_36TPC[:, 1], taps[3])
    pairs, full = (values_36TPC.shape[1] - 1) // 2, values_36TPC.shape[1] // 2 - 1  # a last pair may lack its second
    if pairs == 0:
        return
    even, odd = values_36TPC[:, ::2], values_36TPC[:, 1::2]
    zeroth, first, second, third = even[:, :-1], odd[:, :pairs], even[:, 1:], odd[:, 1:]
    plus = torch.bmm((first + second).flatten(1, 2), taps[1])
    minus = torch.bmm((second - first).flatten(1, 2), taps[2])
    size = full * values_36TPC.shape[2]
    later = plus[:, :size] - minus[:, :size]
    plus.add_(minus).baddbmm_((zeroth - second).flatten(1, 2), taps[0])
    yield slice(int(lead), None, 2), plus
    if full:
        yield slice(int(lead) + 1, None, 2), later.baddbmm_((third - first[:, :full]).flatten(1, 2), taps[3])
