"""Laws of streaming: the numbers of fraction 0 bit for bit, few copies, nothing left behind, nothing written back."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import inject_adapter_in_model
from torch import Tensor

from shared.config import Config
from train.adapter import peft_settings
from train.lean import LeanOptions, Text, lean_forward
from train.memory import Placement
from train.offload import BlockRunner, Parking, place, spread, with_room
from train.quantize import QuantizedLinear, quantize_blocks

BLOCKS = 5
SIZES = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16, "text_dim": 32,
         "freq_dim": 32, "ffn_dim": 160, "num_layers": BLOCKS}  # fmt: skip
CPU = torch.device("cpu")
PLACEMENTS = [Placement(1, 1), Placement(2, 2), Placement(2, 4), Placement(3, 5), Placement(5, 5)]


class Result(NamedTuple):
    losses: list[float]
    weights: list[Tensor]
    text_grad: Tensor | None


def trained(
    dtype: str, placement: Placement, parked: bool = False, text: bool = False, more: bool = False, kind: str = "LORA"
) -> tuple[Result, BlockRunner]:
    """Two AdamW steps of two micro-batches each, LoRA or text rows trained, and a validation in between."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES).requires_grad_(False)
    quantize_blocks(model, dtype)
    runner = place(model, placement, parked, CPU)
    if parked:
        assert runner.parking is not None
        runner.parking.least = 0
    if not text:
        asked = Config(peft_type=kind, lora_rank=4, lora_alpha=4.0)  # of the default targets, all ten linears
        settings = peft_settings(asked)
        settings.init_weights = settings.init_lora_weights = False  # type: ignore[attr-defined]
        inject_adapter_in_model(settings, model)
    options = LeanOptions(run_block=runner)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 16, 3, 8, 8, generator=generator)
    rows = torch.randn(1, 6, 64, generator=generator, requires_grad=text)
    learned = [part for part in model.parameters() if part.requires_grad] or [rows]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    losses = []
    for number, latent in enumerate(latents.split(1)):
        if more and number == 2:
            runner.may_stream_more = True
            assert runner.stream_more()
        loss = lean_forward(model, latent, torch.tensor([300.0]), Text(rows, None), options=options).square().mean()
        loss.backward()
        losses.append(loss.item())
        if number % 2:
            grad = None if rows.grad is None else rows.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                held_out = lean_forward(model, latents[:1], torch.tensor([900.0]), Text(rows, None), options=options)
            losses.append(held_out.square().mean().item())
    return Result(losses, [part.detach().clone() for part in learned], grad), runner


@cache
def kept(dtype: str) -> Result:
    return trained(dtype, Placement(0, 0))[0]


CASES = [("FLOAT_8", placement) for placement in PLACEMENTS] + [
    (dtype, Placement(3, 5)) for dtype in ("FLOAT_32", "BFLOAT_16", "NFLOAT_4", "INT_8")
]


@pytest.mark.parametrize(("dtype", "placement"), CASES, ids=str)
def test_training_is_bit_equal_to_fraction_zero(dtype: str, placement: Placement) -> None:
    reference = kept(dtype)
    streamed, _ = trained(dtype, placement)
    assert streamed.losses == reference.losses
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(streamed.weights, reference.weights, strict=True))


@pytest.mark.parametrize(
    ("kind", "placement"),
    [("DORA", Placement(3, 5)), ("DORA", Placement(5, 5)), ("LOHA", Placement(3, 5)), ("LOKR", Placement(3, 5))],
    ids=str,
)
def test_other_kinds_of_adapter_train_on_streamed_weights(kind: str, placement: Placement) -> None:
    """DoRA reads the streamed weights themselves, for its norms."""
    reference, _ = trained("FLOAT_8", Placement(0, 0), kind=kind)
    streamed, _ = trained("FLOAT_8", placement, kind=kind)
    assert streamed.losses == reference.losses
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(streamed.weights, reference.weights, strict=True))


def test_gradients_of_text_rows_pass_through_streamed_blocks() -> None:
    reference, _ = trained("FLOAT_8", Placement(0, 0), text=True)
    streamed, _ = trained("FLOAT_8", Placement(3, 5), text=True)
    assert streamed.text_grad is not None
    assert torch.equal(streamed.text_grad, reference.text_grad)
    assert streamed.losses == reference.losses


