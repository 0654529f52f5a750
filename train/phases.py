"""Experts in training order, each with its share of the steps and its range of sigma; and when things recur."""

import time
from dataclasses import dataclass
from itertools import pairwise

from shared.config import Config, Unit
from shared.models import ModelSpec
from train.data import Plan
from train.flow import SigmaLaw, expert_range, mass_below


@dataclass(frozen=True)
class Phase:
    """Steps first .. stop-1 of a run train one expert on one law of sigma."""

    expert: str
    first: int
    stop: int
    law: SigmaLaw

    @property
    def steps(self) -> int:
        """Optimizer updates of this expert."""
        return self.stop - self.first


def expert_share(config: Config, spec: ModelSpec) -> float:
    """Share of the steps for the high-noise expert: as set, else the probability of its range."""
    if config.expert_share is not None:
        return config.expert_share
    return 1 - mass_below(config.timestep_distribution, training_shift(config, spec), spec.boundary or 0.0)


def training_shift(config: Config, spec: ModelSpec) -> float:
    """timestep_shift, else the model's own for training."""
    return config.timestep_shift or spec.train_shift


def sigma_law(config: Config, spec: ModelSpec, expert: str) -> SigmaLaw:
    """How sigma is drawn for an expert."""
    low, high = expert_range(expert, spec.boundary)
    return SigmaLaw(config.timestep_distribution, training_shift(config, spec), low, high)


def make_phases(config: Config, spec: ModelSpec, total: int) -> list[Phase]:
    """All steps for one expert, or divided between two (at least one each), the high-noise one first."""
    names = spec.experts if config.expert == "both" else (config.expert,)
    if len(names) == 1:
        return [Phase(names[0], 0, total, sigma_law(config, spec, names[0]))]
    middle = min(max(1, round(total * expert_share(config, spec))), total - 1)
    spans = zip(names, pairwise((0, middle, total)), strict=True)
    return [Phase(name, first, stop, sigma_law(config, spec, name)) for name, (first, stop) in spans]


class Due:
    """Whether something that recurs every n units is due after a step."""

    def __init__(self, every: int | None, unit: Unit, plan: Plan) -> None:
        self.every, self.unit, self.plan = every, unit, plan
        self.last = time.monotonic()

    def after(self, step: int) -> bool:
        """`step`: updates done so far."""
        if self.every is None:
            return False
        if self.unit == "STEP":
            return step % self.every == 0
        if self.unit == "EPOCH":
            epochs = self.plan.epoch_of(step)
            return epochs != self.plan.epoch_of(step - 1) and epochs % self.every == 0
        if time.monotonic() - self.last < 60 * self.every:
            return False
        self.last = time.monotonic()
        return True
