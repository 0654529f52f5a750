"""Files -> facts: hash and probe what is new or changed. Input: dataset and ledger.

Cost: 1 s per GB and core, and 10 ms per file.
"""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from stat import S_ISREG

from ingest.discover import Dataset, Found
from ingest.ledger import FileEntry, Ledger
from ingest.probe import Unusable, probe, probe_image
from shared.files import sha256_of
from shared.shards import Drop

SAVE_EVERY = 5.0  # seconds of work that a kill may cost


def changed(dataset: Dataset, ledger: Ledger) -> tuple[list[Found], list[Drop]]:
    """Files whose size, mtime or inode are not those of the ledger, and files that cannot be looked at."""
    news, dropped = [], []
    for found in dataset.files:
        try:
            status = (dataset.root / found.path).stat()
        except OSError as error:
            dropped.append(Drop(source=found.path, reason=f"cannot be read: {error.strerror}"))
            continue
        if not S_ISREG(status.st_mode):
            dropped.append(Drop(source=found.path, reason="not a file but a pipe, socket or device of that name"))
            continue
        known = ledger.files.get(found.path)
        if known is None or (known.size, known.mtime_ns, known.inode) != (
            status.st_size,
            status.st_mtime_ns,
            status.st_ino,
        ):
            news.append(found)
    return news, dropped


def examine(root: Path, news: list[Found], ledger: Ledger, workers: int, step: Callable[[], None]) -> list[Drop]:
    """Read the new files into the ledger; `step` is called for each, and the ledger is worth saving from there.

    Files that cannot be read at all are returned as drops, and are tried again by the next run.
    """
    dropped = []
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(examine_file, root / found.path, found.is_image): found for found in news}
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                found = waiting.pop(future)
                try:
                    ledger.files[found.path] = future.result()
                except OSError as error:
                    dropped.append(Drop(source=found.path, reason=f"cannot be read: {error.strerror}"))
                step()
    return dropped


def examine_file(path: Path, is_image: bool) -> FileEntry:
    """Hash and probe one file; raises OSError when it cannot be read."""
    status = path.stat()
    facts, problem = None, None
    if status.st_size == 0:
        problem = "empty file (0 bytes)"
    else:
        try:
            facts = probe_image(path) if is_image else probe(path)
        except Unusable as error:
            problem = str(error)
    return FileEntry(
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        sha256=sha256_of(path),
        facts=facts,
        problem=problem,
    )


class Saver:
    """Calls `save` at most every SAVE_EVERY seconds."""

    def __init__(self, save: Callable[[], None]) -> None:
        self.save = save
        self.saved = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()
            self.saved = time.monotonic()
