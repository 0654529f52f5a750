"""Facts per Wan model, one table. Input: a base_model_name. Output: its ModelSpec; no weights are read.

Sources: sizes, boundary, shift, guidance and fps from Wan-Video/Wan2.2 `wan/configs/wan_*.py` and Wan2.1 likewise;
diffusers layout from huggingface/diffusers `scripts/convert_wan_to_diffusers.py`.
"""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from shared.errors import ModelError
from shared.fetch import HUB_ID, snapshot
from shared.keys import fingerprint
from shared.single_file import dit_files, dit_folder, is_file_name

Expert = Literal["high_noise", "low_noise"]
ImageCondition = Literal["none", "first_frame", "concat"]
TINY_FOLDER = Path(__file__).parent / "tiny"
TEXT_LENGTH = 512  # tokens the DiT attends to; shorter captions are zero-padded (diffusers pipeline_wan.py)

# Wan2.1 values: defaults of diffusers AutoencoderKLWan; Wan2.2: vae22_diffusers_config of the converter named above
MEAN_21 = """-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508
    0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 -0.2921"""
STD_21 = (
    "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160"
)
MEAN_22 = """-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098
    0.0375 -0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567 -0.0729
    0.0899 -0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944
    0.3573 -0.0548 -0.1681 -0.0667"""
STD_22 = """0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454
    0.4978 0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866
    0.4093 0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468
    0.7744"""


@dataclass(frozen=True)
class VaeKind:
    """What a latent means: channels, strides (T, H, W) and the statistics it was normalised with, per channel."""

    channels: int
    stride_THW: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def fingerprint(self) -> str:
        """Equal for two VAEs whose latents can be told apart by none of these facts."""
        return fingerprint(channels=self.channels, stride=self.stride_THW, mean=self.mean, std=self.std)


