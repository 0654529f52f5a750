"""Several processes that train one model: torchrun or accelerate starts them, and the first one writes.

accelerate's process state joins them. Every process holds the same weights and takes its share of the slots of each
global batch; one all-reduce of one flat tensor per update makes their gradients equal, so that no wrapper is needed and
N processes do what one would do.
"""

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import check_cuda_p2p_ib_support
from torch import Tensor, nn

from shared.config import Config
from shared.errors import ConfigError, RunError

Value = TypeVar("Value")
# optimizers that treat every element by itself, so that a part of a matrix is updated as the whole would be
ELEMENTWISE = ("ADAMW", "ADAMW_8BIT", "LION", "SCHEDULE_FREE_ADAMW")


@dataclass(frozen=True)
class Group:
    """This process among all; alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def divides(self, config: Config) -> bool:
        """Whether trained weights are divided among the processes (shard.py), not kept whole by each."""
        return self.world > 1 and config.trains_dit

    def agree(self, choose: Callable[[], Value]) -> Value:
        """What the first process chooses, on all."""
        if self.world == 1:
            return choose()
        chosen: list[Any] = [choose() if self.first else None]
        dist.broadcast_object_list(chosen)
        value: Value = chosen[0]
        return value

    def together(self, action: Callable[[], None]) -> None:
        """Do what may fail for want of disk: when it fails in one process, OSError is raised in all."""
        failure: OSError | None = None
        try:
            action()
        except OSError as error:
            failure = error
        failed = int(self.total(torch.tensor(int(failure is not None))))
        if failed:
            raise failure or OSError(errno.EIO, "another process could not write")

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
        trained = [part for part in parts if part.grad is not None]
        if not trained:
            return
        flat = torch.cat([part.grad.flatten() for part in trained if part.grad is not None])
        dist.all_reduce(flat)
        for part, summed in zip(trained, torch.split(flat, [part.numel() for part in trained]), strict=True):
            part.grad = summed.view_as(part).to(part.dtype)


ALONE = Group()


def join() -> Group:
    """The group that torchrun or accelerate started, or a group of one; the run says how many there are.

    Raises RunError when a launcher was asked for something that it does not start, or that this trainer does itself.
    """
    refuse_odd_launch(os.environ)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Group()
    os.environ.setdefault("LOCAL_RANK", "0")  # launchers of one process per machine leave it out; accelerate needs it
    cpu = not torch.cuda.is_available()
    if not cpu and not check_cuda_p2p_ib_support():  # GeForce 40 with an old driver; accelerate launch does the same
        os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    state = PartialState(cpu, backend="gloo" if cpu else "cpu:gloo,cuda:nccl")
    return Group(state.process_index, state.num_processes)


def refuse_odd_launch(environment: Mapping[str, str]) -> None:
    """Launches that would silently train otherwise than asked for (seen with accelerate 1.15)."""
    for wrapper in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{wrapper}", "false").lower() == "true":
            raise RunError(
                f"accelerate was told to wrap the model ({wrapper}); FINE_TUNE divides its weights by itself, and "
                "adapters need no wrapper: use torchrun --nproc_per_node, or accelerate launch --multi_gpu"
            )
    if "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        raise RunError(
            "the launcher was asked for several processes and started one (accelerate launch --cpu does); use: "
            "torchrun --standalone --nproc_per_node 2 -m -- train ..."
        )
    here, cards = int(environment.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if cards and here > cards:
        raise RunError(f"{here} processes on this machine, which has {cards} GPUs; each process needs one of its own")


def refuse_undivided(config: Config, group: Group) -> None:
    """Settings that contradict weights of which each process has a part. Raises ConfigError."""
    if not group.divides(config):
        return
    if config.optimizer.name not in ELEMENTWISE:
        raise ConfigError(
            f"optimizer.name={config.optimizer.name} needs whole matrices, and {group.world} processes divide those "
            f"of FINE_TUNE among them; use {' or '.join(ELEMENTWISE)}"
        )
    if config.layer_offload_fraction not in ("AUTO", 0):
        raise ConfigError(
            f"layer_offload_fraction={config.layer_offload_fraction}: {group.world} processes divide the weights of "
            "FINE_TUNE among them, and keep none in RAM; use AUTO or 0"
        )


def leave(group: Group) -> None:
    """End the group."""
    if group.world > 1:
        dist.destroy_process_group()