@pytest.mark.parametrize("placement", [Placement(0, 5), Placement(0, 3), Placement(3, 5)], ids=str)
def test_parked_inputs_change_nothing_and_only_checkpointed_blocks_park(placement: Placement) -> None:
    reference = kept("FLOAT_32")
    parked, runner = trained("FLOAT_32", placement, parked=True)
    assert parked.losses == reference.losses
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parked.weights, reference.weights, strict=True))
    assert len(runner.recomputed) == placement.recomputed
    assert runner.parking is not None
    assert runner.parking.waiting == []  # everything that went came back


def test_an_input_comes_back_before_it_is_asked_for() -> None:
    parking = Parking(CPU, least=0)
    parked = [parking.park(torch.full((3,), float(number))) for number in range(3)]
    assert torch.equal(parking.fetch(parked[2]), torch.full((3,), 2.0))
    assert parked[1].tensor is not None
    assert parked[0].tensor is None


@pytest.mark.parametrize(("streamed", "copies"), [(1, 1), (2, 2), (3, 3 + 8 + 2), (5, 5 + 8 * 3 + 5)])
def test_a_pass_copies_only_blocks_that_are_not_in_the_buffers(streamed: int, copies: int) -> None:
    # 4 forwards and backwards and 2 lone forwards: the very first pass copies all; each turn-round finds both buffers
    # of use; the forward after a lone one finds none of its first blocks there, or one of three
    _, runner = trained("FLOAT_8", Placement(streamed, 5))
    assert runner.ring is not None
    assert runner.ring.copies == copies


def test_streamed_matrices_are_on_the_device_in_two_buffers_only() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES).requires_grad_(False)
    matrices = sum(part.nbytes for part in model.blocks[0].parameters() if part.ndim == 2)
    runner = place(model, Placement(4, 5), parked=False, device=CPU)
    assert runner.ring is not None
    before = {index: host.bytes.clone() for index, host in runner.ring.hosts.items()}
    resident = [module for block in model.blocks for module in block.modules() if isinstance(module, QuantizedLinear)]
    assert all(module.codes.numel() == 0 for module in resident)
    assert sum(slot.nbytes for slot in runner.ring.slots) == 2 * matrices
    with torch.no_grad():
        lean_forward(model, torch.randn(1, 16, 3, 8, 8), torch.tensor([1.0]), Text(torch.randn(1, 3, 64), None),
                     options=LeanOptions(run_block=runner))  # fmt: skip
    slots = {slot.untyped_storage().data_ptr() for slot in runner.ring.slots}
    assert {module.codes.untyped_storage().data_ptr() for module in resident if module.codes.numel()} == slots
    assert sum(module.codes.nbytes for module in resident) == 2 * matrices
    assert all(torch.equal(host.bytes, before[index]) for index, host in runner.ring.hosts.items())


@pytest.mark.parametrize("start", [Placement(0, 0), Placement(2, 5)], ids=str)
def test_streaming_more_in_the_middle_of_a_run_changes_nothing(start: Placement) -> None:
    reference = kept("FLOAT_8")
    grown, runner = trained("FLOAT_8", start, more=True)
    assert runner.ring is not None
    assert len(runner.ring.hosts) > start.streamed
    assert grown.losses == reference.losses
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grown.weights, reference.weights, strict=True))
    while runner.stream_more():
        pass
    assert len(runner.ring.hosts) == BLOCKS


def test_an_attempt_that_runs_out_of_memory_is_made_once_more_with_room() -> None:
    room: list[int] = []

    def attempt() -> int:
        if len(room) < 1:
            raise torch.OutOfMemoryError("no room")
        return len(room)

    assert with_room(attempt, lambda: not room.append(1)) == 1
    room.clear()
    with pytest.raises(torch.OutOfMemoryError):
        with_room(attempt, lambda: False)


def test_streamed_blocks_are_spread_evenly() -> None:
    assert [spread(count, 10) for count in (0, 1, 3, 5, 10)] == [[], [0], [0, 3, 6], [0, 2, 4, 6, 8], list(range(10))]


def test_reading_a_streamed_weight_outside_its_turn_fails_loudly() -> None:
    model = WanTransformer3DModel(**SIZES).requires_grad_(False)
    place(model, Placement(5, 5), parked=False, device=CPU)
    with pytest.raises(RuntimeError):
        model.blocks[0].attn1.to_q(torch.randn(1, 64))
