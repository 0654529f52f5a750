"""`make bench`: every item of tests/bench/bench_*.py, or those named by ROWS, as one table and JSON rows.

`make bench-peers` (--peers): those of bench_peers.py instead, which need environments of their own.
"""

import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from shared.cli import Group
from shared.errors import ConfigError
from tests.bench.harness import FOLDER, Pair, device, run, table


def items(peers: bool) -> dict[str, Callable[[], Iterator[Pair]]]:
    """All items by name, in the order of the files."""
    found: dict[str, Callable[[], Iterator[Pair]]] = {}
    for path in sorted(path for path in FOLDER.glob("bench_*.py") if (path.stem == "bench_peers") == peers):
        found |= importlib.import_module(f"tests.bench.{path.stem}").ITEMS
    return found


@click.group(cls=Group, invoke_without_command=True)
@click.option("--rows", default="", help="Names of items, separated by commas; default: all.")
@click.option("--peers", is_flag=True, help="The items that need environments of their own.")
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER / "rows.jsonl", show_default=True)
def main(rows: str, peers: bool, out: Path) -> None:
    """Time prewan against baselines in the same run; ratios above 1 mean that prewan is faster."""
    known = items(peers)
    wanted = [name.strip() for name in rows.split(",") if name.strip()] or list(known)
    if unknown := sorted(set(wanted) - set(known)):
        raise ConfigError(f"ROWS={rows}: no item {', '.join(unknown)}; there are: {', '.join(known)}")
    click.echo(f"device: {device()}")
    measured = []
    for name in wanted:
        began = time.monotonic()
        click.echo(f"{name} ...", err=True)
        measured += run(known[name](), out)
        click.echo(f"{name}: {time.monotonic() - began:.0f} s", err=True)
    click.echo(table(measured))


if __name__ == "__main__":
    main()
