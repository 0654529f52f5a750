"""Wan's VAE without its chunk loop: frames to latents and back, exact and differentiable.

Input: a diffusers `AutoencoderKLWan` of either kind (Wan 2.1, or Wan 2.2 with residual blocks and patches) and pixels
in [-1, 1]. Output: posterior moments, normalised latents, or pixels. No weights live here: the functions walk the
modules of the model they are given.

`AutoencoderKLWan.encode` feeds one frame, then four at a time, and keeps the last frames of every convolution for the
next chunk. Five identities make one pass over all frames, or passes of any length, equal to that loop
(diffusers 0.42.1, models/autoencoders/autoencoder_kl_wan.py):
1. A causal convolution fed in chunks with a two-frame history is one causal convolution over all frames.
2. Temporal downsampling keeps frame 0 and convolves all frames with kernel 3, stride 2 and no padding.
3. `AvgDown3D` pads in front, so its groups are the same for one frame alone and for the whole clip.
4. Temporal upsampling passes frame 0 by, and its convolution starts at frame 1 with a history of zeros.
5. `DupUp3D` duplicates every frame; the first chunk's rule drops the first `factor_t - 1` frames of the clip.

Cost: one pass needs about 2 * base_dim * T * H * W values for its widest layer; `chunk` bounds T.
Precision: the dtype of the weights; norms are computed in float32 for half-precision inputs, as stock does.

Names: B batch, C channels, T H W pixel frames and sides, t h w latent frames and sides, N frames of a whole batch.
Inside the network C and T H W are those of the layer at hand. z is the number of latent channels; moments have 2z.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn

from encode import winograd

FRAMES_PER_LATENT = 4  # temporal stride of every Wan VAE; the first latent frame holds one pixel frame

# winograd: encode/winograd.py for the layers that gain by it, one conv2d per tap for the others
ConvKind = Literal["conv3d", "winograd"]
HALF = (torch.float16, torch.bfloat16)
NORM_VALUES = 2**17  # normalised at once
Layer = Any  # a module of the VAE; diffusers types none of their attributes


@dataclass
class Trip:
    """What one clip's passes share: how to convolve, and the frames each causal layer saw last."""

    kind: ConvKind = "conv3d"
    streaming: bool = False  # False: a single pass, so no history is kept
    first: bool = True  # this pass holds frame 0 of the clip
    history: dict[nn.Module, Tensor] = field(default_factory=dict)

    def recall(self, layer: nn.Module, frames_BCTHW: Tensor, depth: int) -> Tensor | None:
        """The `depth` frames before these, None at the layer's start; remembers the last ones for the next pass."""
        past = self.history.get(layer)
        if self.streaming and frames_BCTHW.shape[2]:
            last = frames_BCTHW[:, :, -depth:]
            known = last if last.shape[2] == depth else _after(past, last, depth)[:, :, -depth:]
            self.history[layer] = known.clone()
        return past


def encode_moments(
    vae: AutoencoderKLWan, video_BCTHW: Tensor, chunk: int | None = None, kind: ConvKind = "conv3d"
) -> Tensor:
    """Posterior mean and log variance (B, 2z, t, h, w) of pixels in [-1, 1].

    `chunk` is the number of latent frames per pass, not counting the clip's first one, which holds one pixel frame
    only; None: the whole clip. Frames beyond 4n+1 are ignored, as in stock.
    """
    latent_frames = 1 + (video_BCTHW.shape[2] - 1) // FRAMES_PER_LATENT
    if vae.config.patch_size is not None:
        video_BCTHW = patchify(video_BCTHW, vae.config.patch_size)
    video_BCTHW = video_BCTHW.contiguous(memory_format=torch.channels_last_3d)
    trip = Trip(kind, streaming=chunk is not None and chunk + 1 < latent_frames)
    parts = []
    for start, stop in _spans(latent_frames, chunk):
        frames = slice(_pixel_frames(start), _pixel_frames(stop))
        trip.first = start == 0
        parts.append(_encoder(vae.encoder, video_BCTHW[:, :, frames], trip))
    return _pointwise(torch.cat(parts, 2), vae.quant_conv)


def encode_mode(
    vae: AutoencoderKLWan, video_BCTHW: Tensor, chunk: int | None = None, kind: ConvKind = "conv3d"
) -> Tensor:
    """Normalised posterior mode (B, z, t, h, w): what Wan is trained on."""
    mean_BCthw = encode_moments(vae, video_BCTHW, chunk, kind).chunk(2, dim=1)[0]
    return normalise(vae, mean_BCthw)


