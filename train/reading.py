"""Loss and gradient norm of an update on their way to the host, so that no step waits for the one before it.

An optimizer that can leave an update out on the device is told so there; the host reads the numbers a step later.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Copied:
    """A small tensor on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self.host, self.arrived = values, None
        if values.is_cuda:
            self.host = torch.empty_like(values, device="cpu", pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.arrived = torch.Event("cuda")
            self.arrived.record()

    def tolist(self) -> list[float]:
        """The numbers, waited for if need be."""
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers: list[float] = self.host.tolist()
        return numbers


@dataclass
class Reading:
    """What one update found, until it is logged."""

    row: dict[str, Any]  # step, expert, lr
    numbers: Copied  # loss and gradient norm of the global batch
    samples: int
    began: float
    waited: float  # seconds for data
    skipped: bool | None  # None: left to the device, and known from the numbers
    seconds: float = field(default=0.0, init=False)

    def end(self) -> None:
        """The host is through with the step."""
        self.seconds = time.perf_counter() - self.began
