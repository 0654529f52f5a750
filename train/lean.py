"""The forward pass of Wan's DiT without what training does not need, exact to rounding.

Input: a diffusers `WanTransformer3DModel` (t2v, i2v with 36 input channels, or ti2v with per-token timesteps), with or
without a peft adapter; noisy latents, timesteps, projected text. Output: the velocity. No weights live here, and every
gradient is that of the stock model.

What is saved, each by algebra (diffusers 0.42.1, models/transformers/transformer_wan.py):
- Wan attends to all 512 text rows without a mask. The zero rows all become the same key and value, so n of them equal
  one row whose attention scores are raised by log(n). Cutting them off instead would change the output. (Only adapter
  dropout tells them apart: it then draws one mask for the padding instead of n.)
- The text projection is applied once per caption, while it is frozen.
- Timesteps: the few distinct ones are embedded, and tokens index them.
- LoRA layers that read one input (q, k, v) share one product with their stacked A matrices, and x keeps its dtype.
- Rotary tables are kept per shape, at half the width.
`LeanOptions` switches each off for comparison.

Precision: as stock. Norms, modulation and residual sums are float32 for half-precision inputs; timesteps are float32 or
wider always; parts kept in float32 by the model stay there.

Names: B batch, C channels, t h w latent frames and sides, N tokens, d hidden size, S text rows, K distinct timesteps,
H heads, D head size, f half of it, r rank.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.lora import linears
from train.norms import HALF, layer_norm, rms_norm, wide

TEXT_ROWS = 512  # what Wan pads a caption's embedding to, with zeros


class Text(NamedTuple):
    """A batch of projected captions."""

    rows_BSd: Tensor
    bias_B11S: Tensor | None  # added to attention scores; None: all rows count as one


class Modulation(NamedTuple):
    """The projected timesteps, and which of the K each token uses; None when K is 1."""

    time_BK6d: Tensor
    token_timestep_N: Tensor | None


class Rope(NamedTuple):
    """Rotary tables, and how many neighbouring tokens attend to each other: all of them, or one frame's."""

    turn_N1f2: Tensor  # cos and sin
    attention_span: int
    backend: str = "native"  # of self-attention, diffusers' name


BlockForward = Callable[[WanTransformerBlock, Tensor, Text, Modulation, Rope, bool], Tensor]


@dataclass(frozen=True)
class Places:
    """Where tokens sit when it is not the plain grid."""

    token_timestep_N: Tensor | None = None  # index into the K timesteps of each token, in (t, h, w) order
    frame_positions_t: Sequence[int] | None = None  # positions in time of the latent frames kept; None: 0, 1, 2, ...


@dataclass(frozen=True)
class LeanOptions:
    """How to compute; no choice changes the result."""

    fuse_qkv: bool = True  # False: call every linear and RMS norm as a module
    checkpoint_blocks: int = 0  # so many leading blocks keep their input only and are computed again in the backward
    temporal_attention: bool = True  # False: self-attention inside each latent frame only (this one does change it)
    attention: str = "native"  # backend of self-attention, by diffusers' name
    run_block: BlockForward | None = None  # replaces `block_forward`, for instance to stream or compile blocks


DEFAULT_PLACES, DEFAULT_OPTIONS = Places(), LeanOptions()


def project_text(transformer: WanTransformer3DModel, embedding_Sd: Tensor) -> Tensor:
    """Real rows of a text embedding to S + 1 projected rows, the last being that of the zero padding."""
    padded = torch.cat([embedding_Sd, embedding_Sd.new_zeros(1, embedding_Sd.shape[1])])
    projected: Tensor = transformer.condition_embedder.text_embedder(padded)
    return projected


def collate_text(rows: Sequence[Tensor], total: int = TEXT_ROWS, collapse: bool = True) -> Text:
    """Batch the results of `project_text`; with `collapse` off, all `total` rows are written out instead."""
    if not collapse:
        full = [torch.cat([row[:-1], row[-1:].expand(total + 1 - len(row), -1)]) for row in rows]
        return Text(torch.stack(full), None)
    first = rows[0]
    biases = [[0.0] * (len(row) - 1) + _padding_bias(total + 1 - len(row), first.dtype) for row in rows]
    longest = max(len(bias) for bias in biases)
    text_BSd = first.new_zeros(len(rows), longest, first.shape[1])
    bias_B11S = first.new_full((len(rows), 1, 1, longest), -math.inf)
    for index, (row, bias) in enumerate(zip(rows, biases, strict=True)):
        real = len(row) - 1
        text_BSd[index, :real] = row[:-1]
        text_BSd[index, real : len(bias)] = row[-1]
        bias_B11S[index, 0, 0, : len(bias)] = first.new_tensor(bias)
    return Text(text_BSd, bias_B11S)