def decode(
    vae: AutoencoderKLWan,
    latent_BCthw: Tensor,
    chunk: int | None = None,
    *,
    clamp: bool = True,
    kind: ConvKind = "conv3d",
) -> Tensor:
    """Pixels (B, 3, T, H, W) of normalised latents, clamped to [-1, 1] unless `clamp` is off (for training)."""
    hidden = _pointwise(denormalise(vae, latent_BCthw), vae.post_quant_conv)
    hidden = hidden.contiguous(memory_format=torch.channels_last_3d)
    trip = Trip(kind, streaming=chunk is not None and chunk + 1 < hidden.shape[2])
    parts = []
    for start, stop in _spans(hidden.shape[2], chunk):
        trip.first = start == 0
        parts.append(_decoder(vae.decoder, hidden[:, :, start:stop], trip))
    video_BCTHW = torch.cat(parts, 2)
    if vae.config.patch_size is not None:
        video_BCTHW = unpatchify(video_BCTHW, vae.config.patch_size)
    return video_BCTHW.clamp(-1, 1) if clamp else video_BCTHW


def normalise(vae: AutoencoderKLWan, mean_BCthw: Tensor) -> Tensor:
    """(z - mean) / std per channel, with the model's own statistics."""
    mean, std = _statistics(vae, mean_BCthw)
    return (mean_BCthw - mean) / std


