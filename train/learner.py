"""One expert in training: model, trained parameters, optimizer, averages, loss scale; what an update does to them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW

from train import checkpoint
from train.adapter import copy_into
from train.adapter_file import adapter_path, start_from
from train.blockwise import Blockwise, make_updates
from train.data import WEIGHTS, random_of
from train.group import Group
from train.method import make_trained
from train.model import Model, TextBank, load_model, pick_device
from train.optim import Average, Optimizer, Parameters, averages_itself, clip
from train.phases import Phase
from train.run import Run
from train.scale import LossScale
from train.shard import cut, divide, own_parts, take_gradients, whole
from train.stores import Dataset

Loader = Callable[..., Model]
Named = dict[str, Tensor]


@dataclass
class Learner:
    """One expert being trained."""

    model: Model
    bank: TextBank
    trained: Parameters  # what this process updates: all, or its parts
    divided: Parameters  # the whole of those that are divided among processes
    optimizer: Optimizer | Blockwise
    average: Average | None
    scale: LossScale | None  # FLOAT_16 only

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled when there is a scale; empty captions teach an embedding nothing."""
        if isinstance(self.optimizer, Blockwise):
            self.optimizer.backward(loss)
        elif loss.requires_grad:
            torch.autograd.backward(loss if self.scale is None else loss * self.scale.value)

    def sum_gradients(self, group: Group) -> None:
        """Make all processes' gradients those of the global batch, without the scale."""
        if isinstance(self.optimizer, Blockwise):  # one process, no scale, and not all gradients are here
            return
        take_gradients(self.trained, self.divided)
        for part in self.trained.values():
            if part.grad is None:
                part.grad = torch.zeros_like(part)
        group.sum_gradients(part for name, part in self.trained.items() if name not in self.divided)
        if self.scale is not None:
            grads = [part.grad for part in self.trained.values() if part.grad is not None]
            torch._foreach_div_(grads, self.scale.value)

    def clip(self, limit: float, group: Group) -> Tensor:
        """Scale gradients so that their global norm is at most `limit` (0: never); returns the norm before."""
        if isinstance(self.optimizer, Blockwise):
            return self.optimizer.clip()
        if not self.divided:
            return clip(self.trained.values(), limit)
        own, shared = (
            get_total_norm([part.grad for name, part in self.trained.items()
                            if part.grad is not None and (name in self.divided) is divided])
            for divided in (True, False)
        )  # fmt: skip
        norm = torch.sqrt(group.total(own.square()) + shared.square())
        clip_grads_with_norm_(self.trained.values(), limit or torch.inf, norm)
        return norm

    @property
    def skips_on_device(self) -> bool:
        """Whether the device can leave an update out by itself: by torch's fused AdamW, with nothing beside it."""
        return type(self.optimizer) is AdamW and self.average is None and self.scale is None

    def step(self, found: Tensor) -> None:
        """One update, and the averages after it; left out where that can be told on the device, by what was `found`."""
        if self.skips_on_device:  # as torch.amp.GradScaler tells the fused optimizers
            self.optimizer.found_inf = (~found.isfinite().all()).to(torch.float32)  # type: ignore[union-attr]
        self.optimizer.step()
        if self.average is not None:
            self.average.update()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """With the weights that are meant to be used; SCHEDULE_FREE_ADAMW trains at others, which come back bit-equal.

        (Its own way back and forth would round, so that a look at the run would change it.)
        """
        if not averages_itself(self.optimizer):
            yield
            return
        trained_at = {name: part.detach().to("cpu", copy=True) for name, part in self.trained.items()}
        optimizer: Any = self.optimizer
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            copy_into(self.trained, trained_at, "memory")

    def tensors(self, expert: str) -> dict[str, Named]:
        """What a checkpoint keeps, by file; all processes of divided weights must ask for it."""
        kept = {f"average_{expert}": self.average.mean} if self.average is not None else {}
        if averages_itself(self.optimizer):
            kept[f"training_{expert}"] = self.copied()
            with self.evaluated():
                kept[f"weights_{expert}"] = self.copied()
        else:
            kept[f"weights_{expert}"] = {name: part.detach() for name, part in self.trained.items()}
        return {stem: whole(named, self.divided) for stem, named in kept.items()}

    def copied(self) -> Named:
        """The parameters as they are now."""
        return {name: part.detach().clone() for name, part in self.trained.items()}

    def restore(self, saved: Path, expert: str, rank: int) -> None:
        """Take everything from a checkpoint of this expert."""
        stem = f"{'training' if averages_itself(self.optimizer) else 'weights'}_{expert}"
        copy_into(self.trained, cut(checkpoint.read_tensors(saved, stem), self.divided), str(saved))
        self.optimizer.load_state_dict(checkpoint.read_optimizer(saved, rank if self.divided else 0))
        if self.average is not None:
            self.average.load(cut(checkpoint.read_tensors(saved, f"average_{expert}"), self.divided))
        if self.scale is not None:
            state = checkpoint.read_state(saved)
            self.scale.value, self.scale.good = state.loss_scale, state.steps_at_scale


def load_learner(run: Run, data: Dataset, phase: Phase, done: int, group: Group, load: Loader = load_model) -> Learner:
    """Load an expert, its adapter and optimizer; take their state from the checkpoint when it is of this phase."""
    config = run.config
    model = load(run.spec, phase.expert, config, pick_device())
    if group.divides(config):
        model = divide(model, group)
    seed = int(random_of(config.seed, WEIGHTS, phase.first).integers(2**62))
    bank, named = make_trained(model, run, seed, data.reader, [*data.texts.values(), *config.sample_prompts])
    trained, divided = own_parts(named)
    owners = dict.fromkeys(divided, group.rank)
    optimizer = make_updates(config, trained, model.options.run_block, owners)
    average = Average(trained, config.ema) if config.ema else None
    scale = LossScale() if config.train_dtype == "FLOAT_16" else None
    learner = Learner(model, bank, trained, divided, optimizer, average, scale)
    if done == phase.first and config.resume_from_adapter:
        start_from(adapter_path(config, phase.expert), trained, config)
    if done > phase.first and (saved := checkpoint.latest(run.folder)) is not None:
        learner.restore(saved, phase.expert, group.rank)
    return learner
