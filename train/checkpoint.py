"""Checkpoints: everything a run needs to go on bit-equally, in `checkpoints/<step>/`, whole or absent.

    weights_<expert>.safetensors   trained tensors, of every expert so far (finished ones are hard links)
    average_<expert>.safetensors   their moving averages, when `ema` is set
    training_<expert>.safetensors  the tensors at which SCHEDULE_FREE_ADAMW goes on; `weights` are those to use
    optimizer.pt                   state of the optimizer of the expert in training
    optimizer_<n>.pt               likewise of process n, when weights are divided among processes
    state.json                     step, expert, length of the event log, fingerprint of the data

Randomness needs no state: it follows from (seed, step, slot).
"""

import errno
import os
import shutil
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import RunError
from shared.files import PART, read_json, sync, write_json
from train.group import ALONE, Group
from train.scale import FIRST

CHECKPOINT_VERSION = 1


class State(BaseModel):
    """What a checkpoint knows besides tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = CHECKPOINT_VERSION
    step: int  # optimizer updates done, of all experts
    expert: str
    events_bytes: int  # length of events.jsonl; what comes after is cut off on resume
    data: str  # Dataset.fingerprint
    skipped_in_a_row: int = 0
    skipped: int = 0  # of all steps
    processes: int = 1
    loss_scale: float = FIRST  # FLOAT_16 only
    steps_at_scale: int = 0


def checkpoint_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def steps_saved(run: Path) -> list[int]:
    """Steps of the checkpoints there are, ascending."""
    folder = checkpoint_folder(run)
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def latest(run: Path) -> Path | None:
    """The newest checkpoint."""
    steps = steps_saved(run)
    return checkpoint_folder(run) / str(steps[-1]) if steps else None


Tensors = Mapping[str, Mapping[str, Tensor]]  # file stem -> tensors by name


def save(run: Path, state: State, tensors: Tensors, optimizer: dict[str, Any], keep: int, group: Group = ALONE) -> Path:
    """Write a checkpoint and remove all but the newest `keep`; each process of `group` its own optimizer state."""
    final = checkpoint_folder(run) / str(state.step)
    part = final.with_name(f"{final.name}{PART}")
    try:
        group.together(lambda: make_empty(part) if group.first else None)
        group.together(lambda: write_optimizer(part / optimizer_name(group.rank), optimizer))
        group.together(lambda: write_rest(run, part, state, tensors) if group.first else None)
    finally:
        if group.first:
            shutil.rmtree(part, ignore_errors=True)
    for step in steps_saved(run)[:-keep] if group.first else ():
        shutil.rmtree(checkpoint_folder(run) / str(step))
    return final


def make_empty(part: Path) -> None:
    """A folder without what an earlier attempt left."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def optimizer_name(rank: int) -> str:
    """File of a process's optimizer state."""
    return f"optimizer_{rank}.pt" if rank else "optimizer.pt"


def write_optimizer(path: Path, optimizer: dict[str, Any]) -> None:
    """Through memory: writing straight to a full disk, torch ends the process."""
    buffer = BytesIO()
    torch.save(optimizer, buffer)
    path.write_bytes(buffer.getbuffer())
    sync(path)


def write_rest(run: Path, part: Path, state: State, tensors: Tensors) -> None:
    """Everything but optimizers, and the folder's name."""
    for stem, named in tensors.items():
        write_tensors(part / f"{stem}.safetensors", named)
    link_finished(run, part)
    write_json(part / "state.json", state.model_dump(mode="json"))
    for path in part.iterdir():
        sync(path)
    final = checkpoint_folder(run) / str(state.step)
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    sync(final.parent)


def write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    """One safetensors file; what goes wrong is an OSError, as with any file."""
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in named.items()}, path)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC, str(error), str(path)) from None


def link_finished(run: Path, part: Path) -> None:
    """Carry over the tensors of experts that were finished before, as hard links."""
    before = latest(run)
    for path in sorted(before.glob("*.safetensors")) if before is not None else ():
        if not (part / path.name).exists():
            os.link(path, part / path.name)


def read_state(folder: Path) -> State:
    """State of a checkpoint; raises RunError on another version or damage."""
    try:
        value = read_json(folder / "state.json")
        if value.get("version") != CHECKPOINT_VERSION:
            found = value.get("version")
            raise RunError(f"{folder} has checkpoint version {found}, this code reads {CHECKPOINT_VERSION}")
        return State.model_validate(value)
    except (OSError, ValueError, AttributeError) as error:
        message = str(error).splitlines()[0]
        raise RunError(f"{folder} is damaged ({message}); delete it to go on from the one before") from None


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Tensors of one file of a checkpoint."""
    return load_file(folder / f"{stem}.safetensors")


def read_optimizer(folder: Path, rank: int = 0) -> dict[str, Any]:
    """A process's optimizer state; tensors and plain values only, nothing is executed."""
    return dict(torch.load(folder / optimizer_name(rank), map_location="cpu", weights_only=True))
