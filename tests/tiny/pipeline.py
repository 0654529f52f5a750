"""The finished model as a stock diffusers `WanPipeline` folder, and what is measured on it.

Input: trained parts. Output: a folder that `WanPipeline.from_pretrained` loads without code of this project, and
`Measured` figures taken from that folder, after rounding to float16, through the stock pipeline.
Cost: about a second per sampled clip on one core.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from transformers import T5Tokenizer, UMT5EncoderModel

from encode.vae import decode, encode_mode
from tests.tiny.draw import COMBINATIONS, NUM_FRAMES, SIDE, Attributes, caption, draw_clip, draw_varied, held_out
from tests.tiny.score import count_followed
from tests.tiny.vae import psnr


@dataclass(frozen=True)
class Sampling:
    """How test prompts are sampled; the shift is also written into the scheduler's config."""

    steps: int = 20
    guidance: float = 2.0
    shift: float = 1.0
    prompts: int = 64  # all held-out combinations first, then others
    batch_size: int = 16
    measured_clips: int = 64  # for PSNR and for the scorer's own test


@dataclass(frozen=True)
class Measured:
    """Figures of a saved pipeline; counts are per attribute, of `prompts`."""

    psnr: float  # mean over captioned clips, dB
    worst_psnr: float
    varied_psnr: float  # mean over clips with other colours, shapes and textures
    real: dict[str, int]  # the scorer on drawn clips
    rebuilt: dict[str, int]  # the scorer on the VAE's output
    followed: dict[str, int]
    held_out_followed: dict[str, int]
    prompts: int
    held_out_prompts: int
    clips: int
    misses: list[str]


def save_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    dit: WanTransformer3DModel,
    text: tuple[T5Tokenizer, UMT5EncoderModel],
    shift: float,
) -> None:
    """Write the folder; VAE and DiT as float16, the small text encoder as float32."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )
    pipeline = WanPipeline(
        tokenizer=text[0],
        text_encoder=text[1],
        vae=copy.deepcopy(vae).half(),
        scheduler=scheduler,
        transformer=copy.deepcopy(dit).half(),
    )
    pipeline.save_pretrained(folder)


def load_pipeline(folder: Path) -> WanPipeline:
    """The folder as stock diffusers reads it: float32 whatever the files hold."""
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: WanPipeline, prompts: Sequence[str], sampling: Sampling, seed: int) -> list[Tensor]:
    """One video (3, T, H, W) in [-1, 1] per prompt, each from its own noise."""
    videos = []
    for start in range(0, len(prompts), sampling.batch_size):
        batch = list(prompts[start : start + sampling.batch_size])
        frames_BTCHW = pipeline(
            batch,
            negative_prompt=[""] * len(batch),
            height=SIDE,
            width=SIDE,
            num_frames=NUM_FRAMES,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))],
            output_type="pt",
        ).frames
        videos += [video.permute(1, 0, 2, 3) * 2 - 1 for video in frames_BTCHW]
    return videos


def asked_combinations(count: int, seed: int) -> list[Attributes]:
    """`count` different combinations: the held-out ones, then a draw of the others."""
    hidden = [attributes for attributes in COMBINATIONS if held_out(attributes)]
    seen = [attributes for attributes in COMBINATIONS if not held_out(attributes)]
    order = np.random.default_rng((seed, 4)).permutation(len(seen))
    return (hidden + [seen[index] for index in order])[:count]


@torch.no_grad()
def measure(folder: Path, sampling: Sampling, seed: int) -> tuple[Measured, list[Tensor]]:
    """Figures of the saved folder, and the clips of the test prompts."""
    pipeline = load_pipeline(folder)
    rng = np.random.default_rng((seed, 5))  # clips that no training stage has drawn
    shown = [COMBINATIONS[index] for index in rng.integers(len(COMBINATIONS), size=sampling.measured_clips)]
    clips = [draw_clip(attributes, rng) for attributes in shown]
    rebuilt = [rebuild(pipeline.vae, clip) for clip in clips]
    varied = [draw_varied(rng) for _ in range(sampling.measured_clips)]
    quality = [psnr(new, clip) for new, clip in zip(rebuilt, clips, strict=True)]
    asked = asked_combinations(sampling.prompts, seed)
    videos = sample(pipeline, [caption(attributes) for attributes in asked], sampling, seed)
    hidden = [index for index, attributes in enumerate(asked) if held_out(attributes)]
    return Measured(
        psnr=float(np.mean(quality)),
        worst_psnr=min(quality),
        varied_psnr=float(np.mean([psnr(rebuild(pipeline.vae, clip), clip) for clip in varied])),
        real=count_followed(clips, shown),
        rebuilt=count_followed(rebuilt, shown),
        followed=count_followed(videos, asked),
        held_out_followed=count_followed([videos[i] for i in hidden], [asked[i] for i in hidden]),
        prompts=len(asked),
        held_out_prompts=len(hidden),
        clips=sampling.measured_clips,
        misses=[caption(a) for v, a in zip(videos, asked, strict=True) if not count_followed([v], [a])["all"]],
    ), videos


@torch.no_grad()
def rebuild(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """A video (3, T, H, W) through the VAE and back."""
    return decode(vae, encode_mode(vae, video[None]))[0]
