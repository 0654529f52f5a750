"""The bench: ours against a baseline in one run, interleaved, medians; one table, one JSON row per item.

A module tests/bench/bench_*.py lists `ITEMS`: functions that yield `Pair`s. Each pair first proves that both sides
compute the same, then both are timed in turns, so that a busy machine slows both alike.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

FOLDER = Path(__file__).parent
ROUNDS = 5  # at least


@dataclass(frozen=True)
class Pair:
    """One item: two callables that take no argument, and a check that their results are equal (raises if not)."""

    item: str
    ours: Callable[[], Any]
    baseline: Callable[[], Any]
    baseline_name: str
    equal: Callable[[Any, Any], None]
    clock: str = "wall"  # or "cpu": user + system seconds, children included; or the unit of what calls return
    rounds: int = ROUNDS  # of seconds at least five
    warm_up: bool = True  # the first calls are slower and not counted; False for what is a process of its own, or long
    work: float = 1.0  # units done by one call, for the rate
    unit: str = "call"


@dataclass(frozen=True)
class Row:
    """A measured item: seconds (or MiB, %) per call, median; their ratio baseline / ours (above 1: ours needs less)."""

    commit: str
    device: str
    item: str
    ours_s: float
    baseline_s: float
    baseline: str
    ratio: float
    spread: float  # (max - min) / median of the per-round ratios
    rounds: int
    clock: str
    rate: str
    date: str


def cpu_seconds() -> float:
    """User + system seconds of this process and of its children, whether they have ended or not."""
    times = os.times()
    running = [child.cpu_times() for child in psutil.Process().children()]
    ended = times.children_user + times.children_system
    return times.user + times.system + ended + sum(child.user + child.system for child in running)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_seconds}


def timed(call: Callable[[], Any], clock: Callable[[], float]) -> tuple[float, Any]:
    """(seconds, result) of one call."""
    start = clock()
    result = call()
    return clock() - start, result


def cost(pair: Pair, call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, or what it returns; result) of one call."""
    if pair.clock not in CLOCKS:
        result = call()
        return float(result), result
    return timed(call, CLOCKS[pair.clock])


def measure(pair: Pair) -> Row:
    """Check equality on first calls, which are the warm-up or count, then time both sides in turns."""
    first, other = cost(pair, pair.ours), cost(pair, pair.baseline)
    pair.equal(first[1], other[1])
    ours, baseline = ([], []) if pair.warm_up else ([first[0]], [other[0]])
    for turn in range(len(ours), max(pair.rounds, ROUNDS) if pair.clock in CLOCKS else pair.rounds):
        sides = [(ours, pair.ours), (baseline, pair.baseline)]
        for values, call in sides if turn % 2 == 0 else reversed(sides):
            values.append(cost(pair, call)[0])
    ratios = [b / a for a, b in zip(ours, baseline, strict=True)]
    ratio = statistics.median(ratios)
    return Row(
        commit=commit(),
        device=device(),
        item=pair.item,
        ours_s=statistics.median(ours),
        baseline_s=statistics.median(baseline),
        baseline=pair.baseline_name,
        ratio=ratio,
        spread=(max(ratios) - min(ratios)) / ratio,
        rounds=len(ours),
        clock=pair.clock,
        rate=f"{pair.work / statistics.median(ours):.3g} {pair.unit}/s" if pair.clock in CLOCKS else "",
        date=time.strftime("%Y-%m-%d"),
    )


def commit() -> str:
    """Short name of the checked-out commit, with + when files but the rows differ from it; 'none' outside a clone."""
    name = git("describe", "--always")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){FOLDER}/rows.jsonl")
    return (name or "none") + ("+" if changed else "")


def git(*words: str) -> str:
    """What a git command prints; nothing outside a clone."""
    return subprocess.run(["git", *words], cwd=FOLDER, capture_output=True, text=True, check=False).stdout.strip()


def device() -> str:
    """The processor's name and how many cores this process may use."""
    names = [line.split(":", 1)[1].strip() for line in cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def cpuinfo() -> list[str]:
    """Lines of /proc/cpuinfo; none where there is no such file."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def run(pairs: Iterator[Pair], out: Path) -> list[Row]:
    """Measure every pair; each row is appended to `out` (JSON lines) as soon as it is measured."""
    rows = []
    for pair in pairs:
        row = measure(pair)
        with out.open("a") as file:
            file.write(json.dumps(asdict(row), sort_keys=True) + "\n")
        rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a markdown table."""
    head = ["item", "ours", "baseline", "", "ratio", "spread", "rate", "clock"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        unit = "s" if row.clock in CLOCKS else row.clock
        values = f"{row.ours_s:.4g} {unit}", f"{row.baseline_s:.4g} {unit}"
        lines.append([row.item, *values, row.baseline, f"{row.ratio:.2f}x", f"{row.spread:.0%}", row.rate, row.clock])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
