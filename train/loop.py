"""The training loop. Input: a run, its data, its plan. Output: the run folder: events, checkpoints, previews, results.

Each expert is trained by itself, one after the other; what a step does is told in `train_phase`.
"""

import time
from functools import partial

import torch
from torch import Tensor

from shared.config import Config
from shared.store_copy import fetch_ahead
from train.ahead import files_in_order
from train.data import Slots
from train.feed import prefetch
from train.flow import wider
from train.learner import Learner
from train.objective import micro_loss
from train.offload import BlockRunner, with_room
from train.optim import set_rate
from train.phases import Phase
from train.reading import Copied, Reading
from train.task import Task


def train(task: Task) -> None:
    """Train what is left of a run, from its newest checkpoint to its results."""
    with task.data.reader as reader, task.stoppable():
        span = task.done, task.phases[-1].stop
        fetch_ahead(files_in_order(task.data, task.plan, span, task.group), reader.stop)
        for phase in task.phases:
            if task.done < phase.stop:
                train_phase(task, phase)
    task.finish()


def train_phase(task: Task, phase: Phase) -> None:
    """Train one expert."""
    config = task.run.config
    learner = task.load(phase)
    if task.done == phase.first:
        task.look(learner, phase, task.done)  # validation and preview of what there was before
    span, device = (task.done, phase.stop), learner.model.device
    batches = prefetch(task.data.reader, task.plan, phase.law, span, task.group, device)
    while task.done < phase.stop:
        began = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - began
        rate = set_rate(learner.optimizer, config, task.done - phase.first, phase.steps)
        loss = with_room(partial(accumulate, learner, batch, config), partial(make_room, task, learner))
        learner.sum_gradients(task.group)
        norm = learner.clip(config.max_grad_norm, task.group)
        found = torch.stack([task.agree(loss), norm])
        task.done += 1
        numbers = Copied(found)
        skipped = None if learner.skips_on_device else task.guard(task.done, numbers.tolist(), learner.scale)
        if not skipped:
            learner.step(found)
        learner.optimizer.zero_grad()
        samples = sum(len(slots.captions) for slots in batch) * task.group.world
        row = {"step": task.done, "expert": phase.expert, "lr": rate}
        task.keep(Reading(row, numbers, samples, began, waited, skipped))
        task.after_step(learner, phase)


def make_room(task: Task, learner: Learner) -> bool:
    """When the device ran out of memory: forget these gradients and keep fewer blocks there; False: none can go."""
    learner.optimizer.zero_grad()
    runner = learner.model.options.run_block
    if not isinstance(runner, BlockRunner) or not runner.stream_more():
        return False
    task.log.say("out of device memory: more blocks are streamed from RAM from now on, and the step is made again")
    return True


def accumulate(learner: Learner, batch: list[Slots], config: Config) -> Tensor:
    """Gradients of the mean loss over the batch, one micro-batch after the other; returns that loss."""
    losses = [torch.zeros((), dtype=wider(learner.model.dtype), device=learner.model.device)]
    for slots in batch:
        loss = micro_loss(learner.model, learner.bank, slots, config)
        learner.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).sum()
