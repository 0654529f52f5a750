"""When it does not fit: what is short and what would change that; after a run: what was predicted, and what it took.

Input: a MemoryPlan. Nothing is loaded; each change that is proposed was planned like the config itself.
"""

import resource
from pathlib import Path
from typing import Any

import torch

from shared.config import Config
from shared.errors import ConfigError, RunError
from shared.models import ModelSpec
from shared.resolve import merge, nest, to_json, value_at
from train.contradictions import refuse_contradictions
from train.group import Group, refuse_undivided
from train.memory import CONTEXT, GIB, MemoryPlan, Room, largest_bucket, plan_memory
from train.updates import processes

LESS = 0.9  # of the room that was there: what to plan for after it was not enough


def with_setting(config: Config, key: str, value: Any) -> Config:
    """A config with one setting changed."""
    values = to_json(config)
    merge(values, nest(key, value))
    return Config.model_validate(values)


def changes(config: Config, ram_is_short: bool) -> list[tuple[str, Any]]:
    """Settings that save memory, the cheapest for speed and quality first."""
    fine_tune = config.trains_dit
    stored = config.transformer.weight_dtype
    smaller = {"FLOAT_32": "BFLOAT_16", "BFLOAT_16": "FLOAT_8", "FLOAT_16": "FLOAT_8", "FLOAT_8": "NFLOAT_4",
               "INT_8": "NFLOAT_4"}.get(stored)  # fmt: skip
    checkpointing = "DEFAULT" if ram_is_short else "CPU_OFFLOADED"
    wishes: list[tuple[str, Any]] = [("gradient_checkpointing", checkpointing), ("layer_offload_fraction", "AUTO")]
    if smaller and (not fine_tune or stored == "FLOAT_32"):
        wishes.append(("transformer.weight_dtype", smaller))
    if fine_tune:
        wishes += [("clip", "BLOCK"), ("optimizer.name", "ADAFACTOR")]
    wishes += [("video_config.video_batch_size_multiplier", 1 / config.batch_size), ("batch_size", 1)]
    if config.training_method == "LORA":
        wishes.append(("lora_rank", max(4, config.lora_rank // 2)))
    wishes += [("frames", 9), ("resolution", "384"), ("resolution", "256")]
    return [(key, value) for key, value in wishes if value_at(config, key) != value]


def is_legal(config: Config, spec: ModelSpec) -> bool:
    """Whether training would take a config, its memory apart."""
    try:
        refuse_contradictions(config, spec)
        refuse_undivided(config, Group(world=processes()))
    except ConfigError:
        return False
    return True


def ways_to_fit(config: Config, spec: ModelSpec, room: Room) -> list[str]:
    """The two cheapest changes that fit, each as SET text; or one that adds up changes until it fits."""

    def planned(wish: Config) -> MemoryPlan:
        return plan_memory(wish, spec, largest_bucket(wish, spec), room)

    found: list[str] = []
    together, said = config, list[str]()
    for key, value in changes(config, not planned(config).fits_ram):
        if is_legal(alone := with_setting(config, key, value), spec) and planned(alone).fits:
            found.append(f"{key}={value}")
        if len(found) == 2:
            return found
        if not found and is_legal(more := with_setting(together, key, value), spec):
            together, said = more, [*said, f"{key}={value}"]
            if len(said) > 1 and planned(together).fits:
                return [" ".join(said)]
    return found


def ways_said(config: Config, spec: ModelSpec, room: Room) -> str:
    """Those changes for the end of a sentence."""
    return " or ".join(f'SET="{way}"' for way in ways_to_fit(config, spec, room)) or "a smaller model only (MODEL=)"


def shortage(plan: MemoryPlan) -> str:
    """What a plan needs more of than there is: '15.6 GiB, the device has 8.0 GiB'; empty when it fits."""
    short = []
    if plan.room.device is not None and not plan.fits_device:
        short.append(f"{plan.need / GIB:.1f} GiB, the device has {plan.room.device / GIB:.1f} GiB")
    if plan.room.ram is not None and not plan.fits_ram:
        short.append(f"{plan.ram / GIB:.1f} GiB of RAM, this process can have {max(0, plan.room.ram) / GIB:.1f} GiB")
    return "; and ".join(short)


def refuse_if_too_large(plan: MemoryPlan, config: Config, spec: ModelSpec) -> None:
    """Raise RunError, before anything is loaded, when device or RAM are too small."""
    if short := shortage(plan):
        raise RunError(f"{spec.name} with this config needs {short}; it fits with {ways_said(config, spec, plan.room)} "
                       "(make plan shows the table)")  # fmt: skip


def out_of_memory(plan: MemoryPlan, config: Config, spec: ModelSpec, saved: Path | None) -> RunError:
    """The error of a run that ran out of device memory: numbers, the change to make, and where it goes on from."""
    took = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    room = Room(int(LESS * (plan.room.device or plan.need)), plan.room.ram)
    ways = ways_to_fit(config, spec, room) or ["batch_size=1"]
    kept = f"go on from {saved}" if saved is not None else "no checkpoint is there yet, start again"
    return RunError(
        f"out of device memory: {took / GIB:.1f} GiB allocated at most, {plan.need / GIB:.1f} GiB predicted; "
        f'{kept}, with SET="{ways[0]}"'
    )


def measured_peaks(plan: MemoryPlan, device: torch.device) -> dict[str, Any]:
    """For memory.json: what a run took at its peak beside what was predicted, in GiB, and how that adds up."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pairs = {"RAM of the process": (plan.ram, peak)}
    if device.type == "cuda":
        pairs["device, allocated"] = sum(plan.device.values()), torch.cuda.max_memory_allocated(device)
        pairs["device, reserved by the allocator"] = plan.need - CONTEXT, torch.cuda.max_memory_reserved(device)
    placed = plan.placement
    return {
        "unit": "GiB",
        **{name: {"predicted": in_gib(ours), "measured": in_gib(took)} for name, (ours, took) in pairs.items()},
        "could have": {"device": in_gib(plan.room.device), "RAM": in_gib(plan.room.ram)},
        "predicted on the device": {name: in_gib(size) for name, size in plan.device.items()},
        "predicted in RAM": {name: in_gib(size) for name, size in plan.host.items()},
        "blocks": {"all": plan.blocks, "streamed": placed.streamed, "computed again": placed.recomputed},
    }


def in_gib(size: int | None) -> float | None:
    """Rounded to a MiB."""
    return None if size is None else round(size / GIB, 3)
