"""Flow matching as Wan was trained: which sigma, the noisy latent, the target and the loss. Pure functions, no state.

sigma 0 is data, 1 is noise; x = (1 - sigma) latent + sigma noise; the network predicts velocity = noise - latent at
timestep 1000 sigma (Lipman et al. 2022, arXiv 2210.02747; Wan-Video/Wan2.2 `wan/text2video.py` for the time scale).

Names: B samples, C channels, t h w latent frames and sides.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Distribution = Literal["UNIFORM", "LOGIT_NORMAL", "MODE"]
TIMESTEPS = 1000  # the DiT was trained on [0, 1000] (Wan2.2 num_train_timesteps)
MODE_SCALE = 1.29  # Esser et al. 2024, arXiv 2403.03206, section 3.1: the scale of their best `mode` run


@dataclass(frozen=True)
class SigmaLaw:
    """How sigma is drawn: a distribution, warped by `shift`, limited to [low, high] without changing its shape."""

    distribution: Distribution
    shift: float
    low: float = 0.0
    high: float = 1.0


def quantile(distribution: Distribution, u: Tensor) -> Tensor:
    """Inverse CDF of sigma before the shift; `u` in [0, 1], float64."""
    if distribution == "LOGIT_NORMAL":
        return torch.sigmoid(torch.special.ndtri(u))
    if distribution == "MODE":
        return u - MODE_SCALE * (torch.sin(math.pi / 2 * u) ** 2 - u)
    return u


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Warp towards noise for shift > 1: s' = k s / (1 + (k - 1) s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@lru_cache
def mass_below(distribution: Distribution, shift: float, sigma: float) -> float:
    """Probability of a shifted draw below `sigma`, by bisection of the quantile function."""
    if sigma <= 0 or sigma >= 1:
        return float(sigma >= 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = shifted(quantile(distribution, torch.tensor(middle, dtype=torch.float64)), shift).item() < sigma
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def sigma_at(law: SigmaLaw, u_B: Tensor) -> Tensor:
    """Sigma of uniform draws `u_B` (float64): the inverse CDF restricted to [low, high]; float32."""
    first, last = (mass_below(law.distribution, law.shift, edge) for edge in (law.low, law.high))
    return shifted(quantile(law.distribution, first + u_B * (last - first)), law.shift).float()


def expert_range(expert: str, boundary: float | None) -> tuple[float, float]:
    """(low, high) of sigma that an expert works on; the boundary itself is the high-noise one's (pipeline_wan.py)."""
    if boundary is None:
        return 0.0, 1.0
    return (boundary, 1.0) if expert == "high_noise" else (0.0, boundary)


def wide(values: Tensor) -> Tensor:
    """The same in float32; what is wider stays as it is."""
    return values.to(wider(values.dtype))


def wider(dtype: torch.dtype) -> torch.dtype:
    """float32, or a dtype that is wider."""
    return torch.promote_types(dtype, torch.float32)


def interpolate(latent_BCthw: Tensor, noise_BCthw: Tensor, sigma_B: Tensor) -> Tensor:
    """Noisy latent on the straight path."""
    sigma = sigma_B.view(-1, 1, 1, 1, 1)
    return (1 - sigma) * latent_BCthw + sigma * noise_BCthw


def velocity(latent_BCthw: Tensor, noise_BCthw: Tensor) -> Tensor:
    """d x / d sigma, the target."""
    return noise_BCthw - latent_BCthw


def pointwise(error: Tensor, kind: Literal["MSE", "HUBER"]) -> Tensor:
    """error^2, or twice Huber's loss with delta 1: equal to error^2 up to 1 and linear beyond."""
    if kind == "HUBER":
        return 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none")
    return error.square()


def flow_loss(error_BCthw: Tensor, kind: Literal["MSE", "HUBER"] = "MSE", counted_Bt: Tensor | None = None) -> Tensor:
    """Loss per sample (B,) of prediction - target, float32 or wider: the mean over the cells of frames that count."""
    loss_Bt = pointwise(wide(error_BCthw), kind).mean((1, 3, 4))
    return loss_Bt.mean(1) if counted_Bt is None else masked_mean(loss_Bt, counted_Bt)


def difference_loss(error_BCthw: Tensor, first_frames: list[int], counted_Bt: Tensor) -> Tensor:
    """Mean over neighbouring frames i, i + 1 (i in `first_frames`) of (error[i + 1] - error[i])^2 / 2, per sample.

    As the target's difference is linear, this is the squared error of the predicted change from frame to frame. It is 0
    where no pair counts.
    """
    if not first_frames:
        return error_BCthw.new_zeros(len(error_BCthw))
    index = torch.tensor(first_frames, device=error_BCthw.device)
    error = wide(error_BCthw)
    change = error.index_select(2, index + 1) - error.index_select(2, index)
    pairs_Bt = counted_Bt[:, index] * counted_Bt[:, index + 1]
    return masked_mean(change.square().mean((1, 3, 4)) / 2, pairs_Bt)


def masked_mean(values_Bt: Tensor, counted_Bt: Tensor) -> Tensor:
    """Mean over the frames that count, 0 where none does."""
    return (values_Bt * counted_Bt).sum(1) / counted_Bt.sum(1).clamp(min=1)
