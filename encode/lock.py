"""Who may write to a store: one encoder per part, and sweeping only when nobody writes.

Lock files lie beside the store: `<store>.lock` is held shared by every writer, `<store>.1of4.lock` exclusively by the
one that makes part 1/4. The kernel drops both when a process dies, so nothing has to be cleaned up after a crash.
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from encode.plan import Part
from shared.errors import StoreError
from shared.files import PART, sweep_partials


@contextmanager
def writing(store: Path, part: Part, name: str = "") -> Iterator[None]:
    """Hold a part of the store for writing; leftovers of crashes are swept first when no other writer is there.

    Work of another kind than an encode's parts, such as embedding prompts, gives its own `name` and may go on beside.
    """
    store.parent.mkdir(parents=True, exist_ok=True)
    gate_path = store.with_name(f"{store.name}.lock")
    part_path = store.with_name(f"{store.name}.{name or f'{part.number}of{part.count}'}.lock")
    with gate_path.open("a") as gate, part_path.open("a+") as lock:
        if not _try_lock(lock, fcntl.LOCK_EX):
            lock.seek(0)
            writer = lock.read().strip() or "another encoder"
            raise StoreError(f"{store}: part {part} is being written by {writer}; wait for it, or give each machine "
                             "its own SHARD=i/n")  # fmt: skip
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        if _try_lock(gate, fcntl.LOCK_EX):
            sweep(store)
        fcntl.flock(gate, fcntl.LOCK_SH)
        yield


def sweep(store: Path) -> None:
    """Remove half-written units and files of crashed encoders."""
    for kind in ("latents", "cond", "text"):
        for folder in (store / kind).glob(f"*{PART}"):
            shutil.rmtree(folder, ignore_errors=True)
    sweep_partials(store)


def _try_lock(file: IO[str], how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
