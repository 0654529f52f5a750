"""`train plan`: will it fit, what was chosen, how long will it take. Nothing is downloaded and no weight is loaded."""

import re
import time

import torch

from shared.bucket import Bucket
from shared.config import BUILT_TRAIN, Config
from shared.errors import ConfigError
from shared.models import ModelSpec
from shared.resolve import Choice, Resolved, refuse_unbuilt, resolve
from train.memory import (
    GIB,
    SLACK,
    MemoryPlan,
    Placement,
    add_up,
    block_cost_of,
    device_budget,
    largest_bucket,
    plan_memory,
    preview_bytes,
    trained_bytes,
    ways_to_fit,
    weight_cost_of,
    with_setting,
)
from train.quantize import TORCH_DTYPES
from train.updates import is_blockwise, is_fused

CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # GiB of cards that are sold
EMBEDDING_CARD = 16  # GiB; the preset's name does not say it
EFFICIENCY = 0.6  # share of the matrix product's rate that a whole step reaches (assumed)
TEXT_BYTES = 8192 * 128  # float16 rows of a caption of 128 tokens


def report(resolved: Resolved, card: float | None, steps: int | None, samples: int | None) -> list[str]:
    """The table of one config, with a verdict. `card`: GiB, or None for the card that is there, or the preset's."""
    config, spec = resolved.config, resolved.spec
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget, source = budget_of(resolved.sources, card, device)
    bucket = largest_bucket(config, spec)
    plan = plan_memory(config, spec, bucket, budget) if budget else smallest_card(config, spec, bucket)
    rows = [(f"device: {name}", size) for name, size in plan.device.items()]
    rows.append(
        (f"device: slack of the allocator, {SLACK - 1:.0%}, and context", plan.need - sum(plan.device.values()))
    )
    rows.append(("device: previews (between steps, not added)", preview_bytes(config, spec, bucket)))
    rows += [(f"RAM: {name}", size) for name, size in plan.host.items()]
    return [
        f"plan (predicted) for {spec.name}, {config.training_method}, {bucket}, one expert at a time",
        *(f"  {name:58} {size / GIB:8.2f} GiB" for name, size in rows if size),
        f"  {'device, all':58} {plan.need / GIB:8.2f} GiB",
        f"  {'RAM, all (of it pinned: checkpoints and streamed blocks)':58} {plan.ram / GIB:8.2f} GiB",
        *sample_lines(spec, config, samples),
        *work_lines(plan, config, steps, device),
        *choice_lines(plan, config, spec),
        *unbuilt(resolved),
        verdict(plan, config, spec, source),
    ]


