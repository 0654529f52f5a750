"""Places a store can be shared at: a folder, http(s), s3, gs, or a data set on the Hugging Face Hub. Bytes only.

Input: a URL. Output: a Remote, which reads a file from an offset and writes files. What the bytes are is checked by
`store_share.py`; nothing here trusts or interprets them. obstore and huggingface_hub are imported when they are needed.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from shared.errors import StoreError
from shared.files import atomic_write

BLOCK = 2**20  # bytes read at a time
PARALLEL = 8  # transfers at once
COMMIT_FILES = 100  # the Hub's advice on files per commit


class Remote(Protocol):
    """Somewhere that holds a store's files under their relative paths."""

    name: str

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Bytes of a file from `start` on; StoreError when there is no such file."""

    def write(self, files: Mapping[str, Path]) -> None:
        """Copy local files to these paths, replacing what is there."""


def is_url(text: str) -> bool:
    """Whether a STORE is remote: scheme://..."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def open_remote(url: str) -> Remote:
    """The place a URL or folder names; raises StoreError for other schemes."""
    if not is_url(url):
        return Folder(Path(url).expanduser())
    scheme = url.partition("://")[0]
    if scheme in ("http", "https", "s3", "gs"):
        return Bucket(url)
    if url.startswith("hf://datasets/"):
        return Hub(url)
    raise StoreError(
        f"{url}: not a place for stores; use a folder, http(s)://, s3://, gs:// or hf://datasets/user/name"
    )


class Folder:
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = str(folder), folder

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Blocks of a regular file; a symbolic link is refused, since it may lead out of the folder."""
        source = self.folder / path
        if not source.is_file() or source.resolve() != self.folder.resolve() / path:
            raise missing(self, path)
        with source.open("rb") as file:
            file.seek(start)
            while block := file.read(BLOCK):
                yield block

    def write(self, files: Mapping[str, Path]) -> None:
        """Copy, each file atomically; a file onto itself is left alone."""
        for path, source in files.items():
            if source.resolve() != (self.folder / path).resolve():
                with source.open("rb") as reader, atomic_write(self.folder / path) as writer:
                    shutil.copyfileobj(reader, writer, BLOCK)


class Bucket:
    """A web server or an object store, through obstore (credentials as its environment variables say)."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")

    @cached_property
    def store(self) -> Any:
        """The opened store."""
        try:
            from obstore.store import from_url
        except ImportError:
            raise StoreError(
                f"{self.name}: obstore is needed for this place; run: pip install 'prewan[share]'"
            ) from None
        return from_url(self.name, client_options={"allow_http": True})

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """A range where the server honours ranges, else the whole file without its first `start` bytes."""
        import obstore
        from obstore.exceptions import BaseError, NotFoundError

        try:
            result = self._range(path, start) if start else None
            if result is None:
                result, skip = obstore.get(self.store, path), start
            else:
                skip = 0
            for block in result.stream(BLOCK):
                yield bytes(block)[skip:]
                skip = max(0, skip - len(block))
        except (FileNotFoundError, NotFoundError):
            raise missing(self, path) from None
        except BaseError as error:
            raise unreachable(self, path, error) from None

    def _range(self, path: str, start: int) -> Any:
        """The file from `start` on; None where the server ignores ranges, as Python's own http.server does."""
        import obstore
        from obstore.exceptions import BaseError

        try:
            return obstore.get(self.store, path, options={"range": {"offset": start}})
        except BaseError:
            return None

    def write(self, files: Mapping[str, Path]) -> None:
        """Upload in parallel; every object appears whole."""
        if self.name.startswith("http"):
            raise StoreError(f"TO={self.name}: nothing can be pushed over http; push to a folder and serve that")
        import obstore
        from obstore.exceptions import BaseError

        try:
            with ThreadPoolExecutor(PARALLEL) as pool:
                list(pool.map(lambda item: obstore.put(self.store, item[0], item[1]), files.items()))
        except BaseError as error:
            raise unreachable(self, "", error) from None


class Hub:
    """A data set repository on the Hugging Face Hub: hf://datasets/user/name[@revision][/folder]."""

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", self.name)
        if not match:
            raise StoreError(f"{url}: not like hf://datasets/user/name, @revision and /folder may follow")
        self.repo, self.revision, folder = match[1], match[2], match[3]
        self.prefix = f"{folder}/" if folder else ""

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Bytes through the Hub's file system."""
        from huggingface_hub import HfFileSystem
        from huggingface_hub.errors import HfHubHTTPError

        revision = f"@{self.revision}" if self.revision else ""
        try:
            with HfFileSystem().open(f"datasets/{self.repo}{revision}/{self.prefix}{path}", "rb") as file:
                file.seek(start)
                while block := file.read(BLOCK):
                    yield block
        except FileNotFoundError:
            raise missing(self, path) from None
        except HfHubHTTPError as error:
            raise unreachable(self, path, error) from None

    def write(self, files: Mapping[str, Path]) -> None:
        """Commit in groups; the repository is made, private, when it is new."""
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError

        items, hub = list(files.items()), HfApi()
        try:
            hub.create_repo(self.repo, repo_type="dataset", private=True, exist_ok=True)
            for first in range(0, len(items), COMMIT_FILES):
                adds = [
                    CommitOperationAdd(self.prefix + path, source)
                    for path, source in items[first : first + COMMIT_FILES]
                ]
                hub.create_commit(
                    self.repo, adds, commit_message="Add units", repo_type="dataset", revision=self.revision
                )
        except HfHubHTTPError as error:
            raise unreachable(self, "", error) from None


def missing(remote: Remote, path: str) -> StoreError:
    """The error of a file that is not there."""
    hint = "; push the store there first: make push TO=..." if path == "MANIFEST.json" else ""
    return StoreError(f"{remote.name} has no {path}{hint}")


def unreachable(remote: Remote, path: str, error: Exception) -> StoreError:
    """The error of a place that does not answer."""
    reason = " ".join(str(error).split())[:200]
    return StoreError(
        f"{remote.name}/{path}: {reason}; check the address and the network, then run the same command again"
    )