def denormalise(vae: AutoencoderKLWan, latent_BCthw: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    mean, std = _statistics(vae, latent_BCthw)
    return latent_BCthw * std + mean


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    config = vae.config
    mean, std = (like.new_tensor(row).view(1, -1, 1, 1, 1) for row in (config.latents_mean, config.latents_std))
    return mean, std


def _spans(latent_frames: int, chunk: int | None) -> Iterator[tuple[int, int]]:
    """The first pass takes one more: the clip's first latent frame stands for one pixel frame, not four."""
    start, stop = 0, latent_frames if chunk is None else min(chunk + 1, latent_frames)
    while start < latent_frames:
        yield start, stop
        start, stop = stop, min(stop + (chunk or latent_frames), latent_frames)


def _pixel_frames(latent_frames: int) -> int:
    """Pixel frames held by that many leading latent frames: 0, 1, 5, 9, ..."""
    return max(0, 1 + FRAMES_PER_LATENT * (latent_frames - 1))


def _encoder(encoder: Layer, hidden: Tensor, trip: Trip) -> Tensor:
    hidden = _middle(_walk(encoder.down_blocks, _causal_conv(hidden, encoder.conv_in, trip), trip), encoder, trip)
    return _norm_silu_conv(hidden, encoder.norm_out, encoder.conv_out, trip)


def _decoder(decoder: Layer, hidden: Tensor, trip: Trip) -> Tensor:
    hidden = _walk(decoder.up_blocks, _middle(_causal_conv(hidden, decoder.conv_in, trip), decoder, trip), trip)
    return _norm_silu_conv(hidden, decoder.norm_out, decoder.conv_out, trip)


def _walk(layers: Iterable[Layer], hidden: Tensor, trip: Trip) -> Tensor:
    """Each layer in turn. The list hands a layer the only reference to its input, which ends with its last use."""
    held = [hidden]
    del hidden
    for layer in layers:
        held.append(_WALKERS[type(layer)](held.pop(), layer, trip))
    return held.pop()


def _middle(hidden: Tensor, coder: Layer, trip: Trip) -> Tensor:
    block = coder.mid_block
    hidden = _residual(hidden, block.resnets[0], trip)
    for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
        hidden = _residual(_attention(hidden, attention, trip), residual, trip)
    return hidden


def _residual(hidden: Tensor, block: Layer, trip: Trip) -> Tensor:
    """Norm, SiLU, convolution, twice, plus a shortcut. Dropout is left out: no Wan VAE has any."""
    shortcut = hidden if isinstance(block.conv_shortcut, nn.Identity) else _pointwise(hidden, block.conv_shortcut)
    hidden = _norm_silu_conv(hidden, block.norm1, block.conv1, trip)
    hidden = _norm_silu_conv(hidden, block.norm2, block.conv2, trip)
    return hidden + shortcut if torch.is_grad_enabled() else hidden.add_(shortcut)


def _residual_down(hidden: Tensor, block: Layer, trip: Trip) -> Tensor:
    shortcut: Tensor = block.avg_shortcut(hidden)  # identity 3: the stock module is right for any number of frames
    hidden = _walk(block.resnets, hidden, trip)
    if block.downsampler is not None:
        hidden = _resample(hidden, block.downsampler, trip)
    return hidden + shortcut


def _residual_up(hidden: Tensor, block: Layer, trip: Trip) -> Tensor:
    inputs = hidden
    hidden = _walk(block.resnets, hidden, trip)
    if block.upsampler is not None:
        hidden = _resample(hidden, block.upsampler, trip)
    if block.avg_shortcut is None:
        return hidden
    shortcut: Tensor = block.avg_shortcut(inputs, first_chunk=trip.first)  # identity 5
    return hidden + shortcut


def _up(hidden: Tensor, block: Layer, trip: Trip) -> Tensor:
    hidden = _walk(block.resnets, hidden, trip)
    return hidden if block.upsamplers is None else _walk(block.upsamplers, hidden, trip)


def _resample(hidden: Tensor, layer: Layer, trip: Trip) -> Tensor:
    """Halve or double the sides, and, in the 3d modes, the frames after the clip's first one."""
    if layer.mode == "upsample3d":
        hidden = _double_frames(hidden, layer.time_conv, trip)
    conv2d = layer.resample[1]
    if layer.mode.startswith("up"):
        return _double_sides(hidden, conv2d, trip)
    frames_NCHW = F.conv2d(F.pad(_frames(hidden), (0, 1, 0, 1)), conv2d.weight, conv2d.bias, stride=2)
    halved = _clips(frames_NCHW, hidden.shape[0])
    return _halve_frames(halved, layer.time_conv, trip) if layer.mode == "downsample3d" else halved


def _double_sides(hidden: Tensor, conv2d: Layer, trip: Trip) -> Tensor:
    frames_NCHW = F.interpolate(_frames(hidden), scale_factor=2.0, mode="nearest-exact")
    doubled = _clips(frames_NCHW, hidden.shape[0])
    if trip.kind == "winograd" and winograd.fits(doubled, conv2d):
        return winograd.causal_conv(doubled, None, conv2d)
    return _clips(F.conv2d(frames_NCHW, conv2d.weight, conv2d.bias, padding=1), hidden.shape[0])


def _halve_frames(hidden: Tensor, conv: Layer, trip: Trip) -> Tensor:
    """Identity 2: (B, C, 1 + 2n, H, W) to 1 + n frames at the clip's start, 2n to n frames later."""
    past = trip.recall(conv, hidden, 1)
    if past is not None:
        return _time_conv(torch.cat([past, hidden], 2), conv, 2)
    if hidden.shape[2] == 1:
        return hidden
    return torch.cat([hidden[:, :, :1], _time_conv(hidden, conv, 2)], 2)


def _double_frames(hidden: Tensor, conv: Layer, trip: Trip) -> Tensor:
    """Identity 4: (B, C, 1 + n, H, W) to 1 + 2n frames at the clip's start, n to 2n frames later."""
    skipped = 1 if trip.first else 0
    head, tail = hidden[:, :, :skipped], hidden[:, :, skipped:]
    if tail.shape[2] == 0:
        return head
    first, second = _time_conv(_after(trip.recall(conv, tail, 2), tail, 2), conv, 1).chunk(2, dim=1)
    doubled = torch.stack([first, second], dim=3).flatten(2, 3)  # the two halves take turns in time
    return torch.cat([head, doubled], 2) if skipped else doubled


def _attention(hidden: Tensor, block: Layer, trip: Trip) -> Tensor:
    """One head of self-attention inside each frame."""
    frames_NCHW = _norm(_frames(hidden), block.norm)
    tokens = frames_NCHW.flatten(2).transpose(1, 2)
    qkv = F.linear(tokens, block.to_qkv.weight.flatten(1), block.to_qkv.bias)
    query, key, value = qkv.unsqueeze(1).chunk(3, dim=-1)
    tokens = F.scaled_dot_product_attention(query, key, value).squeeze(1)
    tokens = F.linear(tokens, block.proj.weight.flatten(1), block.proj.bias)
    frames_NCHW = tokens.transpose(1, 2).reshape(frames_NCHW.shape)
    return hidden + _clips(frames_NCHW, hidden.shape[0])


def _time_conv(hidden: Tensor, conv: Layer, stride: int) -> Tensor:
    """Three taps in time and one pixel in the plane, without padding: a matrix product over three frames' channels."""
    frames_BTHWC = hidden.permute(0, 2, 3, 4, 1)
    count = (hidden.shape[2] - 3) // stride + 1
    taps = [frames_BTHWC[:, tap : tap + (count - 1) * stride + 1 : stride] for tap in range(3)]
    weight = conv.weight.flatten(2).transpose(1, 2).flatten(1)
    return F.linear(torch.cat(taps, -1), weight, conv.bias).permute(0, 4, 1, 2, 3)


def _norm_silu_conv(hidden: Tensor, norm: WanRMS_norm, conv: Layer, trip: Trip) -> Tensor:
    if trip.kind == "winograd" and winograd.fits(hidden, conv):
        return winograd.causal_conv(hidden, trip.recall(conv, hidden, 2), conv, _gain(norm))
    return _causal_conv(_norm_silu(hidden, norm), conv, trip)


def _causal_conv(hidden: Tensor, conv: Layer, trip: Trip) -> Tensor:
    """Identity 1: same-size convolution that looks back only; before the clip's start there are zeros."""
    past = trip.recall(conv, hidden, 2)
    if trip.kind == "winograd" and winograd.fits(hidden, conv):
        return winograd.causal_conv(hidden, past, conv)
    if trip.kind == "winograd":
        return _plane_convs(hidden, past, conv)
    if past is None and hidden.shape[2] == 1:  # an image: only the last tap meets data, a third of the work
        return F.conv3d(hidden, conv.weight[:, :, -1:], conv.bias, padding=(0, 1, 1))
    return F.conv3d(_after(past, hidden, 2), conv.weight, conv.bias, padding=(0, 1, 1))


def _plane_convs(hidden: Tensor, past: Tensor | None, conv: Layer) -> Tensor:
    """The causal convolution as one convolution in the plane per tap: no padded copy, and none for frames of zeros."""
    batch, count, taps = hidden.shape[0], hidden.shape[2], conv.weight.unbind(2)
    out = _clips(F.conv2d(_frames(hidden), taps[2], conv.bias, padding=1), batch)
    for lag, tap in ((1, taps[1]), (2, taps[0])):
        if count > lag:
            out[:, :, lag:] += _clips(F.conv2d(_frames(hidden[:, :, :-lag]), tap, padding=1), batch)
        if past is not None:
            before = past[:, :, 2 - lag : 2 - lag + count]
            out[:, :, : min(lag, count)] += _clips(F.conv2d(_frames(before), tap, padding=1), batch)
    return out


def _after(past: Tensor | None, hidden: Tensor, depth: int) -> Tensor:
    """The frames behind their `depth` predecessors, zeros at the clip's start."""
    if past is None:
        past = torch.zeros_like(hidden[:, :, :1]).expand(-1, -1, depth, -1, -1)
    return torch.cat([past, hidden], 2).contiguous(memory_format=torch.channels_last_3d)


def _pointwise(hidden: Tensor, conv: Layer) -> Tensor:
    return F.linear(hidden.permute(0, 2, 3, 4, 1), conv.weight.flatten(1), conv.bias).permute(0, 4, 1, 2, 3)


def _norm(hidden: Tensor, norm: WanRMS_norm, silu: bool = False) -> Tensor:
    """`WanRMS_norm` over channels with its constant scale folded into gamma; Wan's norms have no bias.

    On a CPU block by block: what the steps leave in between stays in the cache and takes no memory.
    """
    gain_C = _gain(norm)
    rows_NC = hidden.movedim(1, -1)
    if torch.is_grad_enabled() or hidden.device.type != "cpu":
        return _normed(rows_NC, gain_C, silu).movedim(-1, 1)
    rows_NC = rows_NC.reshape(-1, hidden.shape[1])
    out_NC = torch.empty_like(rows_NC)
    step = max(1, NORM_VALUES // hidden.shape[1]) * torch.get_num_threads()
    for rows, out in zip(torch.split(rows_NC, step), torch.split(out_NC, step), strict=True):
        out.copy_(_normed(rows, gain_C, silu))
    return out_NC.view(*hidden.shape[:1], *hidden.shape[2:], -1).movedim(-1, 1)


def _gain(norm: WanRMS_norm) -> Tensor:
    """In float32 for half-precision weights, or else in the weights' own precision."""
    gamma = norm.gamma.flatten()
    gain_C: Tensor = (gamma.float() if gamma.dtype in HALF else gamma) * norm.scale
    return gain_C


def _normed(rows_NC: Tensor, gain_C: Tensor, silu: bool) -> Tensor:
    wide = rows_NC.float() if rows_NC.dtype in HALF else rows_NC
    inverse = wide.square().sum(-1, keepdim=True).clamp_min_(1e-24).rsqrt_()  # F.normalize's eps 1e-12, squared
    normed = wide * inverse * gain_C
    return (F.silu(normed, inplace=not torch.is_grad_enabled()) if silu else normed).to(rows_NC.dtype)


def _norm_silu(hidden: Tensor, norm: WanRMS_norm) -> Tensor:
    return _norm(hidden, norm, silu=True)


def _frames(hidden: Tensor) -> Tensor:
    """(B, C, T, H, W) to (N, C, H, W) with N = B * T."""
    return hidden.transpose(1, 2).flatten(0, 1)


def _clips(frames_NCHW: Tensor, batch: int) -> Tensor:
    """The inverse of `_frames`."""
    return frames_NCHW.reshape(batch, -1, *frames_NCHW.shape[1:]).transpose(1, 2)


_WALKERS = {
    WanResidualBlock: _residual,
    WanAttentionBlock: _attention,
    WanResample: _resample,
    WanResidualDownBlock: _residual_down,
    WanResidualUpBlock: _residual_up,
    WanUpBlock: _up,
}