TABLE_HEAD = (
    "| preset | model | clip | card | device | RAM | blocks streamed | computed again | TFLOP per step |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
FULL_SIZE = ("8gb", "16gb", "24gb", "embedding", "24gb-finetune", "48gb", "cpu")


def table() -> list[str]:
    """The README's table: every preset of the full-size models, on the card it is for."""
    lines = TABLE_HEAD.splitlines()
    for preset in FULL_SIZE:
        tuned = resolve(Choice(preset)).config.trains_dit
        for model in ("ti2v-5b",) if tuned or preset == "cpu" else ("ti2v-5b", "t2v-a14b", "i2v-a14b"):
            resolved = resolve(Choice(preset, None, model))
            config, spec = resolved.config, resolved.spec
            budget, _ = budget_of(resolved.sources, None, torch.device("cpu"))
            bucket = largest_bucket(config, spec)
            plan = plan_memory(config, spec, bucket, budget) if budget else smallest_card(config, spec, bucket)
            card = f"{budget // GIB} GiB" if budget else "CPU"
            ram = f"{plan.ram / GIB:.1f}" if budget else "the same"
            streamed, again = f"{plan.placement.streamed} of {plan.blocks}", str(plan.placement.recomputed)
            flops = f"{plan.step_flops / 1e12:.0f}"
            cells = [preset, model, str(bucket), card, f"{plan.need / GIB:.1f}", ram, streamed, again, flops]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def smallest_card(config: Config, spec: ModelSpec, bucket: Bucket) -> MemoryPlan:
    """The plan for the smallest card that is enough."""
    plans = (plan_memory(config, spec, bucket, size * GIB) for size in CARDS)
    return next((plan for plan in plans if plan.fits), plan_memory(config, spec, bucket, CARDS[-1] * GIB))


def budget_of(sources: dict[str, str], card: float | None, device: torch.device) -> tuple[int | None, str]:
    """(bytes, where the number is from): the user, the card that is there, the preset's name, or nothing."""
    if card is not None:
        return int(card * GIB), f"a card of {card:g} GiB"
    if device.type == "cuda":
        return device_budget(device), torch.cuda.get_device_name(device)
    for source in sources.values():
        if named := re.match(r"preset (?:(\d+)gb|embedding)", source):
            size = int(named[1] or EMBEDDING_CARD)
            return size * GIB, f"the {size} GiB card this preset is for"
    return None, ""


def sample_lines(spec: ModelSpec, config: Config, samples: int | None) -> list[str]:
    """Store bytes per sample, and of all when their number is known."""
    bucket = largest_bucket(config, spec)
    channels, frames, height, width = spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    copies = 2 if spec.image_condition == "concat" else 1
    size = 2 * channels * frames * height * width * copies + TEXT_BYTES
    total = f", {size * samples / GIB:.2f} GiB for {samples} samples" if samples else ""
    return [f"  store: {size / (1 << 20):.2f} MiB per sample and caption of 128 tokens{total}"]


def work_lines(plan: MemoryPlan, config: Config, steps: int | None, device: torch.device) -> list[str]:
    """Tokens, FLOPs, steps, and time where a card can be measured."""
    lines = [f"  work: {plan.tokens // plan.micro_batch} tokens per sample, micro-batch {plan.micro_batch}, "
             f"{plan.step_flops / 1e12:.1f} TFLOP per step"]  # fmt: skip
    lines.append(f"  steps: {steps}" if steps else "  steps: known after make encode, or with max_steps")
    if device.type == "cuda" and steps:
        seconds = plan.step_flops / (matmul_rate(device, config) * EFFICIENCY)
        lines.append(
            f"  time: {seconds:.2f} s per step, {seconds * steps / 3600:.1f} h (predicted from this card's matmul)"
        )
    elif steps:
        lines.append("  time: no CUDA card here to measure; FLOPs per step / (0.6 x the card's rate) is the estimate")
    return lines


def matmul_rate(device: torch.device, config: Config, size: int = 4096, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product in train_dtype."""
    matrix = torch.randn(size, size, device=device).to(TORCH_DTYPES[config.train_dtype])
    float((matrix @ matrix)[0, 0])  # reading a value waits for the card
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        float((matrix @ matrix)[0, 0])
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def choice_lines(plan: MemoryPlan, config: Config, spec: ModelSpec) -> list[str]:
    """What was chosen, and what the fastest and the smallest choice would need."""
    placed, blocks = plan.placement, plan.blocks
    fast, small = Placement(0, 0), Placement(blocks, blocks)

    def need(placement: Placement) -> str:
        bucket = largest_bucket(config, spec)
        costs = weight_cost_of(spec, config), block_cost_of(spec, config, bucket)
        return f"{add_up(config, spec, costs, (bucket, placement), None).need / GIB:.1f} GiB"

    chosen = "AUTO chose" if config.layer_offload_fraction == "AUTO" else "asked for:"
    lines = [f"  {chosen} {placed.streamed} of {blocks} blocks streamed from RAM (layer_offload_fraction "
             f"{placed.streamed / blocks:.2f}), {placed.recomputed} computed again in the backward"]  # fmt: skip
    if placed != fast:
        lines.append(f"  faster: all blocks kept, none computed again, needs {need(fast)}")
    if placed != small and (not config.trains_dit or is_blockwise(config)):
        lines.append(f"  smaller: all blocks streamed and computed again needs {need(small)}")
    return lines + update_lines(plan, config, spec)


def update_lines(plan: MemoryPlan, config: Config, spec: ModelSpec) -> list[str]:
    """Of a full fine-tune: when updates are made, and what the other way costs."""
    if not is_blockwise(config):
        return []
    if is_fused(config):
        return ["  updates: each block's inside the backward; the gradients of one block at most are alive"]
    at_once = with_setting(with_setting(config, "clip", "BLOCK"), "video_config.video_batch_size_multiplier", 1.0)
    weights = weight_cost_of(spec, config)
    ours, theirs = (sum(sum(part.values()) for part in trained_bytes(each, weights, plan.placement.streamed))
                    for each in (config, at_once))  # fmt: skip
    return [f"  updates: after the backward, for the global norm or accumulated micro-batches; inside it (clip=BLOCK, "
            f"all of the batch at once) gradients take {(ours - theirs) / GIB:.1f} GiB less"]  # fmt: skip


def unbuilt(resolved: Resolved) -> list[str]:
    """A line when training would refuse the config for now."""
    try:
        refuse_unbuilt(resolved.config, resolved.sources, BUILT_TRAIN)
    except ConfigError as error:
        return [f"  note: {error}"]
    return []


def verdict(plan: MemoryPlan, config: Config, spec: ModelSpec, source: str) -> str:
    """The last line."""
    if plan.budget is None:
        fitting = next((size for size in CARDS if plan.need <= size * GIB), None)
        return (
            f"verdict: needs a card of {fitting} GiB" if fitting else "verdict: larger than any single card of 80 GiB"
        )
    if plan.fits:
        return f"verdict: fits {source}, {(plan.budget - plan.need) / GIB:.1f} GiB are left"
    ways = " or ".join(f'SET="{way}"' for way in ways_to_fit(config, spec, plan.budget)) or "a smaller model only"
    return f"verdict: does not fit {source or f'a card of {CARDS[-1]} GiB'}; it would with {ways}"
