"""A full fine-tune divided among processes by FSDP2 (Zhao et al. 2023, arXiv 2304.11277): each keeps a part of every
block's weights with its gradients and optimizer state, and gathers a block for as long as it computes.

What is not in the storage dtype (norms, modulation) and what is outside the blocks is small and kept whole by all; its
gradients are summed as an adapter's are. The optimizer sees plain tensors: each process's own parts.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from train.group import Group
from train.lean import block_forward, lean_forward
from train.model import Model

Parts = dict[str, nn.Parameter]


def divide(model: Model, group: Group) -> Model:
    """Divide the block weights of a loaded DiT; forwards run through FSDP2's hooks from then on.

    It is in RAM until then: FSDP2 moves one block at a time to the device and keeps a part of it there.
    """
    transformer, run_block = model.transformer.requires_grad_(True), model.options.run_block or block_forward
    mesh = init_device_mesh(model.device.type, (group.world,))
    storage = transformer.blocks[0].attn1.to_q.weight.dtype
    inside = {part for part in transformer.blocks.parameters() if part.dtype == storage}
    whole = set(transformer.parameters()) - inside
    for block in transformer.blocks:
        block.lean = MethodType(run_block, block)
        hook(fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole), "lean")
    transformer.lean = MethodType(lean_forward, transformer)
    hook(fully_shard(transformer, mesh=mesh, ignored_params=whole), "lean")
    for part in whole:
        part.data = part.data.to(model.device)
    return replace(model, options=replace(model.options, run_block=run_hooked), forward=forward_hooked)


def hook(module: Any, method: str) -> None:
    """Gather a module's weights around a method; its gradients are summed over the processes, not averaged."""
    register_fsdp_forward_method(module, method)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # else float32 is summed by an operation that gloo has not


def run_hooked(block: Any, *arguments: Any) -> Tensor:
    """`block_forward` of a divided block."""
    hidden: Tensor = block.lean(*arguments)
    return hidden


def forward_hooked(transformer: Any, *arguments: Any) -> Tensor:
    """`lean_forward` of a divided DiT."""
    velocity: Tensor = transformer.lean(*arguments)
    return velocity


def own_parts(named: Parts) -> tuple[Parts, Parts]:
    """(what this process updates, by name: its parts of divided weights and all of the others; the divided ones)."""
    divided = {name: part for name, part in named.items() if isinstance(part.data, DTensor)}
    own = {name: nn.Parameter(part.data.to_local()) if isinstance(part.data, DTensor) else part
           for name, part in named.items()}  # fmt: skip
    return own, divided


def take_gradients(own: Parts, divided: Parts) -> None:
    """Give this process's parts the gradients that FSDP2 has summed."""
    for name, part in divided.items():
        own[name].grad = None if part.grad is None else part.grad.to_local()  # type: ignore[attr-defined]
        part.grad = None


@torch.no_grad()
def whole(tensors: Mapping[str, Tensor], divided: Parts) -> dict[str, Tensor]:
    """Gather every process's parts; all must call it, and each gets everything, divided weights in RAM."""
    return {name: gathered(value, divided[name]) if name in divided else value for name, value in tensors.items()}


def gathered(value: Tensor, like: Any) -> Tensor:
    """One divided tensor, whole, in RAM."""
    mesh, shape, stride = like.device_mesh, like.shape, like.stride()
    parts = DTensor.from_local(value, mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return parts.full_tensor().cpu()


def cut(tensors: Mapping[str, Tensor], divided: Parts) -> dict[str, Tensor]:
    """This process's parts of whole tensors: the reverse of `whole`, without communication."""
    return {name: part_of(value, divided[name]) if name in divided else value for name, value in tensors.items()}


def part_of(value: Tensor, like: Any) -> Tensor:
    """This process's part of one tensor."""
    value = value.to(like.device_mesh.device_type)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()
