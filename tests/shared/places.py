"""Places a store is pushed to and pulled from in the tests, and what the tests ask of a folder there."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.store_share import MANIFEST, push
from tests.shared.hub import hub_server
from tests.shared.servers import gs_server, plain_server, range_server, s3_server


def quiet(files: int, size: int) -> Callable[[float], None]:
    del files, size
    return lambda count: None


def files_of(store: Path) -> dict[str, bytes]:
    found = {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != MANIFEST}


def add_file(there: Path, path: str) -> None:
    manifest = json.loads((there / MANIFEST).read_text())
    manifest["files"].append({"path": path, "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()})
    (there / MANIFEST).write_text(json.dumps(manifest))


@contextmanager
def place(kind: str, there: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Somewhere that shows the files of a folder; yields its URL."""
    if kind == "folder":
        yield str(there)
        return
    server = {"ranges": range_server, "plain": plain_server}.get(kind)
    writable = {"gs": gs_server, "hf": hub_server}.get(kind)
    with server(there) if server else writable(there, monkeypatch) as url:  # type: ignore[misc]
        yield url


@contextmanager
def pushed(kind: str, store: Path, there: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The store, pushed; yields the URL to pull from."""
    with s3_server(monkeypatch) if kind == "s3" else place(kind, there, monkeypatch) as url:
        push(store, str(there) if kind in ("ranges", "plain") else url, quiet)
        yield url
