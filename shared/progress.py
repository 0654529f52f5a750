"""Progress of long work: a bar with the time left on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[float], None]]:
    """Yield a function that is told how many more of `total` are done (parts of one count)."""
    if not sys.stderr.isatty():
        yield _plain(name, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.update(task, advance=count)


def _plain(name: str, total: int) -> Callable[[float], None]:
    start = said = time.monotonic()
    done = 0.0

    def advance(count: float) -> None:
        nonlocal said, done
        done += count
        now = time.monotonic()
        if done >= total - 0.001 or now - said > PLAIN_SECONDS:
            said = now
            left = (now - start) / max(done, 1e-9) * (total - done)
            print(f"{name}: {done:.0f}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)

    return advance
