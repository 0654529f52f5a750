"""The update: optimizer by name (from torch or a library), rate by step, clipped gradients, averaged weights."""

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shared.config import Config
from shared.errors import ConfigError
from train.flow import wide
from train.rounding import Rounded
from train.text_encoder import PREFIX

Parameters = dict[str, nn.Parameter]
EMBEDDING = "embedding"  # name of a concept's learned rows among the trained parameters
Optimizer = torch.optim.Optimizer | Rounded


def make_optimizer(config: Config, trained: Parameters, owners: Mapping[str, int] | None = None) -> Optimizer:
    """The configured optimizer over the trained parameters; its rate is set before every update.

    `owners`: rank of this process, of the parameters that only it holds: it rounds them by dice of its own.
    """
    if config.optimizer.name == "MUON" and (odd := [name for name, part in trained.items() if part.ndim != 2]):
        raise ConfigError(f"optimizer.name=MUON trains matrices only, {odd[0]} is none; use ADAMW")
    if config.optimizer.rounding == "NEAREST":
        return plain_optimizer(config, trained)
    kahan = config.optimizer.rounding == "KAHAN"
    return Rounded(lambda name, part: plain_optimizer(config, {name: part}), trained, kahan, config.seed, owners)


def plain_optimizer(config: Config, trained: Parameters) -> torch.optim.Optimizer:
    """The optimizer as its library has it, one group for each part that has a rate of its own."""
    settings = config.optimizer
    parts: dict[str, list[nn.Parameter]] = {}
    for name, part in trained.items():
        parts.setdefault(part_of(name), []).append(part)
    groups: list[dict[str, Any]] = [{"params": params, "part": kind} for kind, params in parts.items()]
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": settings.weight_decay}
    betas, eps = (settings.beta1, settings.beta2), settings.eps
    if settings.name == "ADAMW":
        return torch.optim.AdamW(groups, **common, betas=betas, eps=eps, fused=True)
    if settings.name == "ADAFACTOR":
        return torch.optim.Adafactor(groups, **common)
    if settings.name == "MUON":
        return torch.optim.Muon(groups, **common, momentum=settings.beta1, eps=eps)
    return library_optimizer(config, groups, common)


def library_optimizer(config: Config, groups: list[dict[str, Any]], common: dict[str, Any]) -> torch.optim.Optimizer:
    """Optimizers of libraries that are installed only when wanted."""
    settings = config.optimizer
    betas = (settings.beta1, settings.beta2)
    made: torch.optim.Optimizer
    if settings.name == "PRODIGY":  # estimates the rate itself; learning_rate multiplies it and is usually 1
        made = optional("prodigyopt", "prodigyopt").Prodigy(groups, **common, betas=betas, eps=settings.eps)
    elif settings.name == "CAME":  # the third beta is the paper's (Luo et al. 2023, arXiv 2307.02047)
        made = optional("came_pytorch", "came-pytorch").CAME(groups, **common, betas=(*betas, 0.9999))
    elif settings.name == "LION":
        made = optional("bitsandbytes.optim", "bitsandbytes").Lion(groups, **common, betas=betas)
    elif settings.name == "SCHEDULE_FREE_ADAMW":  # Defazio et al. 2024, arXiv 2405.15682
        made = optional("schedulefree", "schedulefree").AdamWScheduleFree(
            groups, **common, betas=betas, eps=settings.eps
        )
        made.train()  # type: ignore[attr-defined]
    else:
        made = optional("bitsandbytes.optim", "bitsandbytes").AdamW8bit(groups, **common, betas=betas, eps=settings.eps)
    return made


def averages_itself(optimizer: Any) -> bool:
    """Whether weights are meant to be used at another point than they are trained at: those of SCHEDULE_FREE_ADAMW."""
    return hasattr(optimizer, "eval")


def optional(module: str, package: str) -> Any:
    """A library that only some optimizers need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"this optimizer.name needs {package}; install it with: pip install {package}") from None


def part_of(name: str) -> str:
    """Whose rate a trained parameter has."""
    if name == EMBEDDING:
        return EMBEDDING
    return "text_encoder" if name.startswith(PREFIX) else "transformer"


def peak_rate(config: Config, part: str) -> float:
    """The part's own rate, else the global one."""
    own = {"transformer": config.transformer.learning_rate, "text_encoder": config.text_encoder.learning_rate,
           EMBEDDING: config.embedding_learning_rate}  # fmt: skip
    return own[part] or config.learning_rate


def rate_factor(config: Config, step: int, steps: int) -> float:
    """Share of the peak rate at update `step` (from 0) of `steps`: linear warmup, then the schedule down to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    passed = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.lr_scheduler == "COSINE":
        return (1 + math.cos(math.pi * passed)) / 2
    return 1 - passed if config.lr_scheduler == "LINEAR" else 1.0


def set_rate(optimizer: Any, config: Config, step: int, steps: int) -> float:
    """Set every group's rate for this update; returns the first."""
    factor = rate_factor(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = peak_rate(config, group["part"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def clip(parts: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients so that their global norm is at most `limit` (0: never); returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(list(parts), limit or math.inf)


class Average:
    """Exponential moving average of the trained parameters (Polyak averaging), float32 or wider whatever they are."""

    def __init__(self, trained: Parameters, decay: float) -> None:
        self.trained, self.decay = trained, decay
        self.mean = {name: wide(part.detach()).clone() for name, part in trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the current weights."""
        for name, mean in self.mean.items():
            mean.lerp_(wide(self.trained[name].detach().to(mean.device)), 1 - self.decay)

    @torch.no_grad()
    def load(self, saved: dict[str, Tensor]) -> None:
        """Take saved averages of the same names."""
        for name, part in self.mean.items():
            part.copy_(saved[name])
