"""`train plan`: will it fit, what was chosen, how long will it take. Nothing is downloaded and no weight is loaded."""

import re
import time

import torch

from shared.config import Config
from shared.errors import ConfigError
from shared.models import ModelSpec
from shared.resolve import Choice, Resolved, resolve
from train.contradictions import refuse_contradictions
from train.fit import shortage, ways_said, with_setting
from train.group import Group, refuse_undivided
from train.memory import (
    GIB,
    SLACK,
    MemoryPlan,
    Placement,
    Room,
    add_up,
    available_ram,
    block_cost_of,
    largest_bucket,
    placements,
    plan_memory,
    preview_bytes,
    room_of,
    weight_cost_of,
)
from train.quantize import TORCH_DTYPES
from train.states import SLOTS, trained_bytes
from train.updates import is_blockwise, is_fused, processes, processes_here

EMBEDDING_CARD = 16  # GiB; the preset's name does not say it
EFFICIENCY = 0.6  # share of the matrix product's rate that a whole step reaches (assumed)
TEXT_BYTES = 8192 * 128  # float16 rows of a caption of 128 tokens


def report(resolved: Resolved, card: float | None, steps: int | None, samples: int | None) -> list[str]:
    """The table of one config, with a verdict. `card`: GiB, or None for the card that is there, or the preset's."""
    config, spec = resolved.config, resolved.spec
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    room, source = room_for(resolved.sources, card, device)
    bucket = largest_bucket(config, spec)
    plan = plan_memory(config, spec, bucket, room)
    several = f", each of {processes()} processes" if processes() > 1 else ""
    return [
        f"plan (predicted) for {spec.name}, {config.training_method}, {bucket}, one expert at a time{several}",
        *memory_lines(plan, preview_bytes(config, spec, bucket)),
        *sample_lines(spec, config, samples),
        *work_lines(plan, config, steps, device),
        *choice_lines(plan, config, spec),
        *refusals(resolved),
        verdict(plan, config, spec, source),
    ]


def memory_lines(plan: MemoryPlan, preview: int) -> list[str]:
    """Bytes by purpose, on the device and in RAM, and their sums."""
    rows = [(f"device: {name}", size) for name, size in plan.device.items()]
    if plan.room.gpu:
        slack = plan.need - sum(plan.device.values())
        rows.append((f"device: slack of the allocator, {SLACK - 1:.0%}, and context", slack))
    rows += [(f"RAM: {name}", size) for name, size in plan.host.items()]
    rows.append((f"{'device' if plan.room.gpu else 'RAM'}: previews (between steps, not added)", preview))
    if plan.room.gpu:
        rows.append(("device, all", plan.need))
    rows.append(("RAM, all", plan.ram))
    if plan.pinned:
        rows.append(("RAM, of it pinned", plan.pinned))
    return [f"  {name:58} {size / GIB:8.2f} GiB" for name, size in rows if size]


