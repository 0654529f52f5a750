"""The run folder: which one a command means, whether it goes on or starts, and which settings may change on the way.

runs/<store>-<preset>[-2]/  config.json run.json done events.jsonl tb/ checkpoints/<step>/ samples/ <name>*.safetensors
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.config import Config
from shared.errors import RunError, StoreError
from shared.files import read_json, write_json
from shared.models import ModelSpec
from shared.resolve import (
    Choice,
    Resolved,
    preset_path,
    refuse_late,
    resolve,
    save_config,
    to_json,
    value_at,
)
from shared.shards import index_path
from shared.store_copy import local_store

RUNS = Path("runs")
# settings that decide what the saved tensors are, or which random numbers are drawn: a change needs a new run
FIXED = (
    *(
        "base_model_name",
        "training_method",
        "seed",
        "batch_size",
        "optimizer.name",
        "ema",
        "expert",
        "expert_share",
        "resume_from_adapter",
        "base_adapters",
    ),
    *("peft_type", "lora_rank", "lora_alpha", "lora_targets", "text_encoder.train"),
    *("embedding.token_count", "embedding.kind", "embedding.placeholder", "embedding.initial_text"),
)
FIXED_FOR_PAIRS = ("epochs", "max_steps")  # they place the step at which the second expert starts


@dataclass(frozen=True)
class Run:
    """One resolved config, its data and its output folder."""

    folder: Path
    resolved: Resolved
    stores: tuple[Path, ...]
    work: Path

    @property
    def config(self) -> Config:
        """The complete config."""
        return self.resolved.config

    @property
    def spec(self) -> ModelSpec:
        """Facts of the model."""
        return self.resolved.spec

    @property
    def name(self) -> str:
        """What its files are called after."""
        return self.folder.name


def store_paths(store: str | None, work: Path) -> tuple[Path, ...]:
    """'a.zarr,https://...' -> paths, of a local copy for a URL; the work folder's own store when none is named."""
    parts = [part.strip() for part in store.split(",")] if store else []
    return tuple(local_store(part) for part in parts if part) or (work / "latents.zarr",)


def require_stores(stores: Sequence[Path], work: Path) -> None:
    """Raise StoreError for a store that is not there, naming the command that makes it."""
    for store in stores:
        if not store.is_dir():
            ingested = index_path(work).is_file()
            mend = "make encode" if ingested else "make ingest DATA=your_videos/, then make encode"
            raise StoreError(f"{store}: no such store; make one with: {mend}")


def store_name(stores: Sequence[Path]) -> str:
    """Name of a store in run names: its file name, or its folder's when it has the usual one."""
    first = stores[0].absolute()
    return first.parent.name if first.stem == "latents" else first.stem


def config_name(choice: Choice, resolved: Resolved) -> str:
    """The preset, else the config file, else the model."""
    if choice.preset:
        return preset_path(choice.preset).stem
    if choice.config is not None:
        return choice.config.stem
    return re.sub(r"[^\w.-]+", "-", Path(resolved.config.base_model_name).name)


def is_run(folder: Path) -> bool:
    """Whether a run was started there."""
    return (folder / "run.json").is_file()


def is_finished(folder: Path) -> bool:
    """Whether a run reached its end."""
    return (folder / "done").is_file()


def choose_run(
    choice: Choice, work: Path, store: str | None, folder: Path | None, resume: Literal["yes", "no"] | None
) -> Run:
    """The run a train command means: the folder named, else the newest unfinished one of this name, else a new one."""
    stores = store_paths(store, work)
    work_config = work / "config.json"
    if folder is not None and is_run(folder) and choice == Choice():
        work_config, facts = folder / "config.json", read_json(folder / "run.json")  # nothing was said: the run's own
        stores, work = (stores, work) if store else (tuple(map(Path, facts["stores"])), Path(facts["work"]))
    resolved = resolve(choice, work_config)
    refuse_late(resolved, work_config)
    if folder is None:
        name = f"{store_name(stores)}-{config_name(choice, resolved)}"
        folder = default_folder(name, stores, resume, to_json(resolved.config))
    if is_run(folder) and resume == "no":
        raise RunError(f"{folder} holds a run already; name a new folder with RUN=, or go on without RESUME=no")
    if resume == "yes" and not is_run(folder):
        raise RunError(f"{folder}: there is no run to resume; start one without RESUME=yes")
    return Run(folder, resolved, stores, work)


def default_folder(name: str, stores: Sequence[Path], resume: str | None, config: dict[str, Any]) -> Path:
    """runs/<name>, -2, -3 ...: the newest if it trains these stores and is unfinished or of this very config; else the
    next that is free."""
    number, newest = 1, None
    while is_run(folder := RUNS / (name if number == 1 else f"{name}-{number}")):
        number, newest = number + 1, folder
    if newest is None or resume == "no":
        return folder
    same = read_json(newest / "run.json")["stores"] == [str(store.absolute()) for store in stores]
    if is_finished(newest):
        same = same and read_json(newest / "config.json") == config
    return newest if same else folder


def changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two complete configs."""
    keys: list[str] = []
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            keys += changed_keys(old, new, f"{prefix}{name}.")
        elif old != new:
            keys.append(prefix + name)
    return sorted(keys)


def check_changes(run: Run) -> list[str]:
    """Lines naming the settings that changed since the run was started; refuses those that cannot change."""
    before = read_json(run.folder / "config.json")
    fixed = FIXED + (FIXED_FOR_PAIRS if run.spec.boundary is not None else ())
    lines = []
    for key in changed_keys(before, to_json(run.config)):
        old: Any = before
        for name in key.split("."):
            old = old[name]
        line = f"{key}: {old!r} -> {value_at(run.config, key)!r}"
        if key in fixed:
            source = run.resolved.sources[key]
            raise RunError(
                f"{run.folder} was started with another {line} (from {source}); this cannot change in a run; "
                "start another with RUN=new_folder"
            )
        lines.append(f"changed since the run was started: {line}")
    return lines


def start_folder(run: Run, data: str) -> list[str]:
    """Make the run folder, or check that this config may go on with it; returns remarks."""
    remarks = check_changes(run) if is_run(run.folder) else []
    save_config(run.folder / "config.json", run.resolved)
    facts = {"stores": [str(store.absolute()) for store in run.stores], "work": str(run.work.absolute()), "data": data}
    write_json(run.folder / "run.json", facts)
    (run.folder / "done").unlink(missing_ok=True)
    return remarks


def open_run(folder: Path) -> Run:
    """A run on disk, for sample and export."""
    if not is_run(folder):
        raise RunError(f"{folder} is not a run folder; train one with: make train")
    facts = read_json(folder / "run.json")
    resolved = resolve(Choice(), folder / "config.json")
    return Run(folder, resolved, tuple(map(Path, facts["stores"])), Path(facts["work"]))
