"""A local copy of a store at a URL: markers and lists at once, data files when they are read, or shortly before.

Input: a URL. Output: a folder that `store_read.py` reads like any store. Every file is fetched as pull fetches it:
resumed, verified, renamed into place, so a stop at any moment leaves whole files and beginnings that the next run goes
on with. Cost: one connection per thread; a file is fetched once, however many processes read the copy.
"""

import re
import threading
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from shared.errors import StoreError
from shared.files import kept_folder, read_json, write_json
from shared.keys import fingerprint
from shared.store import FileRecord, create_store
from shared.store_remote import Remote, is_url, open_remote
from shared.store_share import fetch, look, refuse_links, write_small, write_unit

ORIGIN = "origin.json"
AHEAD = 4  # threads that fetch ahead


def local_store(text: str) -> Path:
    """The folder of a STORE: itself, or for a URL a local copy whose data is fetched, verified, when first read."""
    if not is_url(text):
        return Path(text)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text.rstrip("/").partition("://")[2].removesuffix(".zarr")).strip("-")
    store = kept_folder() / "stores" / f"{name[-40:]}-{fingerprint(url=text.rstrip('/'))[:8]}.zarr"
    shared = look(text, known=store)
    refuse_links(store, shared.manifest)
    create_store(store)
    files = {record.path: [record.size, record.sha256] for record in shared.manifest.files}
    write_json(store / ORIGIN, {"url": text, "files": files})
    for path, marker in shared.markers.items():
        write_unit(store, path, marker, shared.small)
    for path in shared.small:
        if path.startswith("datasets/"):
            write_small(store, path, shared.small)
    return store


def is_copy(store: Path) -> bool:
    """Whether a store is the local copy of one at a URL."""
    return (store / ORIGIN).is_file()


def copy_of(path: Path) -> Path | None:
    """The local copy of a store that a file belongs to; None when its store is a plain folder."""
    for store in path.parents:
        if is_copy(store):
            return store
        if (store / "units").is_dir():
            return None
    return None


@lru_cache(maxsize=16)
def origin(store: Path, changed_ns: int) -> tuple[Remote, dict[str, tuple[int, str]]]:
    """Where a copy comes from: the place, and path -> (size, sha256); read again when origin.json has changed."""
    del changed_ns
    kept = read_json(store / ORIGIN)
    return open_remote(kept["url"]), {name: (size, sha256) for name, (size, sha256) in kept["files"].items()}


def fetch_missing(path: Path, stop: threading.Event) -> bool:
    """Fetch a data file of a local copy that is not here yet; False when the file's store is not such a copy."""
    store = copy_of(path)
    if store is None:
        return False
    remote, files = origin(store, (store / ORIGIN).stat().st_mtime_ns)
    name = path.relative_to(store).as_posix()
    size, sha256 = files[name]
    fetch(remote, FileRecord(path=name, size=size, sha256=sha256), store, stop)
    return True


def fetch_ahead(paths: Iterable[Path], stop: threading.Event) -> list[threading.Thread]:
    """Fetch files of local copies in this order, `AHEAD` at a time, until `stop`; returns the threads."""
    row, lock = iter(paths), threading.Lock()
    threads = [threading.Thread(target=fetch_next, args=(row, lock, stop), daemon=True) for _ in range(AHEAD)]
    for thread in threads:
        thread.start()
    return threads


def fetch_next(row: Iterator[Path], lock: threading.Lock, stop: threading.Event) -> None:
    """Fetch one path after the other. The first that fails ends it: whoever reads that file says what is wrong."""
    try:
        while not stop.is_set():
            with lock:
                path = next(row, None)
            if path is None:
                return
            if not path.exists():
                fetch_missing(path, stop)
    except (StoreError, OSError):
        return