TABLE_HEAD = (
    "| preset | model | clip | card | device | RAM | pinned | blocks streamed | computed again | TFLOP per step |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
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
            card = card_of(resolved.sources)
            bucket = largest_bucket(config, spec)
            plan = plan_memory(config, spec, bucket, Room(card * GIB) if card else Room(None, gpu=False))
            on_card = (f"{card} GiB", f"{plan.need / GIB:.1f}") if card else ("none", "-")
            ram = f"{plan.ram / GIB:.1f}", f"{plan.pinned / GIB:.1f}"
            placed = f"{plan.placement.streamed} of {plan.blocks}", str(plan.placement.recomputed)
            cells = [preset, model, str(bucket), *on_card, *ram, *placed, f"{plan.step_flops / 1e12:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def room_for(sources: dict[str, str], card: float | None, device: torch.device) -> tuple[Room, str]:
    """What there is, and its name: the user's card, the card that is here, the preset's card, or this computer's RAM.

    RAM is judged where it will be used: beside the card that is here, or without any.
    """
    here = room_of(device)
    if card is not None:
        return Room(int(card * GIB), here.ram if here.gpu else None), f"a card of {card:g} GiB"
    if here.gpu:
        return here, torch.cuda.get_device_name(device)
    if size := card_of(sources):
        return Room(size * GIB), f"the {size} GiB card this preset is for"
    return here, "this computer, on its CPU"


def card_of(sources: dict[str, str]) -> int | None:
    """GiB of the card that the preset is for; None: it is for none."""
    for source in sources.values():
        if named := re.match(r"preset (?:(\d+)gb|embedding)", source):
            return int(named[1] or EMBEDDING_CARD)
    return None


def sample_lines(spec: ModelSpec, config: Config, samples: int | None) -> list[str]:
    """Store bytes per sample, and of all when their number is known."""
    bucket = largest_bucket(config, spec)
    channels, frames, height, width = spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    copies = 2 if spec.image_condition == "concat" else 1
    size = 2 * channels * frames * height * width * copies + TEXT_BYTES
    total = f", {size * samples / GIB:.2f} GiB for {samples} samples" if samples else ""
    return [f"  store: {size / (1 << 20):.2f} MiB per sample and caption of 128 tokens{total}"]


def work_lines(plan: MemoryPlan, config: Config, steps: int | None, device: torch.device) -> list[str]:
    """Tokens, FLOPs, steps, and time where the device that will train is here to be measured."""
    lines = [f"  work: {plan.tokens // plan.micro_batch} tokens per sample, micro-batch {plan.micro_batch}, "
             f"{tera(plan.step_flops)} TFLOP per step"]  # fmt: skip
    lines.append(f"  steps: {steps}" if steps else "  steps: known after make encode, or with max_steps")
    if plan.room.gpu != (device.type == "cuda"):
        return [*lines, f"  time: no card here to measure; TFLOP per step / ({EFFICIENCY} x the card's rate) is the "
                "estimate"]  # fmt: skip
    seconds = plan.step_flops / (matmul_rate(device, config) * EFFICIENCY)
    total = f", {seconds * steps / 3600:.2g} h in all" if steps else ""
    return [*lines, f"  time: {seconds:.2g} s per step{total} (predicted from the rate of a matrix product now)"]


def tera(flops: int) -> str:
    """Two digits at least."""
    return f"{flops / 1e12:.2g}" if flops < 1e13 else f"{flops / 1e12:.0f}"


def matmul_rate(device: torch.device, config: Config, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product in train_dtype."""
    size = 4096 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(TORCH_DTYPES[config.train_dtype])
    float((matrix @ matrix)[0, 0])  # reading a value waits for the card
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        float((matrix @ matrix)[0, 0])
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def choice_lines(plan: MemoryPlan, config: Config, spec: ModelSpec) -> list[str]:
    """What was chosen; the choices next to it, and the fastest and the smallest, each with what it takes."""
    placed, blocks = plan.placement, plan.blocks
    bucket = largest_bucket(config, spec)
    costs = weight_cost_of(spec, config), block_cost_of(spec, config, bucket)
    free = config.model_copy(update={"layer_offload_fraction": "AUTO"})
    every = [place for place in placements(free, blocks) if plan.room.gpu or not place.streamed]

    def cost(place: Placement) -> str:
        there = add_up(config, spec, costs, (bucket, place), plan.room)
        copied = 2 * max(place.streamed - SLOTS, 0) * costs[0].block_matrices * config.batch_size // plan.micro_batch
        return (f"{place.streamed} streamed, {place.recomputed} computed again: "
                f"{(there.need if plan.room.gpu else there.ram) / GIB:.1f} GiB, {tera(there.step_flops)} TFLOP"
                + (f" and {copied / GIB:.1f} GiB of weights copied per step" if copied else " per step"))  # fmt: skip

    chosen = "AUTO chose" if config.layer_offload_fraction == "AUTO" else "asked for:"
    lines = [f"  {chosen} {placed.streamed} of {blocks} blocks streamed from RAM (layer_offload_fraction "
             f"{placed.streamed / blocks:.2f}), {placed.recomputed} computed again in the backward"]  # fmt: skip
    if placed in every:
        number = every.index(placed)
        near = {"next faster": number - 1, "fastest": 0, "next smaller": number + 1, "smallest": len(every) - 1}
        seen = {number}
        for name, index in near.items():
            if 0 <= index < len(every) and index not in seen:
                seen.add(index)
                lines.append(f"  {name + ':':13} {cost(every[index])}")
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


def refusals(resolved: Resolved) -> list[str]:
    """A line when training would refuse the config for another reason than memory."""
    try:
        refuse_contradictions(resolved.config, resolved.spec)
        refuse_undivided(resolved.config, Group(world=processes()))
    except ConfigError as error:
        return [f"  note: make train refuses this: {error}"]
    return []


def verdict(plan: MemoryPlan, config: Config, spec: ModelSpec, source: str) -> str:
    """The last line."""
    if short := shortage(plan):
        return f"verdict: does not fit {source}: it needs {short}; it fits with {ways_said(config, spec, plan.room)}"
    if not plan.room.gpu:
        left = "" if plan.room.ram is None else f", {(plan.room.ram - plan.ram) / GIB:.1f} GiB of RAM are left"
        return f"verdict: fits {source}{left} (for a GPU, name its GiB: CARD=16)"
    assert plan.room.device is not None
    ram = f"{plan.ram / GIB:.1f} GiB of RAM are needed beside it"
    if plan.room.ram is None and plan.ram > (here := available_ram() // processes_here()):
        ram += f" (this computer could give a process {here / GIB:.1f} GiB now)"
    return f"verdict: fits {source}, {(plan.room.device - plan.need) / GIB:.1f} GiB are left; {ram}"
