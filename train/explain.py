"""`train explain`: every setting with the source of its value, and what follows from them. Loads no weights."""

import json
from pathlib import Path
from typing import Any

from shared.config import Config, leaf_keys
from shared.geometry import geometry
from shared.resolve import Resolved, to_json
from shared.words import counted
from train.data import Plan, micro_batch_size
from train.model import pick_device
from train.phases import make_phases, training_shift
from train.stores import Dataset


def settings(resolved: Resolved) -> list[str]:
    """One line per setting: key, value, source."""
    lines, complete = [], to_json(resolved.config)
    for key in leaf_keys():
        value: Any = complete
        for name in key.split("."):
            value = value[name]
        lines.append(f"{key:45} {json.dumps(value):32} {resolved.sources[key]}")
    return lines


def derived(resolved: Resolved) -> list[str]:
    """What follows from config and model alone."""
    config, spec = resolved.config, resolved.spec
    sizes = geometry(config, spec)
    shift = training_shift(config, spec)
    exact = [f"{size[0]}x{size[1]}" if isinstance(size, tuple) else str(size) for size in sizes.resolutions]
    lines = [
        f"model: {spec.name} ({spec.source}), {config.training_method}, timestep_shift {shift:g}",
        f"device: {pick_device()}",
        f"clips: {sizes.num_frames} frames at {sizes.fps:g} fps, resolution {', '.join(exact)}",
    ]
    return [*lines, *idle(config), *sizes.remarks]


def idle(config: Config) -> list[str]:
    """A line for each setting that was given and does nothing beside the others."""
    method, text = config.training_method, config.text_encoder
    reasons = {
        "text_encoder.learning_rate is idle: text_encoder.train is false":
            text.learning_rate is not None and not text.train,
        f"transformer.learning_rate is idle: {method} trains no transformer":
            config.transformer.learning_rate is not None and method != "LORA" and not config.trains_dit,
        f"embedding_learning_rate is idle: {method} trains no embedding":
            config.embedding_learning_rate is not None and method != "EMBEDDING",
        "sample_after is idle: sample_prompts is empty": config.sample_after is not None and not config.sample_prompts,
    }  # fmt: skip
    return [line for line, holds in reasons.items() if holds]


def plan_lines(resolved: Resolved, data: Dataset, plan: Plan) -> list[str]:
    """What follows from the data: buckets, batches, steps, experts."""
    config, total = resolved.config, plan.total_steps()
    plan.epoch_of(0)
    prior = sum(sample.prior for sample in data.train)
    lines = [
        f"samples: {len(data.train)} to train{f' ({prior} of them prior)' if prior else ''}, "
        f"{len(data.validation)} held out for validation",
        f"steps: {total}, {plan.starts[1]} per epoch",
    ]
    for bucket, count in sorted(plan.buckets().items()):
        batch, part = min(plan.batch_size, count), micro_batch_size(config, bucket)
        last = f", the last of {count % batch}" if count % batch else ""
        parts = f", computed {part} at a time" if part < batch else ""
        lines.append(f"size {bucket}: {counted(count, 'sample')} per epoch in batches of {batch}{last}{parts}")
    phases = make_phases(config, resolved.spec, total)
    for phase in phases if resolved.spec.boundary is not None else ():
        lines.append(
            f"expert {phase.expert}: steps {phase.first + 1}-{phase.stop}, sigma {phase.law.low:g}-{phase.law.high:g}"
        )
    if config.validate_after is not None and not data.validation:
        lines.append("validate_after is idle: nothing is held out (make ingest SET=validation.fraction=0.1)")
    return lines + list(data.remarks)


def missing_store(stores: tuple[Path, ...]) -> str:
    """The line in place of what data would tell."""
    return f"no store at {', '.join(map(str, stores))} yet: steps and buckets are known after make encode"