def _padding_bias(count: int, dtype: torch.dtype) -> list[float]:
    """Score biases of few rows that weigh as much as `count` equal ones.

    Half precision rounds log(464) = 6.14 to 6.125, which is 1.5 % of the weight: there a second row makes up for it.
    """
    if count == 0:
        return []
    if dtype not in HALF:
        return [math.log(count)]
    main = torch.tensor(math.log(count)).to(dtype)
    if main.item() > math.log(count):
        main = torch.nextafter(main, main.new_zeros(()))
    rest = count - math.exp(main.item())
    return [main.item(), math.log(rest)] if rest > 0 else [main.item()]


def lean_forward(
    transformer: WanTransformer3DModel,
    latent_BCthw: Tensor,
    timestep_BK: Tensor,
    text: Text,
    places: Places = DEFAULT_PLACES,
    options: LeanOptions = DEFAULT_OPTIONS,
) -> Tensor:
    """Velocity (B, C_out, t, h, w) of noisy latents at timesteps (B,) or (B, K) in [0, 1000]."""
    if timestep_BK.dtype in HALF:
        raise TypeError(f"timestep is {timestep_BK.dtype}, which rounds 999 to 1000; pass it as float32")
    hidden_BNd = transformer.patch_embedding(latent_BCthw).flatten(2).transpose(1, 2).contiguous()
    embedded_BKd, modulation = _modulation(transformer, timestep_BK, text.rows_BSd.dtype, places.token_timestep_N)
    rope = _rope(transformer, latent_BCthw.shape[2:], places.frame_positions_t)
    rope = rope._replace(backend=options.attention)
    if not options.temporal_attention:
        rope = rope._replace(attention_span=hidden_BNd.shape[1] // latent_BCthw.shape[2])
    run = options.run_block or block_forward
    for index, block in enumerate(transformer.blocks):
        arguments = (block, hidden_BNd, text, modulation, rope, options.fuse_qkv)
        if index < options.checkpoint_blocks and torch.is_grad_enabled():
            hidden_BNd = checkpoint(run, *arguments, use_reentrant=False)
        else:
            hidden_BNd = run(*arguments)
    return _head(transformer, hidden_BNd, embedded_BKd, modulation.token_timestep_N, latent_BCthw.shape[2:])


def block_forward(
    block: WanTransformerBlock, hidden_BNd: Tensor, text: Text, modulation: Modulation, rope: Rope, fuse: bool = True
) -> Tensor:
    """One block: self-attention, cross-attention to the text, feed-forward; hidden states keep their dtype."""
    terms = _spread(block.scale_shift_table.unsqueeze(0) + wide(modulation.time_BK6d), modulation.token_timestep_N)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = terms
    normed = torch.addcmul(shift, layer_norm(hidden_BNd, block.norm1), 1 + scale).type_as(hidden_BNd)
    attended = _self_attention(block.attn1, normed, rope, fuse)
    hidden_BNd = torch.addcmul(wide(hidden_BNd), attended, gate).type_as(hidden_BNd)
    normed = layer_norm(hidden_BNd, block.norm2).type_as(hidden_BNd)
    hidden_BNd = hidden_BNd + _cross_attention(block.attn2, normed, text, fuse)
    normed = torch.addcmul(ffn_shift, layer_norm(hidden_BNd, block.norm3), 1 + ffn_scale).type_as(hidden_BNd)
    grown = F.gelu(linears(normed, [block.ffn.net[0].proj], fuse)[0], approximate="tanh")
    shrunk = linears(grown, [block.ffn.net[2]], fuse)[0]
    return torch.addcmul(wide(hidden_BNd), wide(shrunk), ffn_gate).type_as(hidden_BNd)


def _self_attention(attention: Any, hidden_BNd: Tensor, rope: Rope, fuse: bool) -> Tensor:
    query, key, value = linears(hidden_BNd, [attention.to_q, attention.to_k, attention.to_v], fuse)
    query = _rotate(_heads(rms_norm(query, attention.norm_q, fuse), attention.heads), rope)
    key = _rotate(_heads(rms_norm(key, attention.norm_k, fuse), attention.heads), rope)
    value = _heads(value, attention.heads)
    mixed = _attend(query, key, value, rope)
    return linears(mixed.reshape(hidden_BNd.shape[0], hidden_BNd.shape[1], -1), [attention.to_out[0]], fuse)[0]


def _attend(query: Tensor, key: Tensor, value: Tensor, rope: Rope) -> Tensor:
    """(B, N, H, D) three times to the mixed values, whose leading dimensions hold the same tokens in the same order."""
    if rope.backend != "native":
        parts = (part.reshape(-1, rope.attention_span, *part.shape[2:]) for part in (query, key, value))
        mixed: Tensor = dispatch_attention_fn(*parts, backend=AttentionBackendName(rope.backend))
        return mixed
    query, key, value = (_spans(part, rope.attention_span) for part in (query, key, value))
    if query.shape[1] == 1:  # one span: four dimensions reach the fast kernels
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
    return F.scaled_dot_product_attention(query, key, value).transpose(-3, -2)


def _spans(states_BNHD: Tensor, tokens: int) -> Tensor:
    """(B, N, H, D) to (B, spans, H, tokens, D)."""
    batch, _, heads, size = states_BNHD.shape
    return states_BNHD.view(batch, -1, tokens, heads, size).transpose(2, 3)


def _cross_attention(attention: Any, hidden_BNd: Tensor, text: Text, fuse: bool) -> Tensor:
    (query,) = linears(hidden_BNd, [attention.to_q], fuse)
    key, value = linears(text.rows_BSd, [attention.to_k, attention.to_v], fuse)
    parts = (rms_norm(query, attention.norm_q, fuse), rms_norm(key, attention.norm_k, fuse), value)
    query, key, value = (_heads(part, attention.heads).transpose(1, 2) for part in parts)
    bias = None if text.bias_B11S is None else text.bias_B11S.to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
    return linears(mixed, [attention.to_out[0]], fuse)[0]


def _heads(hidden_BNd: Tensor, heads: int) -> Tensor:
    return hidden_BNd.view(*hidden_BNd.shape[:2], heads, -1)


def _rotate(states_BNHD: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of neighbouring channels by its token's angle."""
    pairs = wide(states_BNHD).view(*states_BNHD.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # its kernels know no complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.turn_N1f2.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope.turn_N1f2))
    return turned.flatten(-2).type_as(states_BNHD)


def _modulation(
    transformer: WanTransformer3DModel, timestep_BK: Tensor, dtype: torch.dtype, token_timestep_N: Tensor | None
) -> tuple[Tensor, Modulation]:
    """Embedded timesteps (B, K, d), for the head, and their projection, for the blocks."""
    embedder = transformer.condition_embedder
    sinusoid = embedder.timesteps_proj(timestep_BK.flatten())
    embedded = embedder.time_embedder(sinusoid.to(embedder.time_embedder.linear_1.weight.dtype)).to(dtype)
    projected = embedder.time_proj(F.silu(embedded))
    batch = timestep_BK.shape[0]
    time_BK6d = projected.view(batch, -1, 6, embedded.shape[-1])
    return embedded.view(batch, -1, embedded.shape[-1]), Modulation(time_BK6d, token_timestep_N)


def _spread(terms_BKnd: Tensor, token_timestep_N: Tensor | None) -> list[Tensor]:
    """n terms per timestep to n tensors (B, 1, d), or (B, N, d) when tokens differ."""
    terms = terms_BKnd.unbind(2)
    return [term if token_timestep_N is None else term[:, token_timestep_N] for term in terms]


def _head(
    transformer: WanTransformer3DModel,
    hidden_BNd: Tensor,
    embedded_BKd: Tensor,
    token_timestep_N: Tensor | None,
    latent_shape: Sequence[int],
) -> Tensor:
    """Final norm, projection, and patches back to a grid."""
    terms = transformer.scale_shift_table.unsqueeze(0) + embedded_BKd.unsqueeze(2)
    shift, scale = _spread(terms, token_timestep_N)
    normed = torch.addcmul(shift, layer_norm(hidden_BNd, transformer.norm_out), 1 + scale).type_as(hidden_BNd)
    patch = transformer.config.patch_size
    grid = [side // step for side, step in zip(latent_shape, patch, strict=True)]
    tokens = transformer.proj_out(normed).view(hidden_BNd.shape[0], *grid, *patch, -1)
    velocity: Tensor = tokens.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return velocity


_ROPES: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Rope]] = weakref.WeakKeyDictionary()


def _rope(
    transformer: WanTransformer3DModel, latent_shape: Sequence[int], frame_positions_t: Sequence[int] | None
) -> Rope:
    """Rotary tables of a latent grid, kept per shape unless frames are picked."""
    rope, patch = transformer.rope, transformer.config.patch_size
    if any(side % step for side, step in zip(latent_shape, patch, strict=True)):
        raise ValueError(f"latent grid {tuple(latent_shape)} is not a multiple of the patch {tuple(patch)}")
    times, rows, columns = (range(side // step) for side, step in zip(latent_shape, patch, strict=True))
    if frame_positions_t is not None:
        return _build_rope(rope, [frame_positions_t, rows, columns])
    key = (*latent_shape, rope.freqs_cos.device, rope.freqs_cos.dtype)
    known = _ROPES.setdefault(rope, {})
    if key not in known:
        known[key] = _build_rope(rope, [times, rows, columns])
    return known[key]


def _build_rope(rope: Any, positions: Sequence[Sequence[int]]) -> Rope:
    """Rows of the model's tables at three axes' positions; cos of pair i is in column 2i, its sin in column 2i + 1."""
    sizes = [rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2]
    grid = [len(places) for places in positions]
    tables = []
    for table in (rope.freqs_cos[:, 0::2], rope.freqs_sin[:, 1::2]):
        axes = []
        for axis, (part, places) in enumerate(zip(table.split(sizes, dim=1), positions, strict=True)):
            rows = part[torch.tensor(list(places), device=part.device)]
            shape = [1, 1, 1, -1]
            shape[axis] = grid[axis]
            axes.append(rows.view(shape).expand(*grid, -1))
        tables.append(torch.cat(axes, dim=-1).flatten(0, 2).unsqueeze(1).contiguous())
    return Rope(torch.stack(tables, dim=-1), attention_span=len(tables[0]))
