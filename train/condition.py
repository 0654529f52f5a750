"""What the DiT is given besides noise: image conditions, timesteps per token, frames left out. Pure functions.

- first_frame (ti2v): in some samples latent frame 0 is clean, at timestep 0 and out of the loss (diffusers
  pipeline_wan_i2v.py `expand_timesteps`; modelscope/DiffSynth-Studio leaves it out of the loss likewise).
- concat (i2v): mask and condition latents are further input channels, after the noisy ones (pipeline_wan_i2v.py).
- frame dropout: a micro-batch loses latent frames; those kept stay at their places in time.

Names: B samples, C channels, t h w latent frames and sides, N tokens, K distinct timesteps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from train.flow import TIMESTEPS, interpolate
from train.lean import Places


@dataclass(frozen=True)
class Frames:
    """Which latent frames a micro-batch uses, and whose first one is clean."""

    positions: tuple[int, ...]  # in time, ascending, starting with 0
    total: int  # frames there were
    clean_B: Tensor | None = None  # bool; None: no sample has a clean first frame

    @property
    def complete(self) -> bool:
        """Whether no frame is left out."""
        return len(self.positions) == self.total

    def pick(self, latent_BCthw: Tensor) -> Tensor:
        """The frames used, of any tensor with frames in dimension 2."""
        return latent_BCthw if self.complete else latent_BCthw[:, :, list(self.positions)]

    def counted_Bt(self, batch: int, device: torch.device) -> Tensor:
        """1 where a frame is in the loss, 0 for clean first frames; float32."""
        counted = torch.ones(batch, len(self.positions), device=device)
        if self.clean_B is not None:
            counted[:, 0] = (~self.clean_B).to(counted)
        return counted


def concat_mask(cond_BCthw: Tensor) -> Tensor:
    """(B, 4, t, h, w): 1 in the first latent frame, whose pixels are known, 0 elsewhere."""
    batch, _, frames, height, width = cond_BCthw.shape
    mask = cond_BCthw.new_zeros(batch, 4, frames, height, width)
    mask[:, :, 0] = 1
    return mask


def noisy_input(latent_BCthw: Tensor, noise_BCthw: Tensor, sigma_B: Tensor, frames: Frames) -> Tensor:
    """Latents at sigma, with first frames clean where they are to be."""
    noisy = interpolate(latent_BCthw, noise_BCthw, sigma_B)
    return noisy if frames.clean_B is None else with_clean_first(noisy, latent_BCthw, frames.clean_B)


def with_clean_first(noisy_BCthw: Tensor, latent_BCthw: Tensor, clean_B: Tensor) -> Tensor:
    """Replace the first latent frame of some samples."""
    first = torch.where(clean_B.view(-1, 1, 1, 1), latent_BCthw[:, :, 0], noisy_BCthw[:, :, 0])
    return torch.cat([first.unsqueeze(2), noisy_BCthw[:, :, 1:]], dim=2)


def timesteps_of(sigma_B: Tensor, clean_B: Tensor | None) -> Tensor:
    """(B, 1), or (B, 2) with the first frame's timestep first when some first frames are clean."""
    timestep_B = sigma_B * TIMESTEPS
    if clean_B is None:
        return timestep_B[:, None]
    return torch.stack([timestep_B.masked_fill(clean_B, 0.0), timestep_B], dim=1)


def places_of(frames: Frames, tokens_per_frame: int, device: torch.device) -> Places:
    """Which timestep each token has, and where frames are in time."""
    index_N: Tensor | None = None
    if frames.clean_B is not None:
        index_N = torch.ones(len(frames.positions) * tokens_per_frame, dtype=torch.long, device=device)
        index_N[:tokens_per_frame] = 0
    return Places(index_N, None if frames.complete else frames.positions)


def neighbours(positions: Sequence[int]) -> list[int]:
    """Indices i of frames whose successor i + 1 is also the next one in time."""
    return [index for index, (now, then) in enumerate(pairwise(positions)) if then == now + 1]