def _numbers(values: str | Iterable[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in (values.split() if isinstance(values, str) else values))


WAN21_VAE = VaeKind(16, (4, 8, 8), _numbers(MEAN_21), _numbers(STD_21))
WAN22_VAE = VaeKind(48, (4, 16, 16), _numbers(MEAN_22), _numbers(STD_22))
VAE_KINDS = {kind.channels: kind for kind in (WAN21_VAE, WAN22_VAE)}


@dataclass(frozen=True)
class ModelSpec:
    """Facts of a model that a user cannot edit. Shifts are k in s' = k s / (1 + (k - 1) s)."""

    name: str
    repo: str  # Hub id or local folder in diffusers layout
    vae: VaeKind
    fps: float
    heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    text_dim: int = 4096
    boundary: float | None = None  # sigma at and above which the high-noise expert works
    image_condition: ImageCondition = "none"
    # modelscope/DiffSynth-Studio trains every Wan on the schedule of shift 5 (diffsynth/diffusion/flow_match.py)
    train_shift: float = 5.0
    sample_shift: float = 5.0
    sample_steps: int = 50
    guidance: tuple[float, float] = (5.0, 5.0)  # (high, low)
    expert_folders: tuple[tuple[str, str], ...] = (("single", "transformer"),)
    patch_THW: tuple[int, int, int] = (1, 2, 2)
    # where other parts are, when not in repo: Hub ids or folders; `near`: the DiT file beside which they are looked for
    vae_repo: str = ""
    text_repo: str = ""
    near: str = ""

    @property
    def source(self) -> str:
        """What the user knows the DiT by."""
        return self.near or self.repo

    @property
    def grid(self) -> int:
        """Pixels that height and width are multiples of: VAE stride x patch size."""
        return self.vae.stride_THW[1] * self.patch_THW[1]

    @property
    def dim(self) -> int:
        """Width of the DiT's hidden state."""
        return self.heads * self.head_dim

    @property
    def experts(self) -> tuple[str, ...]:
        """('high_noise', 'low_noise') of a two-expert model, else ('single',)."""
        return tuple(name for name, _ in self.expert_folders)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a sample; num_frames is 4n+1."""
        stride_T, stride_H, stride_W = self.vae.stride_THW
        return self.vae.channels, (num_frames - 1) // stride_T + 1, height // stride_H, width // stride_W


_PAIR = (("high_noise", "transformer"), ("low_noise", "transformer_2"))
_A14B: dict[str, Any] = {
    "vae": WAN21_VAE,
    "fps": 16,
    "heads": 40,
    "head_dim": 128,
    "ffn_dim": 13824,
    "num_layers": 40,
    "sample_steps": 40,
    "expert_folders": _PAIR,
}
_SPECS = (
    ModelSpec(
        "ti2v-5b",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        WAN22_VAE,
        fps=24,
        heads=24,
        head_dim=128,
        ffn_dim=14336,
        num_layers=30,
        in_channels=48,
        image_condition="first_frame",
    ),
    ModelSpec(
        "t2v-a14b",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        in_channels=16,
        boundary=0.875,
        sample_shift=12,
        guidance=(4.0, 3.0),
        **_A14B,
    ),
    ModelSpec(
        "i2v-a14b",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        in_channels=36,
        boundary=0.9,
        image_condition="concat",
        guidance=(3.5, 3.5),
        **_A14B,
    ),
    ModelSpec(
        "t2v-1.3b",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        WAN21_VAE,
        fps=16,
        heads=12,
        head_dim=128,
        ffn_dim=8960,
        num_layers=30,
        in_channels=16,
    ),
    ModelSpec(
        "t2v-14b",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        WAN21_VAE,
        fps=16,
        heads=40,
        head_dim=128,
        ffn_dim=13824,
        num_layers=40,
        in_channels=16,
    ),
)
SPECS = {spec.name: spec for spec in _SPECS}
ALIASES = {"wan-ai/wan_2_2": "ti2v-5b"} | {spec.repo.lower(): spec.name for spec in _SPECS}
TINY_NAMES = ("tiny", "tiny-a14b", "tiny-i2v", "tiny-ti2v")


def expert_end(expert: str) -> str:
    """What the names of an expert's files end in: '_high_noise', or nothing where there is one expert."""
    return "" if expert == "single" else f"_{expert}"


def model_spec(base_model_name: str) -> ModelSpec:
    """Spec of a short name, a Hub id or a local folder in diffusers layout, or DiT files ('high.safetensors,low...').

    Raises ModelError for anything else, and for Wan variants that cannot be trained here.
    """
    if is_file_name(base_model_name):
        files = dit_files(base_model_name)
        return _spec_of_files(files, tuple(path.stat().st_mtime_ns for path in files))
    short = ALIASES.get(base_model_name.lower(), base_model_name.lower())
    if short in SPECS:
        return SPECS[short]
    if short in TINY_NAMES:
        from shared.tiny_variants import tiny_spec

        return tiny_spec(short)
    folder = Path(base_model_name).expanduser()
    if (folder / "transformer" / "config.json").is_file():
        return spec_of_folder(folder)
    if re.fullmatch(HUB_ID, base_model_name) and not folder.exists():
        return _spec_of_hub(base_model_name)
    names = (*SPECS, *TINY_NAMES)
    near = difflib.get_close_matches(base_model_name.lower(), names, n=1)
    hint = f"did you mean {near[0]}?" if near else "give one of them, or a folder in diffusers layout"
    raise ModelError(f"base_model_name {base_model_name!r} is none of {', '.join(names)}, nor a folder; {hint}")


@lru_cache(maxsize=4)
def _spec_of_files(files: tuple[Path, ...], changed: tuple[int, ...]) -> ModelSpec:
    """Spec of DiT files; `changed`: when, as part of the cache's key."""
    del changed
    spec = spec_of_folder(dit_folder(files))
    return replace(spec, near=str(files[0]), name=spec.name if spec.name in SPECS else files[0].stem)


@lru_cache(maxsize=4)
def _spec_of_hub(repo: str) -> ModelSpec:
    """Spec of any model on the Hub in diffusers layout, from its config files; they are a few KB."""
    patterns = ("model_index.json", "transformer/config.json", "transformer_2/config.json", "vae/config.json")
    return replace(spec_of_folder(snapshot(repo, patterns)), repo=repo)


def spec_of_folder(folder: Path, name: str | None = None) -> ModelSpec:
    """Read the facts from the config files of a diffusers folder; sampling facts come from the nearest table row.

    A folder of DiT files alone has no vae/: its VAE is the one of Wan's that has so many channels.
    """
    dit, index = (_read(folder / part) for part in ("transformer/config.json", "model_index.json"))
    refuse_unsupported(dit, str(folder))
    known_vae = None if (folder / "vae").is_dir() else VAE_KINDS.get(dit["out_channels"])
    pair = (folder / "transformer_2").is_dir()
    heads, in_channels = dit["num_attention_heads"], dit["in_channels"]
    row = next(
        (
            spec
            for spec in _SPECS
            if (spec.heads, spec.in_channels) == (heads, in_channels) and (spec.boundary is not None) == pair
        ),
        None,
    )
    condition: ImageCondition = "first_frame" if index.get("expand_timesteps") else "none"
    return ModelSpec(
        name=name or (row.name if row else folder.name),
        repo=str(folder),
        vae=known_vae or vae_kind(_read(folder / "vae/config.json")),
        fps=row.fps if row else 16,
        heads=heads,
        head_dim=dit["attention_head_dim"],
        ffn_dim=dit["ffn_dim"],
        num_layers=dit["num_layers"],
        in_channels=in_channels,
        text_dim=dit["text_dim"],
        boundary=index.get("boundary_ratio") if pair else None,
        image_condition="concat" if in_channels > dit["out_channels"] else condition,
        sample_shift=row.sample_shift if row else 5.0,
        guidance=row.guidance if row else (5.0, 5.0),
        expert_folders=_PAIR if pair else (("single", "transformer"),),
    )


def vae_kind(config: dict[str, Any]) -> VaeKind:
    """VaeKind of an AutoencoderKLWan's config.json."""
    spatial, temporal = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
    mean, std = config.get("latents_mean", MEAN_21), config.get("latents_std", STD_21)
    return VaeKind(config.get("z_dim", 16), (temporal, spatial, spatial), _numbers(mean), _numbers(std))


def refuse_unsupported(dit_config: dict[str, Any], origin: str) -> None:
    """Raise ModelError for members of the family that this trainer does not know: VACE, Animate, Wan 2.1 I2V."""
    if dit_config.get("_class_name", "WanTransformer3DModel") != "WanTransformer3DModel" or "vace_layers" in dit_config:
        raise ModelError(
            f"{origin}: {dit_config.get('_class_name')} cannot be trained here; use one of {', '.join(SPECS)}"
        )
    if dit_config.get("image_dim"):
        raise ModelError(f"{origin}: a DiT with CLIP image inputs (Wan 2.1 I2V) cannot be trained here; use i2v-a14b")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: not a complete model folder in diffusers layout") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    return dict(value)
