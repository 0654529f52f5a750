"""Updates of a full fine-tune block by block: inside the backward, or after it with what streamed blocks need in RAM.

Input: the trained parameters and the BlockRunner that computes with them. Output: something with the interface of an
optimizer, which is one ordinary optimizer per block, and one for what is outside the blocks.

Fused: as soon as the last gradient of a block is there, its norm is limited, its weights are updated, its gradients are
freed, so that the gradients of one block at most are alive. That is legal when nothing is asked that needs all
gradients at once: one micro-batch per update, and no limit of their global norm. Else the update follows the backward,
and gradients of streamed blocks wait in RAM. Weights of streamed blocks are copied back to RAM after their update, and
their optimizer state lives there too. Which way is taken, and which blocks are streamed, changes no bit of the result.
"""

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from shared.config import Config
from train.offload import BlockRunner, HostBlock, Owner, Ring, pack
from train.optim import make_optimizer
from train.rounding import Rounded
from train.updates import is_blockwise, is_fused

Inner = torch.optim.Optimizer | Rounded
BLOCK = re.compile(r"blocks\.(\d+)\.")
OUTSIDE = -1


def make_updates(
    config: Config, trained: dict[str, nn.Parameter], run_block: Any, owners: Mapping[str, int] | None = None
) -> "Inner | Blockwise":
    """The configured optimizer; of a full fine-tune, when it can be, one that updates block by block.

    `owners`: rank of this process, of the parameters that only it holds.
    """
    if not is_blockwise(config) or not isinstance(run_block, BlockRunner):
        return make_optimizer(config, {name: part for name, part in trained.items() if part.numel()}, owners)

    def make(named: dict[str, nn.Parameter], number: int) -> Inner:
        seed = config.seed + (number << 40)  # of rounding: no two blocks draw the same
        return make_optimizer(config.model_copy(update={"seed": seed}), named)

    return Blockwise(make, trained, run_block, config)


@dataclass
class Part:
    """One block's parameters, or those outside the blocks, and their optimizer."""

    index: int
    named: dict[str, nn.Parameter]
    optimizer: Inner
    waiting: int = 0  # gradients that are still to come in this backward
    norms: list[Tensor] = field(default_factory=list)  # of each gradient
    coefficient: Tensor | None = None  # what gradients are still to be multiplied by
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of streamed weights, unfused
    filled: bool = False  # whether those hold something

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return list(self.named.values())


