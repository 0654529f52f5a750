"""The way of a batch to the device: the numbers are those of a plain read; on a GPU no host waits for a copy."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.models import ModelSpec
from shared.store_read import StoreReader
from tests.train.make import config, listed
from train.data import Plan, Slots, load_step
from train.feed import Lane, prefetch
from train.flow import SigmaLaw
from train.group import Group

Made = tuple[Path, ModelSpec, Path]
LAW = SigmaLaw("UNIFORM", 3.0)
GPU = torch.device("cuda")


class Stream:
    """Stands for a CUDA stream: notes what is asked of it, in `said`."""

    said: list[Any]

    def __init__(self, said: list[Any]) -> None:
        self.said = said

    def record_event(self) -> str:
        self.said.append("copied")
        return "arrived"

    def wait_event(self, event: str) -> None:
        self.said.append(("wait", event))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU whose memory is the host's and whose streams do nothing; returns what it was asked to do, in order."""
    said: list[Any] = []
    plain = torch.Tensor.to

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(device, torch.device) and device.type == "cuda":
            said.append(("copy", tensor.data_ptr(), non_blocking))
            return tensor.clone()
        return plain(tensor, device)

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.clone()
        said.append(("pin", pinned.data_ptr()))
        return pinned

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: said.append(("keep", tensor.data_ptr())))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(said))
    return said


def first_step(made: Made) -> list[Slots]:
    model, spec, store = made
    settings = config(model, first_frame_conditioning_probability=0.9)
    draws = Plan([listed(number, spec) for number in range(10)], settings, 4).batch(0)
    return load_step(StoreReader([store]), settings, LAW, 0, draws)


def tensors(batch: list[Slots]) -> list[torch.Tensor]:
    clean = [slots.frames.clean_B for slots in batch if slots.frames.clean_B is not None]
    return [tensor for slots in batch for tensor in slots.tensors().values()] + clean


def test_a_batch_on_its_way_is_the_batch_that_was_read(single: Made) -> None:
    model, spec, store = single
    plan = Plan([listed(number, spec) for number in range(10)], config(model), 4)
    batches = list(prefetch(StoreReader([store]), plan, LAW, (2, 7), Group()))
    assert len(batches) == 5
    for step, batch in enumerate(batches, 2):
        read = load_step(StoreReader([store]), plan.config, LAW, step, plan.batch(step))
        assert [slots.captions for slots in batch] == [slots.captions for slots in read]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors(batch), tensors(read), strict=True))


def test_every_tensor_is_pinned_before_a_copy_that_nobody_waits_for(single: Made, said: list[Any]) -> None:
    read = first_step(single)
    count = len(tensors(read))
    assert count == 6  # latent, noise, sigma, weight, prior, clean
    Lane(GPU, Stream(said)).send(read)  # type: ignore[arg-type]
    copies = [entry for entry in said if entry[0] == "copy"]
    assert [entry[1] for entry in said if entry[0] == "pin"] == [pointer for _, pointer, _ in copies]
    assert len(copies) == count and all(non_blocking for _, _, non_blocking in copies)
    assert said[-1] == "copied"


def test_the_computation_waits_for_the_copy_and_its_memory_is_kept_until_then(single: Made, said: list[Any]) -> None:
    read = first_step(single)
    lane = Lane(GPU, Stream(said))  # type: ignore[arg-type]
    batch, arrived = lane.send(read)
    said.clear()
    received = lane.receive(batch, arrived)
    assert said == [("wait", "arrived"), *(("keep", pointer) for _, pointer in said[1:])]
    assert {pointer for _, pointer in said[1:]} == {tensor.data_ptr() for tensor in tensors(received)}
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors(received), tensors(read), strict=True))


def test_what_is_on_the_device_is_not_copied_again(single: Made) -> None:
    (slots,) = first_step(single)
    again = slots.on(torch.device("cpu"))
    assert again.noise_BCthw is slots.noise_BCthw and again.sigma_B is slots.sigma_B
