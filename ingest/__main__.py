"""Command: a folder of videos -> work/shards, work/index.json and work/report.html. See `python -m ingest --help`."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from ingest.caption import lint
from ingest.captioner import with_written_captions
from ingest.decide import AnyJob, Decision, Source, decide, usable
from ingest.discover import Dataset, discover
from ingest.examine import Saver, changed, examine
from ingest.focus import FocusJob, find_focus
from ingest.index import build_index, scaled_up, summary
from ingest.ledger import Ledger, Outcome, fold_outcomes, read_ledger, write_ledger
from ingest.pack import Kept, pack, shards_on_disk
from ingest.plan import Planner, refuse_unknown_folders
from ingest.report import write_report
from ingest.runner import Runner, ffmpeg_version, found_program
from ingest.scenes import SceneJob, find_scenes
from ingest.transcode import transcode
from shared.cli import Group, config_options, work_option
from shared.errors import DatasetError
from shared.files import PART, read_json, sweep_partials, write_json
from shared.geometry import geometry
from shared.progress import progress
from shared.resolve import Choice, Resolved, resolve, save_config
from shared.shards import Drop, Index, ShardRecord, index_path, read_index, shard_folder, write_index

STRETCHED = "video_config.stretch: each sample shows a whole clip, so motion is faster or slower than it was"


@dataclass(frozen=True)
class Order:
    """What the user asked for."""

    data: Path
    work: Path
    choice: Choice
    ffmpeg: str | None
    rehash: bool


@click.group(cls=Group, invoke_without_command=True)
@click.option("--data", type=click.Path(path_type=Path), help="Folder of videos, images, captions.")
@work_option
@config_options
@click.option("--ffmpeg", help="ffmpeg program to use in place of the one of the imageio-ffmpeg package.")
@click.option("--rehash", is_flag=True, help="Read every source again, also where size, time and inode are unchanged.")
@click.pass_context
def main(
    context: click.Context, data: Path | None, work: Path, choice: Choice, ffmpeg: str | None, rehash: bool
) -> None:
    """Turn any folder of videos and images into clean, captioned, bucketed tar shards.

    Captions are taken from clip.txt beside clip.mp4, captions/, captions.txt, metadata.jsonl, metadata.csv, a JSONL
    with video_path, or the file's name. Running it again does only what is new or changed. Every file that is not used
    is named with its reason in work/report.html.

    \b
    Example: python -m ingest --data my_videos/ --preset 16gb --set "frames=17 caption_prefix=zorb"
    """
    if context.invoked_subcommand is not None:
        return
    if data is None:
        raise DatasetError("DATA is missing: the folder of your videos; run: make ingest DATA=my_videos/")
    ingest(Order(data, work, choice, found_program(ffmpeg) if ffmpeg else None, rehash))


@main.command("import", short_help="Another trainer's dataset file: a folder of links, and a config.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("imported"), show_default=True, help="New folder.")
def import_file(file: Path, out: Path) -> None:
    """Read another trainer's FILE: write OUT/config.json and OUT/data, and say line by line what has no equivalent.

    FILE: a TOML of musubi-tuner or diffusion-pipe, a YAML of ai-toolkit, a JSONL of video_path and caption,
    videos2caption.json or merge.txt of FastVideo, a tar of video2dataset or a folder of them.

    \b
    Example: python -m ingest import dataset.toml --out mine && make ingest DATA=mine/data CONFIG=mine/config.json
    """
    from ingest.importing import import_foreign  # not needed for anything else

    for line in import_foreign(file, out):
        click.echo(line)


def ingest(order: Order) -> None:
    """Everything from the dataset folder to the index; says what it found and what it kept."""
    resolved = resolve(order.choice)
    config, sizes = resolved.config, geometry(resolved.config, resolved.spec)
    for remark in (*resolved.remarks, *sizes.remarks, *[STRETCHED] * config.video_config.stretch):
        click.echo(remark)
    dataset = discover(order.data, order.work, config.caption.from_file_names)
    click.echo(f"{order.data}: {dataset.layout}")
    refuse_unknown_folders(config, {found.folder for found in dataset.files})
    with locked(order.work):
        ledger = restore(order)
        unread = read_sources(order, dataset, ledger)
        files = with_written_captions(order.data, order.work, dataset.files, ledger, config.caption)
        sources, unusable = usable(order.data, files, ledger)
        old = read_index(order.work) if index_path(order.work).is_file() else None
        shards = {shard.name: shard for shard in shards_on_disk(order.work, old)}
        decision = make_samples(order, sources, Planner(config, sizes), ledger, shards)
        decision.dropped[:0] = [*dataset.dropped, *unread, *unusable]
        pack_samples(order, decision, shards, config.shard_megabytes)
        index = build_index(dataset_id(order.work), config, sources, decision, list(shards.values()))
        remarks = lint({source.found.path: source.found.captions for source in sources})
        publish(order.work, index, old, resolved, remarks)
    click.echo(summary(index, remarks, scaled_up(decision), order.work / "report.html"))
    if not index.samples:
        raise DatasetError(f"nothing of DATA={order.data} is left to train on; the reasons are above and in "
                           f"{order.work / 'report.html'}")  # fmt: skip


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """One ingest at a time in a work folder; the lock goes with the process, however it ends."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DatasetError(
            f"WORK={work}: another ingest is at work there; wait for it, or choose another WORK"
        ) from None
    else:
        yield
    finally:
        os.close(descriptor)


