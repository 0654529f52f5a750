"""Batches on the device before the step that uses them. Input: reader, plan. Output: micro-batches, in order.

Threads read ahead; on a GPU they also start the copy, from pinned memory on a stream of its own, so that neither the
host nor the computation waits for it. On the CPU the same code runs; streams and events are then absent.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from shared.store_read import StoreReader
from train.data import Draw, Plan, Slots, load_step
from train.flow import SigmaLaw
from train.group import Group
from train.offload import side_stream

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Lane:
    """The way of batches to the device: copies run on a stream of their own, beside the computation; none on a CPU."""

    device: torch.device
    side: torch.cuda.Stream | None

    @classmethod
    def to(cls, device: torch.device) -> "Lane":
        """A lane to a device."""
        return cls(device, side_stream(device))

    def send(self, batch: list[Slots]) -> tuple[list[Slots], torch.cuda.Event | None]:
        """Start the copies of a batch, from a reader's thread; the event comes when they are there."""
        if self.side is None:
            return [slots.to(self.device) for slots in batch], None
        with torch.cuda.stream(self.side):
            return [slots.to(self.device) for slots in batch], self.side.record_event()

    def receive(self, batch: list[Slots], arrived: torch.cuda.Event | None) -> list[Slots]:
        """From here on the computation may use the batch; its memory is free again after that, not before."""
        if arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for slots in batch:
                clean = [] if slots.frames.clean_B is None else [slots.frames.clean_B]
                for tensor in (*slots.tensors().values(), *clean):
                    tensor.record_stream(current)
        return batch


def prefetch(
    reader: StoreReader, plan: Plan, law: SigmaLaw, span: tuple[int, int], group: Group, device: torch.device = CPU
) -> Iterator[list[Slots]]:
    """Micro-batches of the steps of `span` in order, on the device, read ahead by `dataloader_threads` threads."""
    config, lane = plan.config, Lane.to(device)

    def load(step: int, draws: list[Draw]) -> tuple[list[Slots], torch.cuda.Event | None]:
        return lane.send(load_step(reader, config, law, step, draws, group))

    with ThreadPoolExecutor(config.dataloader_threads, "reader") as pool:
        waiting: deque[Future[tuple[list[Slots], torch.cuda.Event | None]]] = deque()
        try:
            for step in range(*span):
                waiting.append(pool.submit(load, step, plan.batch(step)))
                if len(waiting) > 2 * config.dataloader_threads:
                    yield lane.receive(*waiting.popleft().result())
            while waiting:
                yield lane.receive(*waiting.popleft().result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
