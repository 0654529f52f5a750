"""First stage of the recipe: train the tiny VAE on drawn clips.

Input: a seed and a schedule. Output: an `AutoencoderKLWan` (8 x 8 pixels and 4 frames per latent, 16 channels, 1.43 M
parameters) with its latent statistics. The 2.2 kind of layout is used for its speed at this size.

What made it work: one pass over the whole clip, so that one graph holds it; 32-pixel windows around the motion for
most steps; L1 + MSE; and noise on the latents instead of a sampled posterior. The noise is relative to each channel's
spread, so scaling up does not help against it, and what a DiT gets slightly wrong still decodes to a clean picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from encode.vae import decode, encode_mode
from tests.tiny.draw import COMBINATIONS, SIDE, draw_clip, draw_varied
from tests.tiny.muon import MuonAdam
from tests.tiny.run import Run

LATENT_CHANNELS = 16
LOG_VARIANCE = -6.0  # fixed: posterior std 0.05, so a stock `.sample()` stays near the mode


@dataclass(frozen=True)
class VaeSchedule:
    """How the VAE is trained."""

    steps: int = 2400
    whole_steps: int = 500  # the last ones see whole pictures instead of windows
    batch_size: int = 16
    whole_batch_size: int = 4
    window: int = 32  # pixels
    matrix_rate: float = 0.025
    vector_rate: float = 0.0025
    warmup_steps: int = 30
    latent_noise: float = 0.1  # largest noise on a clip's latents, in units of the channel's std
    size_penalty: float = 1e-5  # on the mean square of the latents
    statistics_clips: int = 144


def new_vae(seed: int) -> AutoencoderKLWan:
    """An untrained tiny VAE; statistics are neutral until `measure_statistics`."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=12,
        decoder_base_dim=12,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = LOG_VARIANCE
    return vae


def train_vae(schedule: VaeSchedule, seed: int, work: Path) -> tuple[AutoencoderKLWan, float]:
    """The trained VAE and its CPU seconds; goes on from the last state saved in `work`."""
    vae = new_vae(seed)
    optimizer = MuonAdam(vae.parameters(), schedule.matrix_rate, schedule.vector_rate)
    run = Run(work / "vae.pt", schedule.steps, vae, optimizer)
    for step in run.steps():
        loss, quality = _loss(vae, schedule, step, seed)
        torch.autograd.backward(loss)
        optimizer.step(_rate(schedule, step))
        run.note(loss=loss.item(), psnr=quality)
    measure_statistics(vae, schedule.statistics_clips, seed)
    return vae.eval().requires_grad_(False), run.cpu_seconds


@torch.no_grad()
def measure_statistics(vae: AutoencoderKLWan, clips: int, seed: int) -> None:
    """Write mean and std per latent channel of captioned clips into the model's config."""
    rng = np.random.default_rng((seed, 1))
    latents = []
    for index in range(clips):
        video_BCTHW = draw_clip(COMBINATIONS[index % len(COMBINATIONS)], rng)[None]
        latents.append(encode_mode(vae, video_BCTHW))  # statistics are still neutral here
    latent_BCthw = torch.cat(latents)
    mean_C, std_C = latent_BCthw.mean((0, 2, 3, 4)), latent_BCthw.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean_C.tolist(), latents_std=std_C.tolist())


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal to noise in dB of pixels in [-1, 1]."""
    return -10 * math.log10(((video - reference) / 2).square().mean().item())


def _loss(vae: AutoencoderKLWan, schedule: VaeSchedule, step: int, seed: int) -> tuple[Tensor, float]:
    whole = step >= schedule.steps - schedule.whole_steps
    side, count = (SIDE, schedule.whole_batch_size) if whole else (schedule.window, schedule.batch_size)
    rng = np.random.default_rng((seed, 0, step))
    video_BCTHW = torch.stack([draw_varied(rng, side) for _ in range(count)])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    with torch.autocast("cpu", torch.bfloat16):
        latent_BCthw = encode_mode(vae, video_BCTHW).float()
        level_B = schedule.latent_noise * torch.rand(count, 1, 1, 1, 1, generator=generator)
        spread_C = latent_BCthw.detach().std((0, 2, 3, 4), keepdim=True)
        noise_BCthw = level_B * spread_C * torch.randn(latent_BCthw.shape, generator=generator)
        rebuilt_BCTHW = decode(vae, latent_BCthw + noise_BCthw, clamp=False).float()
    rebuilding = F.l1_loss(rebuilt_BCTHW, video_BCTHW) + F.mse_loss(rebuilt_BCTHW, video_BCTHW)
    return rebuilding + schedule.size_penalty * latent_BCthw.square().mean(), psnr(rebuilt_BCTHW.detach(), video_BCTHW)


def _rate(schedule: VaeSchedule, step: int) -> float:
    """Warmup, then a cosine to 2 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
    return min(1.0, (step + 1) / schedule.warmup_steps) * (0.02 + 0.98 * cosine)