def restore(order: Order) -> Ledger:
    """The ledger with what an interrupted run left; leftovers of crashed writers are removed."""
    staging = order.work / "staging"
    staging.mkdir(exist_ok=True)
    for folder in staging.glob(f"*{PART}"):
        if folder.is_dir():
            shutil.rmtree(folder)
    sweep_partials(staging)
    sweep_partials(shard_folder(order.work))
    ledger = read_ledger(order.work)
    if any(staging.glob("*.json")):
        save_ledger(order.work, ledger)
    return ledger.unread() if order.rehash else ledger


def save_ledger(work: Path, ledger: Ledger) -> None:
    """Move the outcomes in staging into the ledger."""
    outcomes = fold_outcomes(work, ledger)
    write_ledger(work, ledger)
    for path in outcomes:
        path.unlink()


def read_sources(order: Order, dataset: Dataset, ledger: Ledger) -> list[Drop]:
    """Hash and probe new and changed files."""
    for path in set(ledger.files) - {found.path for found in dataset.files}:
        del ledger.files[path]
    news, dropped = changed(dataset, ledger)
    if news:
        with progress("files", len(news)) as advance:
            save = Saver(lambda: write_ledger(order.work, ledger))

            def step() -> None:
                advance(1)
                save()

            dropped += examine(order.data, news, ledger, workers(), step)
        ledger.forget_absent()
        write_ledger(order.work, ledger)
    return dropped


def workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def make_samples(
    order: Order, sources: list[Source], planner: Planner, ledger: Ledger, shards: dict[str, ShardRecord]
) -> Decision:
    """Decide, do the jobs that are missing for it, and decide again, until nothing is missing."""
    staging = order.work / "staging"
    while True:
        present = {key for shard in shards.values() for key in shard.keys}
        present |= {path.stem for path in staging.iterdir() if path.suffix not in (".json", ".jpg")}
        decision = decide(sources, planner, ledger, present)
        if not decision.jobs:
            return decision
        run_jobs(order, decision.jobs, ledger)


def run_jobs(order: Order, jobs: list[AnyJob], ledger: Ledger) -> None:
    """Run jobs, as many at a time as there are cores; however this returns, the ledger has all their outcomes."""
    staging = order.work / "staging"
    runner = Runner(order.ffmpeg or bundled_ffmpeg(), staging)
    pool = ThreadPoolExecutor(workers())
    try:
        with progress("clips", len(jobs)) as advance:
            waiting = {pool.submit(run_job, job, runner) for job in jobs}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()
                    ledger.learn(outcome.sha256, outcome.learned)
                    advance(1)
    finally:
        runner.stop()
        pool.shutdown(cancel_futures=True)
        save_ledger(order.work, ledger)


def run_job(job: AnyJob, runner: Runner) -> Outcome:
    """Do one job of any kind."""
    if isinstance(job, SceneJob):
        return find_scenes(job, runner)
    return find_focus(job, runner) if isinstance(job, FocusJob) else transcode(job, runner)


def bundled_ffmpeg() -> str:
    """The program of the imageio-ffmpeg package: the same everywhere."""
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


def pack_samples(order: Order, decision: Decision, shards: dict[str, ShardRecord], megabytes: int) -> None:
    """Put staged samples into tars; `shards` gets the new ones."""
    packed = {key for shard in shards.values() for key in shard.keys}
    new = [Kept(sample, source.sha256) for source, sample in decision.kept if sample.key not in packed]
    if new:
        with progress("packing", len(new)) as advance:
            for shard in pack(order.work, new, megabytes, ffmpeg_version(order.ffmpeg or bundled_ffmpeg())):
                shards[shard.name] = shard
                advance(len(shard.keys))


def dataset_id(work: Path) -> str:
    """The dataset's id, drawn at its first ingest."""
    path = work / "dataset.json"
    if not path.is_file():
        write_json(path, {"id": uuid.uuid4().hex})
    return str(read_json(path)["id"])


def publish(work: Path, index: Index, old: Index | None, resolved: Resolved, remarks: dict[str, list[str]]) -> None:
    """Write config, report and, last, the index; then remove what it does not name."""
    save_config(work / "config.json", resolved)
    if index != old or not (work / "report.html").is_file():
        write_report(work, index, remarks)
        write_index(work, index)
    for path in [*(work / "staging").iterdir(), *shard_folder(work).glob("*.tar")]:
        if path.name not in {shard.name for shard in index.shards}:
            path.unlink()


if __name__ == "__main__":
    main()
