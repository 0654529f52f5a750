"""Staging -> tars -> index. Input: kept samples in dataset order. Cost: copying bytes, and webdataset's import.

Which samples share a tar depends on their order and sizes only, so an interrupted run ends with the same tars.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ingest.plan import Sample
from shared.files import atomic_write, sha256_of
from shared.keys import fingerprint
from shared.shards import Index, ShardRecord, shard_folder

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Kept:
    """A sample that is kept, and the bytes it came from."""

    sample: Sample
    sha256: str


def shards_on_disk(work: Path, index: Index | None) -> list[ShardRecord]:
    """Whole tars in the work folder: those of the index, and those that an interrupted run left."""
    known = {shard.name: shard for shard in index.shards} if index else {}
    shards = []
    for path in sorted(shard_folder(work).glob("*.tar")):
        record = known.get(path.name)
        if record is None or record.bytes != path.stat().st_size:
            record = record_of(path)
        shards.append(record)
    return shards


def record_of(path: Path) -> ShardRecord:
    """Read a tar's table of contents and hash it."""
    with tarfile.open(path) as tar:
        keys = dict.fromkeys(name.partition(".")[0] for name in tar.getnames())
    return ShardRecord(name=path.name, sha256=sha256_of(path), bytes=path.stat().st_size, keys=tuple(keys))


def pack(work: Path, kept: Iterable[Kept], megabytes: int, ffmpeg: str) -> Iterator[ShardRecord]:
    """Move staged samples to tars of one bucket each, about `megabytes` large; what a tar holds leaves staging."""
    staging = work / "staging"
    buckets: dict[str, list[Kept]] = {}
    for item in kept:
        buckets.setdefault(str(item.sample.bucket), []).append(item)
    for name, items in buckets.items():
        for group in grouped(staging, items, megabytes * MEGABYTE):
            yield write_shard(work, name, group, ffmpeg)
            for item in group:
                for file in item.sample.files:
                    (staging / file).unlink()


def grouped(staging: Path, items: list[Kept], limit: int) -> Iterator[list[Kept]]:
    """Runs of items whose files add up to at most `limit` bytes, at least one item each."""
    group: list[Kept] = []
    size = 0
    for item in items:
        more = sum((staging / file).stat().st_size for file in item.sample.files)
        if group and size + more > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += more
    if group:
        yield group


def write_shard(work: Path, bucket: str, group: list[Kept], ffmpeg: str) -> ShardRecord:
    """One tar; the same samples made by the same ffmpeg give the same bytes on any machine."""
    from webdataset import TarWriter

    keys = [item.sample.key for item in group]
    path = shard_folder(work) / f"{bucket}-{fingerprint(keys=keys)[:12]}.tar"
    with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
        for item in group:
            made = [work / "staging" / file for file in item.sample.files]
            parts = {path.suffix[1:]: path.read_bytes() for path in made}
            writer.write({"__key__": item.sample.key, "json": facts_in_tar(item, ffmpeg), **parts})
    return ShardRecord(name=path.name, sha256=sha256_of(path), bytes=path.stat().st_size, keys=tuple(keys))


def facts_in_tar(item: Kept, ffmpeg: str) -> bytes:
    """What belongs to the pixels; captions may change, so they are in the index only."""
    sample, window = item.sample, item.sample.window
    value = {"source_sha256": item.sha256, "num_frames": sample.bucket.num_frames, "height": sample.bucket.height,
             "width": sample.bucket.width, "fps": sample.fps, "start": window.start, "duration": window.duration,
             "variant": window.variant, "clip": sample.clip_key, "ffmpeg": ffmpeg}  # fmt: skip
    return json.dumps(value, sort_keys=True).encode()
