"""Several processes that train one model: torchrun starts them, gradients are summed, the first one writes.

Every process holds the same weights and takes its share of the slots of each global batch; one all-reduce of one flat
tensor per update makes their gradients equal, so that no wrapper is needed and N processes do what one would do.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """This process among all; alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def agree(self, choose: Callable[[], Value]) -> Value:
        """What the first process chooses, on all."""
        if self.world == 1:
            return choose()
        chosen: list[Any] = [choose() if self.first else None]
        dist.broadcast_object_list(chosen)
        value: Value = chosen[0]
        return value

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    @torch.no_grad()
    def sum_gradients(self, parts: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes."""
        if self.world == 1:
            return
        trained = list(parts)
        for part in trained:
            if part.grad is None:
                part.grad = torch.zeros_like(part)
        flat = torch.cat([part.grad.flatten() for part in trained if part.grad is not None])
        dist.all_reduce(flat)
        for part, summed in zip(trained, torch.split(flat, [part.numel() for part in trained]), strict=True):
            part.grad = summed.view_as(part).to(part.dtype)


def join() -> Group:
    """The group that torchrun or accelerate started, or a group of one; the run says how many there are."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Group()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return Group(dist.get_rank(), dist.get_world_size())


def leave(group: Group) -> None:
    """End the group."""
    if group.world > 1:
        dist.destroy_process_group()
