"""Second stage of the recipe: train the tiny DiT on latents of drawn, captioned clips.

Input: the trained VAE, a seed and a schedule. Output: a `WanTransformer3DModel` with its averaged weights. The held-out
combinations of attributes, the concept and its word are never among the clips.
Objective: x = (1 - sigma) * latent + sigma * noise, target velocity = noise - latent, timestep = 1000 sigma.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import T5Tokenizer, UMT5EncoderModel

from encode.vae import encode_mode
from tests.tiny.draw import COMBINATIONS, VERBS, caption, draw_clip, held_out
from tests.tiny.muon import MuonAdam
from tests.tiny.run import Run
from tests.tiny.text import TEXT_DIM, embed
from tests.tiny.vae import LATENT_CHANNELS
from train.lean import collate_text, lean_forward, project_text


@dataclass(frozen=True)
class DitSchedule:
    """How the DiT is trained."""

    steps: int = 2000
    clips_per_combination: int = 64
    batch_size: int = 64
    matrix_rate: float = 0.02
    vector_rate: float = 0.002
    warmup_steps: int = 20
    decay_share: float = 0.4  # the rate falls to zero over this last share of the steps
    average_decay: float = 0.998
    caption_dropout: float = 0.1
    sigma_mean: float = 0.3  # sigma = sigmoid of a normal with this mean and std
    sigma_std: float = 1.2


@dataclass(frozen=True)
class Examples:
    """Latents of clips, and the text embeddings they can be shown with."""

    latent_NCthw: Tensor
    captions: list[list[int]]  # per clip, indices into `embeddings`
    embeddings: list[Tensor]  # the first one is that of the empty caption


def new_dit(seed: int) -> WanTransformer3DModel:
    """An untrained tiny DiT, its last layer near zero."""
    torch.manual_seed(seed)
    dit = WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=640,
        num_layers=6,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        dit.proj_out.weight.mul_(0.1)
    return dit


def train_dit(examples: Examples, schedule: DitSchedule, seed: int, work: Path) -> tuple[WanTransformer3DModel, float]:
    """The trained DiT and its CPU seconds; goes on from the last state saved in `work`."""
    dit = new_dit(seed)
    optimizer = MuonAdam(dit.parameters(), schedule.matrix_rate, schedule.vector_rate)
    average = {name: value.clone() for name, value in dit.state_dict().items()}
    run = Run(work / "dit.pt", schedule.steps, dit, optimizer, average)
    for step in run.steps():
        loss = _loss(dit, examples, schedule, np.random.default_rng((seed, 2, step)))
        torch.autograd.backward(loss)
        optimizer.step(_rate(schedule, step))
        _average(run.average, dit, min(schedule.average_decay, (step + 1) / (step + 10)))
        run.note(loss=loss.item())
    dit.load_state_dict(run.average)
    return dit.eval().requires_grad_(False), run.cpu_seconds


@torch.no_grad()
def make_examples(
    vae: AutoencoderKLWan, tokenizer: T5Tokenizer, encoder: UMT5EncoderModel, clips: int, seed: int
) -> Examples:
    """`clips` clips of each combination that is not held out, encoded, each with its caption in three wordings."""
    rng = np.random.default_rng((seed, 3))
    texts, latents, captions = [""], [], []
    for attributes in COMBINATIONS:
        if held_out(attributes):
            continue
        texts += [caption(attributes, verb) for verb in VERBS]
        captions += [list(range(len(texts) - len(VERBS), len(texts)))] * clips
        video_BCTHW = torch.stack([draw_clip(attributes, rng) for _ in range(clips)])
        latents += [encode_mode(vae, part) for part in torch.split(video_BCTHW, 16)]
    return Examples(torch.cat(latents), captions, embed(tokenizer, encoder, texts))


def _loss(dit: WanTransformer3DModel, examples: Examples, schedule: DitSchedule, rng: np.random.Generator) -> Tensor:
    rows = rng.integers(len(examples.captions), size=schedule.batch_size)
    chosen = [int(rng.choice(examples.captions[row])) for row in rows]
    dropped = rng.random(schedule.batch_size) < schedule.caption_dropout
    texts = [examples.embeddings[0 if drop else index] for index, drop in zip(chosen, dropped, strict=True)]
    projected = project_text(dit, torch.cat(texts))  # one call for all rows; the last one is the padding's
    parts = torch.split(projected[:-1], [len(text) for text in texts])
    text = collate_text([torch.cat([part, projected[-1:]]) for part in parts])
    normal_B = rng.normal(schedule.sigma_mean, schedule.sigma_std, schedule.batch_size).astype(np.float32)
    sigma_B = torch.sigmoid(torch.from_numpy(normal_B))
    latent_BCthw = examples.latent_NCthw[torch.from_numpy(rows)]
    noise_BCthw = torch.from_numpy(rng.standard_normal(latent_BCthw.shape, dtype=np.float32))
    noisy_BCthw = torch.lerp(latent_BCthw, noise_BCthw, sigma_B.view(-1, 1, 1, 1, 1))
    velocity_BCthw = lean_forward(dit, noisy_BCthw, 1000 * sigma_B, text)
    return F.mse_loss(velocity_BCthw, noise_BCthw - latent_BCthw)


@torch.no_grad()
def _average(average: dict[str, Tensor], dit: WanTransformer3DModel, decay: float) -> None:
    for name, value in dit.state_dict().items():
        average[name].lerp_(value, 1 - decay)


def _rate(schedule: DitSchedule, step: int) -> float:
    """Warmup, flat, then a straight line to zero."""
    left = (1 - step / schedule.steps) / schedule.decay_share
    return min(1.0, (step + 1) / schedule.warmup_steps, left)
