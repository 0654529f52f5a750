"""Files that are whole or absent: write beside, flush to disk, rename. Purpose: no reader ever sees half a file.

A leftover of a crash is named `*.part`; `sweep_partials` removes it.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PART = ".part"


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open `path` for writing bytes; the name appears only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{threading.get_native_id()}{PART}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or the renames inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, sorted and indented, atomically: equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file (UTF-8)."""
    return json.loads(path.read_bytes())


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes (about 1 GB/s on one core)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_folder() -> Path:
    """Where what can be made again is kept for all projects of a user: prewan/ in $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prewan"


def built_once(name: str, build: Callable[[Path], None]) -> Path:
    """A folder of `kept_folder`; one that is not there is built beside its place and renamed."""
    folder = kept_folder() / name
    if not folder.is_dir():
        building = folder.with_name(f"{name}-{os.getpid()}{PART}")
        shutil.rmtree(building, ignore_errors=True)
        build(building)
        try:
            building.rename(folder)
        except OSError:
            shutil.rmtree(building)
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def sweep_partials(folder: Path) -> list[Path]:
    """Remove leftovers of crashed writers in `folder` (recursively); only call while holding the writer's lock."""
    leftovers = sorted(folder.rglob(f"*{PART}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers
