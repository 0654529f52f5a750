"""Share a store: manifest, push, pull.

MANIFEST.json names every file with size and sha256. A manifest and everything behind it is foreign input: paths, sizes,
markers and array metadata are checked in memory, before the first byte is written. A pulled unit's marker is written
after its files, so a store that is being pulled is a store with fewer units.
"""

import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from pydantic import Field

from shared.errors import StoreError
from shared.files import atomic_write, sha256_of, sync, write_json
from shared.shards import Record
from shared.store import (
    DatasetList,
    FileRecord,
    Marker,
    create_store,
    marker_path,
    open_store,
    parse_record,
    read_markers,
)
from shared.store_check import check_arrays
from shared.store_remote import PARALLEL, Missing, Remote, open_remote

MANIFEST, INCOMING = "MANIFEST.json", ".incoming"
MANIFEST_VERSION = 1
LARGEST_JSON = 64 * 2**20  # bytes of a manifest, marker or list
_ID, _CHUNK = "[0-9a-f]{32}", r"(zarr\.json|c(/0){1,5})"
GROUPS = re.compile(r"((latents|cond|text)/)?zarr\.json")
ALLOWED = re.compile(rf"{GROUPS.pattern}|units/{_ID}\.json|datasets/[A-Za-z0-9_-]{{1,64}}\.json"
                     rf"|(latents|cond)/{_ID}/{_CHUNK}"
                     rf"|text/{_ID}/(zarr\.json|(tokens|ids|offsets)/{_CHUNK})")  # fmt: skip
KINDS = {"units/": Marker, "datasets/": DatasetList}
PUSH_AGAIN = "whoever shared it has to push it again"
Advance = Callable[[float], None]


class Manifest(Record):
    """Every file of a shared store."""

    version: int = MANIFEST_VERSION
    files: tuple[FileRecord, ...] = Field(max_length=10_000_000)

    def by_path(self) -> dict[str, FileRecord]:
        """Path -> record."""
        return {record.path: record for record in self.files}


@dataclass(frozen=True)
class Shared:
    """A shared store whose manifest, markers, lists and metadata have been fetched and found sane."""

    remote: Remote
    manifest: Manifest
    markers: dict[str, Marker]  # path -> marker
    small: dict[str, bytes]  # path -> bytes of every JSON file


def make_manifest(store: Path) -> Manifest:
    """List every file that belongs to the store: groups, files of units, markers, dataset lists."""
    paths = [open_store(store) / "zarr.json", *(store / kind / "zarr.json" for kind in ("latents", "cond", "text"))]
    paths += [*sorted((store / "units").glob("*.json")), *sorted((store / "datasets").glob("*.json"))]
    listed = [FileRecord(path=path.relative_to(store).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))
              for path in paths]  # fmt: skip
    listed += [record for marker in read_markers(store) for record in marker.files]
    return Manifest(files=tuple(sorted(listed, key=lambda record: record.path)))


def push(store: Path, url: str, advance: Callable[[int, int], Advance]) -> tuple[str, int]:
    """Copy what the place lacks, the manifest last; returns (sha256 of the manifest, number of files copied).

    What is there already stays: two stores pushed to one place are merged. `advance(files, bytes)` starts a progress.
    """
    remote, own = open_remote(url), make_manifest(store)
    there = existing(remote)
    lacking = [record for record in own.files if there.get(record.path) != record]
    tell = advance(len(lacking), sum(record.size for record in lacking))
    for first in range(0, len(lacking), remote.batch):
        batch = lacking[first : first + remote.batch]
        remote.write({record.path: store / record.path for record in batch})
        tell(len(batch))
    union = Manifest(files=tuple(sorted((there | own.by_path()).values(), key=lambda record: record.path)))
    write_json(store / MANIFEST, union.model_dump(mode="json"))
    remote.write({MANIFEST: store / MANIFEST})
    return sha256_of(store / MANIFEST), len(lacking)


def existing(remote: Remote) -> dict[str, FileRecord]:
    """What a place holds already, by its manifest; nothing when it has none."""
    try:
        data = read_all(remote, MANIFEST, LARGEST_JSON)
    except Missing:
        return {}
    return parse_manifest(data, remote).by_path()


