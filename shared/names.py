"""Names of weights in Wan's own code and in diffusers. Input: a name, without prefix. Output: the other's name.

Written from the module structure of Wan-Video/Wan2.2 (`wan/modules/model.py`, `vae2_1.py`, `vae2_2.py`) and diffusers
(`transformer_wan.py`, `autoencoder_kl_wan.py`). UMT5 has transformers' names in ComfyUI's files and those of
`wan/modules/t5.py` in others.
"""

import re
from collections.abc import Callable, Iterable

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of whole checkpoints, in ComfyUI's files
Rename = Callable[[str], str]

# diffusers -> original, in order; each name is bounded by dots
DIT_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "o"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),  # the one with weights
    ("scale_shift_table", "modulation"),
)
HEAD_TABLE = ("scale_shift_table", "head.modulation")  # the one table outside the blocks
# original -> diffusers, in the middle and inside residual blocks of the VAE
VAE_INNER = (
    ("middle.0", "mid_block.resnets.0"),
    ("middle.1", "mid_block.attentions.0"),
    ("middle.2", "mid_block.resnets.1"),
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)
VAE_PARTS = (
    ("encoder.conv1", "encoder.conv_in"),
    ("decoder.conv1", "decoder.conv_in"),
    ("conv1", "quant_conv"),
    ("conv2", "post_quant_conv"),
    ("encoder.head.0", "encoder.norm_out"),
    ("encoder.head.2", "encoder.conv_out"),
    ("decoder.head.0", "decoder.norm_out"),
    ("decoder.head.2", "decoder.conv_out"),
)


# original -> transformers, inside a block of UMT5
TEXT_PARTS = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
    **{f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"},
}
TEXT_ENDS = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}


def text_name(name: str) -> str:
    """Name in transformers of a weight of UMT5, given its original one; a name of transformers stays as it is."""
    if found := re.fullmatch(r"blocks\.(\d+)\.(.*)\.(\w+)", name):
        number, part, last = found.groups()
        return f"encoder.block.{number}.{TEXT_PARTS.get(part, part)}.{last}"
    return TEXT_ENDS.get(name, name)


def replace_parts(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace dotted parts, one pair after the other, wherever they stand between dots or at an end."""
    for old, new in pairs:
        name = f".{name}.".replace(f".{old}.", f".{new}.").strip(".")
    return name


def without_prefix(name: str) -> str:
    """The name inside the checkpoint."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def original_name(name: str) -> str:
    """Name in Wan's own code of a module or tensor of the DiT, given its diffusers name."""
    ours, theirs = HEAD_TABLE
    return theirs if name == ours else replace_parts(name, DIT_NAMES)


def diffusers_name(name: str) -> str:
    """Diffusers name of a module or tensor of the DiT, given its original one; a diffusers name stays as it is."""
    ours, theirs = HEAD_TABLE
    return ours if name == theirs else replace_parts(name, ((new, old) for old, new in DIT_NAMES))


def vae_renamer(names: set[str]) -> Rename:
    """From original to diffusers names of the VAE whose original names are given: both layouts, any depth."""
    nested = any(name.startswith("encoder.downsamples.0.downsamples.") for name in names)
    if nested:
        return _nested_vae_name
    resampled = re.compile(r"decoder\.upsamples\.(\d+)\.resample\.")
    first = min((int(found[1]) for name in names if (found := resampled.match(name))), default=3)
    return lambda name: _flat_vae_name(name, first + 1)


def _flat_vae_name(name: str, per_level: int) -> str:
    """Wan 2.1: the decoder's blocks in one row, each level (resnets, then an upsampler) `per_level` long."""
    if found := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name):
        level, place = divmod(int(found[1]), per_level)
        part = "upsamplers.0" if re.match(r"resample|time_conv", found[2]) else f"resnets.{place}"
        name = f"decoder.up_blocks.{level}.{part}.{found[2]}"
    return _vae_part_name(name.replace("encoder.downsamples.", "encoder.down_blocks."))


def _nested_vae_name(name: str) -> str:
    """Wan 2.2: every level is a row of its own, its resampler last."""
    if found := re.match(r"(en|de)coder\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.*)", name):
        side, way, level, place, rest = found.groups()
        part = f"{way}sampler" if re.match(r"resample|time_conv", rest) else f"resnets.{place}"
        name = f"{side}coder.{way}_blocks.{level}.{part}.{rest}"
    return _vae_part_name(name)


def _vae_part_name(name: str) -> str:
    """What both layouts share: ends, middle, residual blocks."""
    for theirs, ours in VAE_PARTS:
        if name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return replace_parts(name, VAE_INNER)
