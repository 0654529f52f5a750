"""Updates of bfloat16 weights that do not lose what is smaller than a rounding step.

Every tensor is updated through a float32 copy that lives for its own update only; the optimizer's state is float32.
STOCHASTIC rounds up or down with the probability that keeps the mean; KAHAN keeps what rounding lost, in bfloat16
beside the weight (Zamirai et al. 2020, arXiv 2010.06192, for both).
"""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

LOW_BITS = 1 << 16  # float32 has as many mantissa bits more than bfloat16, as steps


def round_stochastic(wide: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to the nearest bfloat16 value below or above, still as float32: up with the probability of the distance
    covered."""
    bits = torch.randint(0, LOW_BITS, wide.shape, generator=generator, dtype=torch.int32, device=generator.device)
    bits.add_(wide.contiguous().view(torch.int32)).bitwise_and_(-LOW_BITS)
    return bits.view(torch.float32)


class Rounded:
    """An optimizer over half-precision weights, made of one ordinary optimizer per tensor.

    What is rounded follows from the seed, the step, the tensor's name and its owner, so that processes that hold the
    same tensor round it alike, whatever else they hold.
    """

    def __init__(self, make: Callable[[str, nn.Parameter], torch.optim.Optimizer], parts: Mapping[str, nn.Parameter],
                 kahan: bool, seed: int, owners: Mapping[str, int] | None = None) -> None:  # fmt: skip
        """`owners`: rank of the process, of the tensors that only it holds."""
        self.parts, self.kahan, self.steps = list(parts.values()), kahan, 0
        self.seeds = [(seed, (owners or {}).get(name, 0), crc32(name.encode())) for name in parts]
        self.wide = [nn.Parameter(torch.empty(0, device=part.device)) for part in self.parts]
        self.inner = [make(name, wide) for name, wide in zip(parts, self.wide, strict=True)]
        self.lost: dict[str, Tensor] = {}  # by number of the part

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all tensors, to set rates in."""
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """One update of every tensor that has a gradient."""
        self.steps += 1
        for index, (part, wide, optimizer) in enumerate(zip(self.parts, self.wide, self.inner, strict=True)):
            if part.grad is not None:
                wide.data = part.float() + (self._lost(index).float() if self.kahan else 0)
                wide.grad = part.grad.float()
                optimizer.step()
                wide.grad = None
                self._keep(index, part, wide.data)
                wide.data = wide.data.new_empty(0)

    def _keep(self, index: int, part: nn.Parameter, updated: Tensor) -> None:
        if part.dtype != torch.bfloat16 or self.kahan:
            part.copy_(updated)
        else:
            drawn = np.random.SeedSequence([*self.seeds[index], self.steps]).generate_state(1, np.uint64)
            dice = torch.Generator(part.device).manual_seed(int(drawn[0]) >> 1)
            part.copy_(round_stochastic(updated, dice))
        if self.kahan:
            self._lost(index).copy_(updated - part.float())

    def _lost(self, index: int) -> Tensor:
        """What rounding lost of a part so far."""
        if str(index) not in self.lost:
            self.lost[str(index)] = torch.zeros_like(self.parts[index])
        return self.lost[str(index)]

    def held_states(self) -> list[MutableMapping[str, Any]]:
        """The mappings that hold tensors of state."""
        return [self.lost, *(state for optimizer in self.inner for state in optimizer.state.values())]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.grad = None

    def state_dict(self) -> dict[str, Any]:
        """All state, tensors and numbers."""
        inner = [optimizer.state_dict() for optimizer in self.inner]
        return {"inner": inner, "lost": self.lost, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state."""
        for optimizer, saved in zip(self.inner, state["inner"], strict=True):
            optimizer.load_state_dict(saved)
        for index, kept in state["lost"].items():
            self._lost(int(index)).copy_(kept)
        self.steps = int(state["steps"])
