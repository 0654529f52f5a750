"""Laws of block by block updates: the bits of one optimizer over all, whatever is streamed; little alive; resumable."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from shared.config import Config
from shared.errors import ConfigError
from shared.models import ModelSpec
from tests.train.make import config as small_config
from tests.train.make import events, make_run
from tests.train.make import trained as checkpointed
from train.blockwise import OUTSIDE, Blockwise, Inner
from train.contradictions import refuse_method_mismatch
from train.lean import LeanOptions, Text, lean_forward
from train.memory import Placement, placements
from train.offload import BlockRunner, place
from train.optim import make_optimizer
from train.run import Run
from train.session import start
from train.updates import is_fused

BLOCKS = 4
SIZES = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16, "text_dim": 32,
         "freq_dim": 32, "ffn_dim": 96, "num_layers": BLOCKS}  # fmt: skip
CPU = torch.device("cpu")
STEPS = 3
PLAIN, BF16 = ("ADAMW", "NEAREST", "FLOAT_32"), ("ADAMW", "STOCHASTIC", "BFLOAT_16")
Kind = tuple[str, str, str]
Made = tuple[Path, ModelSpec, Path]
OTHERS: list[Kind] = [("ADAFACTOR", "STOCHASTIC", "BFLOAT_16"), ("ADAMW", "KAHAN", "BFLOAT_16"),
                      ("ADAMW_8BIT", "STOCHASTIC", "BFLOAT_16")]  # fmt: skip
KINDS = [(PLAIN, "GLOBAL"), (PLAIN, "BLOCK"), (BF16, "GLOBAL"), *((kind, "BLOCK") for kind in OTHERS)]


class Tuned(NamedTuple):
    model: WanTransformer3DModel
    runner: BlockRunner
    optimizer: Blockwise


class Result(NamedTuple):
    numbers: list[float]
    weights: list[Tensor]


def config(kind: Kind, clip: str, micro: float = 1.0) -> Config:
    name, rounding, storage = kind
    return Config(training_method="FINE_TUNE", learning_rate=1e-3, batch_size=2, max_grad_norm=0.02, clip=clip,
                  optimizer={"name": name, "rounding": rounding}, transformer={"weight_dtype": storage},
                  train_dtype=storage, video_config={"video_batch_size_multiplier": micro})  # fmt: skip


def tuned(settings: Config, placement: Placement) -> Tuned:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, settings.train_dtype.lower().replace("_", "")))
    runner = place(model, placement, parked=False, device=CPU, trained=True)

    def make(named: dict[str, nn.Parameter], number: int) -> Inner:
        return make_optimizer(settings.model_copy(update={"seed": number}), named)

    return Tuned(model, runner, Blockwise(make, dict(model.named_parameters()), runner, settings))


def losses(model: WanTransformer3DModel, runner: BlockRunner | None, step: int, micro: int) -> Iterator[Tensor]:
    """The loss of each micro-batch of a step, one after the other."""
    generator = torch.Generator().manual_seed(step)
    dtype = model.patch_embedding.weight.dtype
    latents = torch.randn(2, 16, 3, 4, 4, generator=generator).to(dtype)
    rows = torch.randn(1, 6, 64, generator=generator).to(dtype)
    options = LeanOptions(run_block=runner)
    for part in latents.split(2 // micro):
        text = Text(rows.expand(len(part), -1, -1), None)
        time = torch.full((len(part),), 300.0)
        yield lean_forward(model, part, time, text, options=options).float().square().mean() / micro


def take_steps(learner: Tuned, micro: int, first: int = 0, steps: int = STEPS, more: bool = False) -> Result:
    numbers = []
    for step in range(first, first + steps):
        if more and step == 1:
            learner.runner.may_stream_more = True
            assert learner.runner.stream_more()
        for loss in losses(learner.model, learner.runner, step, micro):
            learner.optimizer.backward(loss)
            numbers.append(loss.item())
        numbers.append(learner.optimizer.clip().item())
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    return Result(numbers, [part.detach().clone() for part in learner.model.parameters()])


def result(kind: Kind, clip: str, placement: Placement, micro: int = 1, more: bool = False) -> Result:
    return take_steps(tuned(config(kind, clip, 1 / micro), placement), micro, more=more)


@cache
def kept(kind: Kind, clip: str, micro: int = 1) -> Result:
    return result(kind, clip, Placement(0, 0), micro)


def same(ours: Result, theirs: Result) -> bool:
    equal = all(torch.equal(left, right) for left, right in zip(ours.weights, theirs.weights, strict=True))
    return ours.numbers == theirs.numbers and equal


@pytest.mark.parametrize(("kind", "clip"), KINDS)
def test_streamed_both_ways_the_bits_are_those_of_fraction_zero(kind: Kind, clip: str) -> None:
    assert is_fused(config(kind, clip)) == (clip == "BLOCK")
    assert same(result(kind, clip, Placement(3, 4)), kept(kind, clip))


@pytest.mark.parametrize("placement", [Placement(1, 1), Placement(2, 3), Placement(4, 4)], ids=str)
@pytest.mark.parametrize("clip", ["GLOBAL", "BLOCK"])
def test_any_number_of_streamed_blocks_gives_the_same_bits(placement: Placement, clip: str) -> None:
    assert same(result(BF16, clip, placement), kept(BF16, clip))


@pytest.mark.parametrize("clip", ["GLOBAL", "BLOCK"])
def test_accumulated_gradients_in_ram_are_those_on_the_device(clip: str) -> None:
    assert not is_fused(config(PLAIN, clip, 0.5))
    assert same(result(PLAIN, clip, Placement(3, 4), micro=2), kept(PLAIN, clip, micro=2))


def test_fused_equals_a_bare_loop_that_clips_each_block() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    groups = [list(block.parameters()) for block in model.blocks]
    inside = {id(part) for group in groups for part in group}
    groups.append([part for part in model.parameters() if id(part) not in inside])
    for step in range(STEPS):
        (loss,) = losses(model, None, step, 1)
        loss.backward()
        for group in groups:
            torch.nn.utils.clip_grad_norm_(group, 0.02)
        optimizer.step()
        optimizer.zero_grad()
    ours = kept(PLAIN, "BLOCK")
    assert all(torch.equal(left, right) for left, right in zip(ours.weights, model.parameters(), strict=True))
    assert not same(ours, kept(PLAIN, "GLOBAL"))


@pytest.mark.parametrize("placement", [Placement(0, 0), Placement(3, 4)], ids=str)
def test_fused_the_gradients_of_one_block_at_most_are_alive(placement: Placement) -> None:
    learner = tuned(config(BF16, "BLOCK"), placement)
    alive: list[set[int]] = []
    for part in learner.optimizer.parts:
        for parameter in part.parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda _: alive.append({each.index for each in learner.optimizer.parts if each.index != OUTSIDE
                                        and any(p.grad is not None for p in each.parameters)})
            )  # fmt: skip
    take_steps(learner, 1)
    assert max(map(len, alive)) == 1


def test_unfused_gradients_of_streamed_matrices_wait_in_ram() -> None:
    learner = tuned(config(PLAIN, "GLOBAL"), Placement(4, 4))
    (loss,) = losses(learner.model, learner.runner, 0, 1)
    learner.optimizer.backward(loss)
    for block in learner.model.blocks:
        assert block.attn1.to_q.weight.grad is None and block.ffn.net[2].weight.grad is None
        assert block.attn1.to_q.bias.grad is not None
    assert sorted(learner.optimizer.gradients.hosts) == [0, 1, 2, 3]


def test_state_of_streamed_blocks_lives_in_ram() -> None:
    learner = tuned(config(PLAIN, "BLOCK"), Placement(3, 4))
    take_steps(learner, 1)
    learner.optimizer.states.release()
    hosts = learner.optimizer.states.hosts
    assert sorted(hosts) == [0, 1, 2]
    ranges = [(host.bytes.data_ptr(), host.bytes.data_ptr() + host.bytes.nbytes) for host in hosts.values()]
    for part in learner.optimizer.parts:
        inside = [any(low <= state["exp_avg"].data_ptr() < high for low, high in ranges)
                  for state in part.optimizer.state.values()]  # type: ignore[union-attr] # fmt: skip
        assert all(inside) if part.index in hosts else not any(inside)


@pytest.mark.parametrize(("kind", "clip"), KINDS)
def test_a_resumed_run_is_bit_equal_also_with_other_blocks_streamed(kind: Kind, clip: str) -> None:
    before = tuned(config(kind, clip), Placement(3, 4))
    take_steps(before, 1, steps=1)
    weights, state = before.model.state_dict(), before.optimizer.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    after = tuned(config(kind, clip), Placement(2, 2))
    with torch.no_grad():
        for name, parameter in after.model.named_parameters():
            parameter.copy_(weights[name])
    after.optimizer.load_state_dict(state)
    rest = take_steps(after, 1, first=1, steps=STEPS - 1)
    whole = kept(kind, clip)
    assert rest.numbers == whole.numbers[2:]
    assert all(torch.equal(left, right) for left, right in zip(rest.weights, whole.weights, strict=True))


@pytest.mark.parametrize("start", [Placement(0, 0), Placement(1, 4)], ids=str)
def test_streaming_more_in_the_middle_of_an_unfused_run_changes_nothing(start: Placement) -> None:
    assert same(result(BF16, "GLOBAL", start, more=True), kept(BF16, "GLOBAL"))


@pytest.mark.parametrize("clip", ["GLOBAL", "BLOCK"])
def test_what_is_not_finite_changes_no_weight(clip: str) -> None:
    learner = tuned(config(PLAIN, clip), Placement(3, 4))
    take_steps(learner, 1, steps=1)
    before = [part.detach().clone() for part in learner.model.blocks.parameters()]
    (loss,) = losses(learner.model, learner.runner, 1, 1)
    learner.optimizer.backward(loss * torch.nan)
    assert clip == "BLOCK" or not learner.optimizer.clip().isfinite()
    learner.optimizer.zero_grad()
    assert all(torch.equal(left, right) for left, right in zip(before, learner.model.blocks.parameters(), strict=True))


@pytest.mark.parametrize("clip", ["GLOBAL", "BLOCK"])
def test_a_run_goes_on_bit_equal_with_averages_and_other_blocks_in_ram(single: Made, tmp_path: Path, clip: str) -> None:
    def run(name: str, steps: int, fraction: float) -> Run:
        settings = small_config(
            single[0], training_method="FINE_TUNE", output_model_format="SAFETENSORS", max_steps=steps, ema=0.9,
            clip=clip, max_grad_norm=0.05, lr_scheduler="CONSTANT", layer_offload_fraction=fraction)  # fmt: skip
        made = make_run(tmp_path / name, settings, single[2])
        start(made, finished=steps > 2 and name == "broken")
        return made

    run("broken", 2, 1.0)
    broken, whole = run("broken", 4, 0.5), run("whole", 4, 0.0)
    for kind in ("weights", "average"):
        ours, theirs = checkpointed(broken, kind=kind), checkpointed(whole, kind=kind)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert events(broken) == events(whole)


@pytest.mark.parametrize("changes", [{"optimizer": {"name": "PRODIGY"}}, {"train_dtype": "FLOAT_16"}], ids=str)
def test_what_must_see_all_gradients_at_once_does_not_stream(changes: dict[str, Any]) -> None:
    asked = Config(training_method="FINE_TUNE", layer_offload_fraction=0.5, **changes)
    with pytest.raises(ConfigError, match=r"layer_offload_fraction=0\.5: .*ADAFACTOR.*AUTO"):
        placements(asked, 30)
    auto = asked.model_copy(update={"layer_offload_fraction": "AUTO"})
    assert not any(placement.streamed for placement in placements(auto, 30))
    values = {"clip": "BLOCK", "output_model_format": "DIFFUSERS", "transformer": {"weight_dtype": "FLOAT_32"}}
    with pytest.raises(ConfigError, match="clip=BLOCK"):
        refuse_method_mismatch(Config(training_method="FINE_TUNE", **changes, **values))
