"""Places a store can be shared at: a folder, http(s), s3, gs, or a data set on the Hugging Face Hub. Bytes only.

Input: a URL. Output: a Remote, which reads a file from an offset and writes files. What the bytes are is checked by
`store_share.py`; nothing here trusts or interprets them. obstore and huggingface_hub are imported when they are needed.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol

from shared.errors import StoreError
from shared.files import atomic_write

BLOCK = 2**20  # bytes read at a time
PARALLEL = 8  # transfers at once
UNSIGNED = {"s3:": "AWS_SKIP_SIGNATURE", "gs:": "GOOGLE_SKIP_SIGNATURE"}  # reads without an account


class Missing(StoreError):
    """A place does not have a file."""


class Remote(Protocol):
    """Somewhere that holds a store's files under their relative paths."""

    name: str
    batch: int  # files per call of write

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """Bytes of a file from `start` on; Missing when there is no such file."""

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

    batch = 4 * PARALLEL

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

    batch = 4 * PARALLEL

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

    batch = 100  # the Hub's advice on files per commit

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", self.name)
        if not match:
            raise StoreError(f"{url}: not like hf://datasets/user/name, @revision and /folder may follow")
        self.repo, self.revision, folder = match[1], match[2], match[3]
        self.prefix = f"{folder}/" if folder else ""

    @cached_property
    def writable(self) -> Any:
        """The Hub's API, once the repository, private when it is new, and the branch are there."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # push shows its own
        hub = HfApi()
        hub.create_repo(self.repo, repo_type="dataset", private=True, exist_ok=True)
        if self.revision:
            hub.create_branch(self.repo, branch=self.revision, repo_type="dataset", exist_ok=True)
        return hub

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """A range of the file as the Hub serves it: one request, wherever it redirects to."""
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(
            self.repo, self.prefix + path, repo_type="dataset", revision=self.revision, endpoint=HfApi().endpoint
        )
        headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            with http_stream_backoff("GET", url, headers=headers) as response:
                hf_raise_for_status(response)
                skip = 0 if response.status_code == HTTPStatus.PARTIAL_CONTENT else start
                for block in response.iter_bytes(BLOCK):
                    yield block[skip:]
                    skip = max(0, skip - len(block))
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            raise missing(self, path) from None
        except hub_errors() as error:
            raise unreachable(self, path, error) from None

    def write(self, files: Mapping[str, Path]) -> None:
        """One commit."""
        from huggingface_hub import CommitOperationAdd

        adds = [CommitOperationAdd(self.prefix + path, source) for path, source in files.items()]
        try:
            self.writable.create_commit(
                self.repo, adds, commit_message="Add units", repo_type="dataset", revision=self.revision
            )
        except hub_errors() as error:
            raise unreachable(self, "", error.__cause__ or error) from None


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when the Hub refuses or does not answer; an upload's error comes as RuntimeError."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    return HTTPError, OfflineModeIsEnabled, RuntimeError


def missing(remote: Remote, path: str) -> Missing:
    """The error of a file that is not there."""
    hint = "; push the store there first: make push TO=..." if path == "MANIFEST.json" else ""
    private = " (if it is private: hf auth login)" if remote.name.startswith("hf://") and hint else ""
    return Missing(f"{remote.name} has no {path}{hint}{private}")


def unreachable(remote: Remote, path: str, error: BaseException) -> StoreError:
    """The error of a place that does not answer."""
    reason = " ".join(str(error).partition("Debug source")[0].split())[:200]  # behind it obstore shows Rust structs
    public = next(
        (f" (public: {name}=true)" for scheme, name in UNSIGNED.items() if remote.name.startswith(scheme)), ""
    )
    return StoreError(
        f"{remote.name}/{path}: {reason}; check the address, the network and the credentials{public}, "
        "then run the same command again"
    )