def parse_manifest(data: bytes, remote: Remote) -> Manifest:
    """Manifest from foreign bytes; refuses other versions, paths that are not a store's, and names given twice."""
    manifest: Manifest = parse_record(data, Manifest, f"{remote.name}/{MANIFEST}", MANIFEST_VERSION, PUSH_AGAIN)
    for record in manifest.files:
        if not ALLOWED.fullmatch(record.path):
            raise hostile(remote, f"{record.path!r} is not the path of a store's file")
    if len(manifest.by_path()) != len(manifest.files):
        raise hostile(remote, "a path is listed twice")
    return manifest


def look(url: str, sha256: str | None = None, known: Path | None = None) -> Shared:
    """Fetch and check all that is small: manifest, markers, dataset lists, array metadata. Writes nothing.

    What an earlier look left in the store `known`, unchanged, is not fetched again.
    """
    remote = open_remote(url)
    data = read_all(remote, MANIFEST, LARGEST_JSON)
    if sha256 and hashlib.sha256(data).hexdigest() != sha256.lower():
        raise StoreError(f"{remote.name}/{MANIFEST}: its sha256 is {hashlib.sha256(data).hexdigest()}, not "
                         f"SHA256={sha256}; ask whoever shared it for the right one")  # fmt: skip
    files = parse_manifest(data, remote).by_path()
    json_records = [record for record in files.values() if record.path.endswith(".json")]
    with ThreadPoolExecutor(PARALLEL) as pool:
        contents = pool.map(lambda record: kept(known, record) or read_checked(remote, record), json_records)
        small = {record.path: content for record, content in zip(json_records, contents, strict=True)}
    records: dict[str, Any] = {
        path: parse_record(content, kind, f"{remote.name}/{path}", mend=PUSH_AGAIN)
        for path, content in small.items() for folder, kind in KINDS.items() if path.startswith(folder)
    }  # fmt: skip
    markers = {path: record for path, record in records.items() if isinstance(record, Marker)}
    check_units(remote, markers, files, small)
    return Shared(remote, Manifest(files=tuple(files.values())), markers, small)


def check_units(
    remote: Remote, markers: dict[str, Marker], files: dict[str, FileRecord], small: dict[str, bytes]
) -> None:
    """Every marker must name itself, list files of its own that the manifest lists alike, and fit its arrays."""
    for path, marker in markers.items():
        if path != f"units/{marker.id}.json":
            raise hostile(remote, f"{path} is the marker of {marker.id}")
        for record in marker.files:
            if files.get(record.path) != record or not record.path.startswith(f"{marker.kind}/{marker.id}/"):
                raise hostile(remote, f"{path} and the manifest differ about {record.path!r}")
        if trouble := check_arrays(marker, small):
            raise hostile(remote, f"{path}: {trouble}")


def hostile(remote: Remote, what: str) -> StoreError:
    """The error of a manifest that no push of ours writes."""
    return StoreError(f"{remote.name}/{MANIFEST} is refused: {what}; nothing was written")


def read_all(remote: Remote, path: str, limit: int) -> bytes:
    """A whole small file; StoreError when it is larger than `limit` bytes."""
    data = bytearray()
    for block in remote.read(path):
        data += block
        if len(data) > limit:
            raise StoreError(f"{remote.name}/{path} is larger than it may be ({limit} bytes); it is refused")
    return bytes(data)


def read_checked(remote: Remote, record: FileRecord) -> bytes:
    """A small file whose size and sha256 are those of its record."""
    data = read_all(remote, record.path, min(record.size, LARGEST_JSON))
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise wrong_bytes(remote, record)
    return data


def kept(store: Path | None, record: FileRecord) -> bytes:
    """A small file of a store here, when it is the one that is listed; else nothing."""
    path = store / record.path if store else None
    data = path.read_bytes() if path and path.is_file() and path.stat().st_size == record.size else b""
    return data if hashlib.sha256(data).hexdigest() == record.sha256 else b""


def wrong_bytes(remote: Remote, record: FileRecord) -> StoreError:
    """The error of an object that is not what the manifest says."""
    return StoreError(f"{remote.name}/{record.path} is not the file that the manifest lists (size or sha256 differ): "
                      "it is damaged or was swapped: push it again")  # fmt: skip


