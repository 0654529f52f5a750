"""Files as ComfyUI users have them, made from small models; their names are written out from Wan's own code."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.names import original_name, vae_renamer

RESIDUAL = ("residual.0.gamma", "residual.2.weight", "residual.2.bias", "residual.3.gamma", "residual.6.weight",
            "residual.6.bias")  # fmt: skip
ATTENTION = ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")


def residual(stem: str, moved: bool) -> Iterator[str]:
    """wan/modules/vae2_1.py ResidualBlock: a shortcut where the width changes."""
    yield from (f"{stem}.{name}" for name in (*RESIDUAL, *(("shortcut.weight", "shortcut.bias") if moved else ())))


def resample(stem: str, timed: bool) -> Iterator[str]:
    """wan/modules/vae2_1.py Resample."""
    names = ("resample.1.weight", "resample.1.bias", *(("time_conv.weight", "time_conv.bias") if timed else ()))
    yield from (f"{stem}.{name}" for name in names)


def middle_and_head(side: str) -> Iterator[str]:
    """What encoder and decoder share."""
    yield from (f"{side}.{name}" for name in ("conv1.weight", "conv1.bias", "head.0.gamma", "head.2.weight",
                                              "head.2.bias"))  # fmt: skip
    yield from (*residual(f"{side}.middle.0", False), *residual(f"{side}.middle.2", False))
    yield from (f"{side}.middle.1.{name}" for name in ATTENTION)


def vae_names(widths: list[int], blocks: int, timed: list[bool], nested: bool) -> Iterator[str]:
    """Every weight of WanVAE_ (vae2_1.py, or vae2_2.py when nested): `widths` of the levels, `timed` downsamplers."""
    yield from ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")
    yield from middle_and_head("encoder")
    yield from middle_and_head("decoder")
    yield from _side("encoder.downsamples", "downsamples", [widths[0], *widths], blocks, timed, nested)
    down = widths[::-1]
    before = [down[0], *(down[:-1] if nested else [width // 2 for width in down[:-1]])]  # vae2_1 halves in Resample
    yield from _side("decoder.upsamples", "upsamples", before, blocks + 1, timed[::-1], nested, down)


def _side(stem: str, inner: str, before: list[int], blocks: int, timed: list[bool], nested: bool,
          after: list[int] | None = None) -> Iterator[str]:  # fmt: skip
    place, after = 0, after or before[1:]
    for level, width in enumerate(after):
        start = 0 if nested else place
        prefix = f"{stem}.{level}.{inner}" if nested else stem
        for number in range(blocks):
            yield from residual(f"{prefix}.{start + number}", number == 0 and before[level] != width)
        if level < len(timed):
            yield from resample(f"{prefix}.{start + blocks}", timed[level])
        place += blocks + 1


def names_of_vae(vae: Any) -> list[str]:
    """Original names of an AutoencoderKLWan's weights, from its config."""
    config = vae.config
    widths = [config.base_dim * factor for factor in config.dim_mult]
    return list(vae_names(widths, config.num_res_blocks, list(config.temperal_downsample), config.is_residual))


def save_dit(path: Path, transformer: Any, prefix: str = "", dtype: torch.dtype | None = None) -> Path:
    """A DiT under original names."""
    save({prefix + original_name(name): part for name, part in transformer.state_dict().items()}, path, dtype)
    return path


def save_vae(path: Path, vae: Any) -> Path:
    """A VAE under original names."""
    names = names_of_vae(vae)
    rename, state = vae_renamer(set(names)), vae.state_dict()
    save({name: state[rename(name)] for name in names}, path)
    return path


def save_text(path: Path, encoder: Any, scaled: bool = False, spiece: bytes | None = None) -> Path:
    """A text encoder under transformers' names, as ComfyUI repackages it."""
    state = {name: part for name, part in encoder.state_dict().items() if name != "encoder.embed_tokens.weight"}
    named = fp8_scaled(state) if scaled else state
    extra = {} if spiece is None else {"spiece_model": torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}
    save(named | extra, path)
    return path


def fp8_scaled(state: Mapping[str, torch.Tensor], ends: tuple[str, str] = ("scale_weight", "scaled_fp8")
               ) -> dict[str, torch.Tensor]:  # fmt: skip
    """Matrices as e4m3 codes with one scale each, the rest as it is, and the mark of the older files."""
    scaled: dict[str, torch.Tensor] = {}
    for name, part in state.items():
        if part.ndim == 2 and name.endswith(".weight") and "bias" not in name:
            scale = part.abs().max() / 448
            scaled[name] = (part / scale).to(torch.float8_e4m3fn)
            scaled[f"{name.removesuffix('weight')}{ends[0]}"] = scale.float()
        else:
            scaled[name] = part
    return scaled | {ends[1]: torch.zeros(2, dtype=torch.float8_e4m3fn)}


def save(tensors: Mapping[str, torch.Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """One file; tensors of their own memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: part.detach().to(dtype or part.dtype).clone().contiguous() for name, part in tensors.items()}
    save_file(plain, path, {"format": "pt"})
