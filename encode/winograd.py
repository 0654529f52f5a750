"""Winograd convolution for the causal 3x3x3 layers, on a CPU in float32: four times fewer multiplications in the plane.

F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308). Every frame is
transformed once; the temporal taps are added up in the transformed domain, so a frame costs one forward and one
backward transform whatever the number of taps. The same algebra as the layer, other rounding: a whole encode differs
by less than 5e-5 relative. In half precision the transforms would lose digits, so it is for float32 only.

Cost: transformed weights are four times the layer's and are kept for the life of the model.

Names: T H W frames and sides, C channels, P tiles of 4x4 pixels; 36 values stand for the 6x6 inputs of a tile.
"""

from weakref import WeakKeyDictionary

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
INPUT_36_36 = torch.kron(_INPUT, _INPUT).float()
OUTPUT_16_36 = torch.kron(_OUTPUT, _OUTPUT).float()
SLAB_BYTES = 6 * 2**20  # transformed values at once: they stay in the cache between transform and product
FEWEST_CHANNELS, FEWEST_PIXELS = 48, 64  # below, the transforms cost more than they save

_transformed: "WeakKeyDictionary[nn.Module, tuple[int, list[Tensor]]]" = WeakKeyDictionary()


def fits(hidden_BCTHW: Tensor, conv: Layer) -> bool:
    """Whether this layer is faster this way: float32 on a CPU, 3x3 in the plane, wide and large enough."""
    channels, _, height, width = hidden_BCTHW.shape[1:]
    plain = hidden_BCTHW.dtype == torch.float32 and hidden_BCTHW.device.type == "cpu" and not torch.is_grad_enabled()
    square = tuple(conv.weight.shape[-2:]) == (3, 3)
    return plain and square and channels >= FEWEST_CHANNELS and height * width >= FEWEST_PIXELS


def causal_conv(hidden_BCTHW: Tensor, past_BCTHW: Tensor | None, conv: Layer) -> Tensor:
    """The layer with zeros around each frame; before the frames come those of `past`, or zeros."""
    history = 0 if past_BCTHW is None else past_BCTHW.shape[2]
    if past_BCTHW is not None:
        hidden_BCTHW = torch.cat([past_BCTHW, hidden_BCTHW], 2)
    taps = transformed_weight(conv)
    clips = [convolve(clip_CTHW.permute(1, 2, 3, 0).contiguous(), taps, history) for clip_CTHW in hidden_BCTHW]
    out_BTHWC = torch.stack(clips)
    return (out_BTHWC if conv.bias is None else out_BTHWC.add_(conv.bias)).permute(0, 4, 1, 2, 3)


def transformed_weight(conv: Layer) -> list[Tensor]:
    """Per temporal tap, oldest first, the (36, C_in, C_out) weights of a layer; made once."""
    known = _transformed.get(conv)
    if known is None or known[0] != conv.weight._version:
        weight_OIKHW = conv.weight.detach().double()
        if weight_OIKHW.ndim == 4:
            weight_OIKHW = weight_OIKHW.unsqueeze(2)
        taps = torch.einsum("ah,bw,oikhw->kabio", _WEIGHT, _WEIGHT, weight_OIKHW).flatten(1, 2).float()
        known = _transformed[conv] = (conv.weight._version, [tap.contiguous() for tap in taps])
    return known[1]


def convolve(frames_THWC: Tensor, taps: list[Tensor], history: int) -> Tensor:
    """One clip, without bias; the first `history` frames only feed later ones. Returns (T - history, H, W, C_out)."""
    frames, height, width, channels = frames_THWC.shape
    rows, columns, out_channels = -(-height // 4), -(-width // 4), taps[0].shape[2]
    padded_THWC = F.pad(frames_THWC, (0, 0, 1, 4 * columns + 1 - width, 1, 4 * rows + 1 - height))
    out_THWC = frames_THWC.new_empty(frames - history, 4 * rows, 4 * columns, out_channels)
    tiles = out_THWC.view(frames - history, rows, 4, columns, 4, out_channels)
    step = SLAB_BYTES // (36 * frames * columns * max(channels, out_channels) * frames_THWC.element_size())
    step = max(1, min(rows, step))
    for row in range(0, rows, step):
        slab_THWC = padded_THWC[:, 4 * row : 4 * min(row + step, rows) + 2]
        tiles[:, row : row + step] = _slab(slab_THWC, taps, history, columns)
    return out_THWC[:, :height, :width]


def _slab(padded_THWC: Tensor, taps: list[Tensor], history: int, columns: int) -> Tensor:
    """Some rows of tiles: (T, rows, 4, columns, 4, C_out)."""
    frames, height, _, channels = padded_THWC.shape
    rows, wanted, out_channels = height // 4, frames - history, taps[0].shape[2]
    stride_T, stride_H, stride_W, _ = padded_THWC.stride()
    windows = padded_THWC.as_strided((6, 6, frames, rows, columns, channels),
                                     (stride_H, stride_W, stride_T, 4 * stride_H, 4 * stride_W, 1),
                                     padded_THWC.storage_offset())  # fmt: skip
    input_36TPC = (INPUT_36_36 @ windows.reshape(36, -1)).view(36, frames, rows * columns, channels)
    sum_36TPC = torch.bmm(input_36TPC[:, history:].flatten(1, 2), taps[-1]).view(36, wanted, -1, out_channels)
    for lag in range(1, len(taps)):
        first = max(history - lag, 0)
        count = frames - lag - first  # source frames first .. first + count feed the last `count` outputs
        if count > 0:
            source = input_36TPC[:, first : first + count].flatten(1, 2)
            sum_36TPC[:, wanted - count :].flatten(1, 2).baddbmm_(source, taps[-1 - lag])
    out: Tensor = (OUTPUT_16_36 @ sum_36TPC.reshape(36, -1)).view(4, 4, wanted, rows, columns, out_channels)
    return out.permute(2, 3, 0, 4, 1, 5)