def pull(url: str, store: Path, sha256: str | None, advance: Callable[[int, int], Advance]) -> int:
    """Fetch what the store lacks, verified, unit by unit, going on where it stopped; returns the number of files."""
    shared = look(url, sha256, store)
    refuse_links(store, shared.manifest)
    lacking = {record.path: record for record in shared.manifest.files
               if record.path not in shared.small and not has(store, record)}  # fmt: skip
    size = sum(record.size for record in lacking.values())
    refuse_full_disk(store, size)
    tell = advance(len(lacking), size)
    create_store(store)
    with ThreadPoolExecutor(PARALLEL) as pool, stopping() as stop:
        for path, marker in shared.markers.items():
            records = [lacking[record.path] for record in marker.files if record.path in lacking]
            for _ in pool.map(lambda record: fetch(shared.remote, record, store, stop), records):
                tell(1)
            write_unit(store, path, marker, shared.small)
    for path in shared.small:
        if path.startswith("datasets/"):
            write_small(store, path, shared.small)
    return len(lacking)


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that is set when the block ends in any way: transfers that it was given to end soon after."""
    stop = threading.Event()
    try:
        yield stop
    finally:
        stop.set()


def write_unit(store: Path, path: str, marker: Marker, small: dict[str, bytes]) -> None:
    """Array metadata, then the marker."""
    if not marker_path(store, marker.id).is_file():
        for record in marker.files:
            if record.path in small:
                write_small(store, record.path, small)
        write_small(store, path, small)


def write_small(store: Path, path: str, small: dict[str, bytes]) -> None:
    """Write one JSON file, atomically."""
    with atomic_write(store / path) as file:
        file.write(small[path])


def has(store: Path, record: FileRecord) -> bool:
    """Whether a data file is there: names are made from content, so an equal size is enough (verify reads all)."""
    path = store / record.path
    return path.is_file() and path.stat().st_size == record.size


def refuse_links(store: Path, manifest: Manifest) -> None:
    """No symbolic link inside the store may lead a write out of it."""
    folders = {parent for record in manifest.files for parent in (store / record.path).parents if parent != store}
    for folder in folders:
        if folder.is_relative_to(store) and folder.is_symlink():
            raise StoreError(
                f"{folder} is a symbolic link; a store's folders must be its own: remove it, then pull again"
            )


def refuse_full_disk(store: Path, size: int) -> None:
    """Raise StoreError before anything is written when the disk cannot hold it."""
    folder = next(parent for parent in (store, *store.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise StoreError(f"{store}: {size / 1e9:.1f} GB are to be fetched, {free / 1e9:.1f} GB are free; free space or "
                         "choose another STORE")  # fmt: skip


def fetch(remote: Remote, record: FileRecord, store: Path, stop: threading.Event) -> None:
    """Fetch one file: go on with what an earlier try left, check size and sha256, rename. One fetcher at a time.

    When `stop` is set it ends with an error and leaves the beginning for the next try.
    """
    target = store / record.path
    target.parent.mkdir(parents=True, exist_ok=True)
    incoming = target.with_name(target.name + INCOMING)
    while not has(store, record):
        with incoming.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(file, incoming):  # else who had the lock before renamed or removed it
                fill(remote, record, file, store, stop)


def fill(remote: Remote, record: FileRecord, file: BufferedRandom, store: Path, stop: threading.Event) -> None:
    """Complete a partial file that nobody else has locked, and give it its name; an empty one is removed."""
    try:
        if has(store, record):  # another process was first, between a look and the lock
            file.truncate(0)
            return
        resumed = os.fstat(file.fileno()).st_size > 0
        if not transfer(remote, record, file, stop) and not (resumed and transfer(remote, record, file, stop)):
            raise wrong_bytes(remote, record)
        file.flush()
        os.fsync(file.fileno())
        Path(file.name).replace(store / record.path)
        sync((store / record.path).parent)
    finally:
        file.flush()  # a short beginning is in the buffer alone, and is kept
        if is_at(file, Path(file.name)) and not os.fstat(file.fileno()).st_size:
            Path(file.name).unlink()


def is_at(file: BufferedRandom, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def transfer(remote: Remote, record: FileRecord, file: BufferedRandom, stop: threading.Event) -> bool:
    """Append the rest of a file; False, and emptied, when the whole is not what the record says."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    done = file.tell()
    for block in remote.read(record.path, done) if done < record.size else ():
        if stop.is_set():
            raise StoreError(f"{remote.name}/{record.path}: stopped while fetching; the same command goes on")
        done += len(block)
        if done > record.size:
            break
        digest.update(block)
        file.write(block)
    good = done == record.size and digest.hexdigest() == record.sha256
    if not good:
        file.truncate(0)
    return good
