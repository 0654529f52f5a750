"""`make bench-scale`: what each stage costs against its work, as a table, a fit "fixed + per unit", and a plot.

Processor seconds of this process and its children, the least of three rounds: what a busy machine adds is left out.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from encode.budget import Effort
from encode.worker import encode_batch
from shared.bucket import Bucket
from shared.keys import caption_key
from shared.models import SPECS
from shared.resolve import Choice, resolve
from shared.shards import SampleRecord
from shared.store import DatasetList, create_store, read_datasets, write_dataset
from shared.store_read import StoreReader
from shared.store_write import UnitDraft, write_latents, write_texts
from shared.weights import load_vae
from tests.bench.bench_ingest import SMALL_SETTINGS, make_small_clips
from tests.bench.bench_memory import peak_of
from tests.bench.bench_train import CAPTION, made, our_step
from tests.bench.harness import CLOCKS, FOLDER, commit, device, timed
from tests.train.make import config, listed
from train.condition import Frames
from train.data import Plan, Slots

ROUNDS = 3
SAMPLES = (10, 100, 1000, 10_000)
FRAMES = (5, 9, 17, 33, 49, 81)
BATCHES = (1, 2, 4, 8)
PER_UNIT = 100
OPEN = """
import sys, pathlib, shared.store, shared.store_read
store = pathlib.Path(sys.argv[1])
kept = shared.store.read_datasets(store), shared.store_read.StoreReader([store])
"""
SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 2}


@dataclass(frozen=True)
class Point:
    """One measured cost."""

    stage: str
    unit: str  # what `work` counts
    work: int
    value: float  # seconds, or MiB where the stage says so


def seconds(call: Callable[[], Any]) -> float:
    """Processor seconds of a call, the least of some rounds."""
    return min(timed(call, time.process_time)[0] for _ in range(ROUNDS))


def store_points() -> Iterator[Point]:
    """Opening a store, ordering an epoch, and reading 256 rows, against the number of samples."""
    spec, folder = SPECS["ti2v-5b"], Path(tempfile.mkdtemp())
    for count in SAMPLES:
        store = create_store(folder / f"{count}.zarr")
        samples = [listed(number, spec, (1, 32, 32)) for number in range(count)]
        fill(store, samples)
        reader = StoreReader([store])
        order = np.random.default_rng(0).integers(count, size=256)
        plan = config(Path("tiny"), batch_size=4)
        yield Point("open store (10 times)", "samples", count, seconds(lambda store=store: opened(store)))
        yield Point("order an epoch", "samples", count, seconds(lambda s=samples, c=plan: Plan(s, c, 4).batch(0)))
        rows = [f"sample{number}" for number in order] * 20
        cost = seconds(lambda r=reader, names=rows: [r.latent(name) for name in names])
        yield Point("read 256 rows 20 times", "samples", count, cost)
        yield Point("memory of opening, MiB", "samples", count, peak_of("-c", OPEN, store)())
    shutil.rmtree(folder)


def fill(store: Path, samples: list[Any]) -> None:
    """Units of a hundred small rows and captions, and the list."""
    texts = {key: f"caption of {sample.clip}" for sample in samples for key in sample.captions}
    keys, rows = [sample.keys[0] for sample in samples], np.zeros((PER_UNIT, 4, 1, 2, 2), np.float16)
    for first in range(0, len(keys), PER_UNIT):
        part = keys[first : first + PER_UNIT]
        write_latents(UnitDraft(store, "latents", {"first": first}, {}), part, rows[: len(part)], "kind")
        named = dict(list(texts.items())[first : first + PER_UNIT])
        embedded = [np.zeros((9, 4), np.float32) for _ in named]
        write_texts(UnitDraft(store, "text", {"first": first}, {}), named, embedded, [[1] * 9 for _ in named])
    write_dataset(store, DatasetList(id="made", samples=tuple(samples), texts=texts))


def opened(store: Path) -> None:
    """What a trainer does with a store first, ten times."""
    for _ in range(10):
        assert read_datasets(store) and StoreReader([store]).latents


def vae_points() -> Iterator[Point]:
    """The tiny VAE's encode at 64x64, against frames and against clips at once."""
    vae = load_vae(resolve(Choice(preset="demo")).spec, torch.float32)
    clips = [(stage, frames, 1) for stage, frames in (("encode a clip", frames) for frames in FRAMES)]
    clips += [("encode a batch of 17 frames", 17, batch) for batch in BATCHES]
    for stage, frames, batch in clips:
        pixels = np.random.default_rng(0).integers(0, 255, (frames, 64, 64, 3), np.uint8)
        whole: list[tuple[SampleRecord, Any]] = [(None, pixels)] * batch  # type: ignore[list-item]
        cost = seconds(lambda w=whole, b=batch: encode_batch(vae, w, "latents", Effort(b, None)))
        yield Point(stage, *(("frames", frames) if stage == "encode a clip" else ("clips", batch)), cost)