class Blockwise:
    """The update of a full fine-tune; see above. `make` makes an optimizer of some named parameters."""

    def __init__(self, make: Callable[[dict[str, nn.Parameter], int], Inner], trained: dict[str, nn.Parameter],
                 runner: BlockRunner, config: Config) -> None:  # fmt: skip
        self.runner, self.limit, self.fused = runner, config.max_grad_norm, is_fused(config)
        self.per_block = config.clip == "BLOCK"
        grouped: dict[int, dict[str, nn.Parameter]] = {}
        for name, parameter in trained.items():
            found = BLOCK.match(name)
            grouped.setdefault(int(found[1]) if found else OUTSIDE, {})[name] = parameter
        self.parts = [Part(index, named, make(named, index + 1)) for index, named in sorted(grouped.items())]
        self.states, self.gradients = Travellers(runner), Travellers(runner)
        self.current: Part | None = None  # some of whose gradients are there
        for part in self.parts:
            if part.index != OUTSIDE:
                for parameter in part.parameters:
                    parameter.register_post_accumulate_grad_hook(partial(self._arrived, part))  # type: ignore[no-untyped-call]
        self.zero_grad()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all parts, to set rates in."""
        return [group for part in self.parts for group in part.optimizer.param_groups]

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, and, fused, the update of the blocks; nothing where the loss is not finite."""
        if not self.fused or bool(torch.isfinite(loss)):
            torch.autograd.backward(loss)

    def clip(self) -> Tensor:
        """Limit the norms of gradients as configured: all in one, or each block's own; returns the norm before."""
        late = [part for part in self.parts if not self.fused or part.index == OUTSIDE]
        for part in late:
            part.norms = self._norms(part)
        total = total_norm(norm for part in self.parts for norm in part.norms)
        for part in late:
            own = total_norm(part.norms) if self.per_block else total
            part.coefficient = coefficient(own, self.limit)
        return total

    @torch.no_grad()
    def step(self) -> None:
        """Update what has not been updated inside the backward."""
        for part in self.parts:
            if not self.fused or part.index == OUTSIDE:
                self._update(part, backward=False)
        for ring in (self.runner.ring, self.states.ring):
            if ring is not None:
                ring.settle()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.current = None
        for part in self.parts:
            part.waiting, part.filled, part.norms = len(part.named), False, []
            for parameter in part.parameters:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """All state; what lives in RAM is named there."""
        self.states.release()
        return {"parts": [part.optimizer.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.optimizer.load_state_dict(saved)
            if self._streamed(part):
                self._send_state_to_ram(part)

    def _streamed(self, part: Part) -> bool:
        return self.runner.ring is not None and part.index in self.runner.ring.hosts

    @torch.no_grad()
    def _arrived(self, part: Part, _: nn.Parameter) -> None:
        """A gradient is there. Blocks finish one after the other: the buffers of streamed ones rely on it."""
        if self.current is not part:
            if self.current is not None:
                raise RuntimeError(
                    f"block {part.index} has gradients before block {self.current.index} has all of its own"
                )
            self.current = part
        part.waiting -= 1
        if part.waiting:
            return
        self.current, part.waiting = None, len(part.named)
        if self.fused:
            part.norms = self._norms(part)
            part.coefficient = coefficient(total_norm(part.norms), self.limit)
            self._update(part, backward=True)
        elif self._streamed(part):
            self._send_gradients_to_ram(part)

    def _norms(self, part: Part) -> list[Tensor]:
        """Norm of each gradient, in float32, in the order of the parameters."""
        norms = dict(zip(part.gradients, part.norms, strict=True)) if part.filled else {}
        here = {name: each.grad for name, each in part.named.items() if each.grad is not None}
        norms |= dict(zip(here, float_norms(list(here.values())), strict=True))
        return [norms[name] for name in part.named if name in norms]

    def _update(self, part: Part, backward: bool) -> None:
        """One update of one part, which is on the device afterwards, and on its way to RAM when it is streamed."""
        ring = self.runner.ring if self._streamed(part) else None
        if ring is not None:
            ring.load(part.index, backward)
            if part.filled:
                self.gradients.load(part.index, backward)
                for name, gradient in part.gradients.items():
                    part.named[name].grad = gradient
            if part.index in self.states.hosts:
                self.states.load(part.index, backward)
        scale_gradients(part.parameters, part.coefficient)
        part.optimizer.step()
        for parameter in part.parameters:
            parameter.grad = None
        if ring is not None:
            ring.store(part.index)
            if part.index in self.states.hosts:
                self.states.store(part.index)
            else:
                self._send_state_to_ram(part)

    def _send_state_to_ram(self, part: Part) -> None:
        """From now on a streamed block's optimizer state lives in RAM."""
        tensors: list[tuple[Owner, str, Tensor]] = [
            (held, key, value) for held in held_states(part.optimizer) for key, value in held.items()
            if isinstance(value, Tensor) and value.numel()
        ]  # fmt: skip
        if tensors:
            self.states.add(part.index, pack(tensors, self.runner.device, changes=True))

    def _send_gradients_to_ram(self, part: Part) -> None:
        """Add the gradients of a streamed block's matrices to those of the micro-batches before, in RAM."""
        assert self.runner.ring is not None
        moved = {id(piece.owner) for piece in self.runner.ring.hosts[part.index].pieces}
        named = {name: each for name, each in part.named.items() if id(each) in moved}
        if part.index not in self.gradients.hosts:
            part.gradients = {name: torch.empty_like(each) for name, each in named.items()}
            owned: list[tuple[Owner, str, Tensor]] = [(part.gradients, *item) for item in part.gradients.items()]
            self.gradients.add(part.index, pack(owned, self.runner.device, changes=True))
        if part.filled:
            self.gradients.load(part.index, backward=True)
        else:
            self.gradients.open(part.index)
        for name, each in named.items():
            assert each.grad is not None
            if part.filled:
                part.gradients[name].add_(each.grad)
            else:
                part.gradients[name].copy_(each.grad)
            each.grad = None
        part.norms, part.filled = float_norms(list(part.gradients.values())), True
        self.gradients.store(part.index)


class Travellers:
    """Tensors of streamed blocks that pass through a ring of their own; blocks join as they come."""

    def __init__(self, runner: BlockRunner) -> None:
        self.runner, self.hosts = runner, dict[int, HostBlock]()
        self.ring: Ring | None = None

    def add(self, index: int, host: HostBlock) -> None:
        """One more block."""
        self.release()
        host.take_away(self.runner.device)
        self.hosts[index] = host

    def release(self) -> None:
        """Give up the device's buffers until the next use; owners hold what is in RAM."""
        if self.ring is not None:
            self.ring.release()
        self.ring = None

    def load(self, index: int, backward: bool) -> None:
        """Ring.load."""
        self._made().load(index, backward)

    def open(self, index: int) -> None:
        """Ring.open."""
        self._made().open(index)

    def store(self, index: int) -> None:
        """Ring.store."""
        self._made().store(index)

    def _made(self) -> Ring:
        if self.ring is None:
            self.ring = Ring(dict(self.hosts), self.runner.device)
        return self.ring


def held_states(optimizer: Inner) -> Iterable[MutableMapping[str, Any]]:
    """The mappings in which an optimizer keeps tensors."""
    return optimizer.held_states() if isinstance(optimizer, Rounded) else optimizer.state.values()


def float_norms(gradients: list[Tensor]) -> list[Tensor]:
    """Norm of each tensor, summed in float32 or wider."""
    widest = reduce(torch.promote_types, (part.dtype for part in gradients), torch.float32)
    return list(torch._foreach_norm(gradients, 2, widest)) if gradients else []


def total_norm(norms: Iterable[Tensor]) -> Tensor:
    """Norm of all from the norms of each."""
    every = list(norms)
    return torch.linalg.vector_norm(torch.stack(every)) if every else torch.zeros(())


def coefficient(norm: Tensor, limit: float) -> Tensor | None:
    """What limits a norm (as torch.nn.utils.clip_grads_with_norm_); 0 where it is not finite; None: no limit."""
    if not limit:
        return None
    return torch.where(norm.isfinite(), (limit / (norm + 1e-6)).clamp(max=1.0), 0.0)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | None) -> None:
    """Multiply gradients by a factor on the device; by 0, what is not finite is 0 too."""
    for parameter in parameters if factor is not None else ():
        if parameter.grad is not None and factor is not None:
            parameter.grad.mul_(factor).masked_fill_(factor == 0, 0.0)
