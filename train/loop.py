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
    config, log = task.run.config, task.log
    learner = task.load(phase)
    if task.done == phase.first:
        task.look(learner, phase, task.done)  # validation and preview of what there was before
    span, device = (task.done, phase.stop), learner.model.device
    batches = prefetch(task.data.reader, task.plan, phase.law, span, task.group, device)
    log.resume_clock()
    while task.done < phase.stop:
        waiting = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - waiting
        rate = set_rate(learner.optimizer, config, task.done - phase.first, phase.steps)
        loss = with_room(partial(accumulate, learner, batch, config), partial(make_room, task, learner))
        learner.sum_gradients(task.group)
        norm = learner.clip(config.max_grad_norm, task.group)
        numbers = torch.stack([task.agree(loss), norm]).tolist()
        skipped = task.guard(numbers, learner.scale)
        if not skipped:
            learner.step()
        learner.optimizer.zero_grad()
        task.done += 1
        row = dict(zip(("loss", "grad_norm"), (None, None) if skipped else numbers, strict=True))
        samples = sum(len(slots.captions) for slots in batch) * task.group.world
        log.step({"step": task.done, "expert": phase.expert, "lr": rate, **row}, samples, waited)
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