def step_points() -> Iterator[Point]:
    """A training step of a small DiT at 64x64, against frames and against the batch."""
    folder = Path(tempfile.mkdtemp())
    run, spec, reader = made(folder, **SMALL)
    cases = [("step of a clip", frames, 1) for frames in FRAMES]
    cases += [("step of a batch of 17 frames", 17, batch) for batch in BATCHES]
    for stage, frames, batch in cases:
        shape = (batch, *spec.latent_shape(frames, 64, 64))
        latent, noise = torch.randn(2, *shape, generator=torch.manual_seed(0)).unbind()
        ones, all_frames = torch.ones(batch), Frames(tuple(range(shape[2])), shape[2])
        slots = Slots(latent, noise, ones / 2, [caption_key(CAPTION)] * batch, ones, Bucket(frames, 64, 64), all_frames,
                      torch.zeros(batch, dtype=torch.bool), None)  # fmt: skip
        cost = seconds(our_step(run, spec, reader, slots))
        yield Point(stage, *(("frames", frames) if stage == "step of a clip" else ("clips", batch)), cost)
    shutil.rmtree(folder)


def clip_points(counts: tuple[int, ...]) -> Iterator[Point]:
    """The commands ingest and encode on small clips, from nothing, once each."""
    for count in counts:
        folder = Path(tempfile.mkdtemp())
        make_small_clips(folder / "dataset", count)
        for stage, words in (("ingest", ("--data", folder / "dataset")), ("encode", ())):
            same = ("--preset", "cpu", "--model", "tiny", "--set", SMALL_SETTINGS)
            call = peak_of("-m", stage, *words, "--work", folder / "work", *same)
            cost, peak = timed(call, CLOCKS["cpu"])
            yield Point(f"make {stage}", "clips", count, cost)
            yield Point(f"memory of {stage}, MiB", "clips", count, peak)
        shutil.rmtree(folder)


def fit(points: list[Point]) -> tuple[float, float]:
    """(fixed, per unit) by least squares of relative errors."""
    work, value = np.array([p.work for p in points], float), np.array([p.value for p in points])
    matrix = np.stack([np.ones_like(work), work], 1) / value[:, None]
    fixed, slope = np.linalg.lstsq(matrix, np.ones_like(value), rcond=None)[0]
    return float(fixed), float(slope)


def table(stages: dict[str, list[Point]]) -> str:
    """One row per stage: costs at each amount of work, and the fit."""
    lines = ["| stage | against | costs | fixed | per unit |", "|---|---|---|---|---|"]
    for stage, points in stages.items():
        fixed, slope = fit(points)
        costs = ", ".join(f"{point.work}: {point.value:.3g}" for point in points)
        lines.append(f"| {stage} | {points[0].unit} | {costs} | {fixed:.2g} | {slope:.2g} |")
    return "\n".join(lines)


def plot(stages: dict[str, list[Point]]) -> str:
    """An SVG of all stages, both axes logarithmic, each line from its own first point."""
    width, height, shapes = 900, 520, []
    for number, (stage, points) in enumerate(stages.items()):
        colour = f"hsl({number * 360 // len(stages)},70%,40%)"
        places = [(60 + 150 * np.log10(p.work), 480 - 110 * np.log10(max(p.value, 1e-3) / 1e-3) / 1.6) for p in points]
        line = " ".join(f"{x:.0f},{y:.0f}" for x, y in places)
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{colour}"/>' for x, y in places]
        shapes.append(f'<text x="680" y="{24 + 18 * number}" fill="{colour}">{stage}</text>')
    for power in range(5):
        shapes.append(f'<text x="{60 + 150 * power}" y="505" fill="#555">{10**power}</text>')
    for power in range(-3, 4):
        y = 480 - 110 * (power + 3) / 1.6
        shapes.append(f'<path d="M50 {y:.0f}H670" stroke="#ddd"/><text x="2" y="{y:.0f}" fill="#555">1e{power}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(shapes)}</svg>\n')  # fmt: skip


@click.command()
@click.option("--clips", default="10,100,1000", show_default=True, help="Numbers of small clips for ingest and encode.")
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
def main(clips: str, out: Path) -> None:
    """Measure, print the table, write SCALING.md, scaling.jsonl and scaling.svg."""
    torch.set_num_threads(1)
    stages: dict[str, list[Point]] = {}
    counts = tuple(int(count) for count in clips.split(",") if count)
    for points in (store_points(), vae_points(), step_points(), clip_points(counts)):
        for point in points:
            stages.setdefault(point.stage, []).append(point)
            click.echo(f"{point.stage}: {point.work} {point.unit}: {point.value:.3g}", err=True)
    load = os.getloadavg()[0]
    head = (f"# Scaling\n\n`make bench-scale` on {device()}, commit {commit()}, load {load:.0f}. Processor seconds, "
            "least of three rounds, whole stages once (MiB where it says so); fit: fixed + per unit x work.\n\n"
            )  # fmt: skip
    (out / "SCALING.md").write_text(head + table(stages) + "\n\n![All stages](scaling.svg)\n")
    rows = [json.dumps(asdict(point), sort_keys=True) for points in stages.values() for point in points]
    (out / "scaling.jsonl").write_text("\n".join(rows) + "\n")
    (out / "scaling.svg").write_text(plot(stages))
    click.echo(table(stages))


if __name__ == "__main__":
    main()
