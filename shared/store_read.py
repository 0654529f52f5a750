"""Read rows of a store directly: one positioned read and one checksum per sample, from any number of threads.

The files are plain zarr v3 shards (sharding_indexed, index at the end, bytes + crc32c); zarr-python is the reference in
the tests. Any number of threads. Cost: about 0.03 ms of CPU for a 640 KiB sample, its checksum.
"""

import mmap
import os
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from shared.concept import Spans
from shared.errors import StoreError
from shared.store import TEXT_CHUNK, Kind, Marker, TextRow, open_store, read_markers, read_recipes, recipe_key

CRC_RESIDUE = 0x48674BC7  # crc32c of any bytes followed by their own little-endian crc32c
TOKENS, IDS = "tokens/c/0/0", "ids/c/0"  # data files of a text unit
MISSING = 2**64 - 1  # offset of a chunk that was never written (zarr v3 sharding specification)


class ArrayFile:
    """One sharded array file, mapped once; `chunk(i)` is inner chunk i. Safe to use from many threads."""

    def __init__(self, path: Path, chunks: int) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.bytes = np.frombuffer(
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"", np.uint8
                )
        except FileNotFoundError:
            raise StoreError(
                f"{path} is missing from the store; delete its marker in units/ and run make encode"
            ) from None
        tail = self.bytes[-(16 * chunks + 4) :]
        if len(tail) != 16 * chunks + 4 or google_crc32c.value(tail) != CRC_RESIDUE:
            raise StoreError(f"{path} is truncated or damaged; run: python -m encode verify")
        self.index = struct.unpack(f"<{2 * chunks}Q", tail[:-4].tobytes())

    def chunk(self, number: int) -> NDArray[np.uint8]:
        """Bytes of an inner chunk without its checksum, which has been verified; a read-only view of the file."""
        offset, size = self.index[2 * number], self.index[2 * number + 1]
        data = self.bytes[:0] if offset == MISSING else self.bytes[offset : offset + size]
        if len(data) != size or google_crc32c.value(data) != CRC_RESIDUE:
            raise StoreError(f"{self.path}: chunk {number} fails its checksum; run: python -m encode verify")
        return data[:-4]


def open_array(path: Path, chunks: int, stop: threading.Event) -> ArrayFile:
    """Open an array file; one of a local copy of a shared store is fetched first when it is not here yet."""
    if not path.exists():
        from shared.store_copy import fetch_missing

        fetch_missing(path, stop)
    return ArrayFile(path, chunks)


@dataclass(frozen=True)
class Text:
    """One caption: embedding (S, text_dim) float16 of its S real tokens, their ids (S,), and which are a concept's."""

    embedding_Sd: NDArray[np.float16]
    ids_S: NDArray[np.int32]
    spans: Spans = ()


def fresh_units(store: Path) -> list[Marker]:
    """Units of a store without the stale ones: of each kind, those whose recipe a dataset list names, if any does."""
    wanted = read_recipes(open_store(store))
    return [marker for marker in read_markers(store)
            if marker.kind not in wanted or recipe_key(marker.recipe) in wanted[marker.kind]]  # fmt: skip


class StoreReader:
    """Rows of one or more stores by key. Where several units hold the same rows, the lowest unit id is read."""

    def __init__(self, stores: Iterable[Path], accept: "set[str] | None" = None) -> None:
        """`accept`: ids of the units to use; None: those made by the recipes that the stores' dataset lists name."""
        self.latents: dict[str, tuple[Path, Marker]] = {}
        self.cond: dict[str, tuple[Path, Marker]] = {}
        self.texts: dict[str, tuple[Path, Marker]] = {}
        self._tables = {"latents": self.latents, "cond": self.cond, "text": self.texts}
        self.stores = list(stores)
        for store in self.stores:
            for marker in fresh_units(store) if accept is None else read_markers(open_store(store)):
                if accept is None or marker.id in accept:
                    self._add(store, marker)
        self.stop = threading.Event()  # set: nothing is fetched any more
        self._file = lru_cache(maxsize=None)(partial(open_array, stop=self.stop))

    def __enter__(self) -> "StoreReader":
        return self

    def __exit__(self, *_: object) -> None:
        """From now on only what is here already is read."""
        self.stop.set()

    def files(self, key: str, kind: Kind) -> list[Path]:
        """Files that `latent` or `text` reads for a key."""
        store, marker = self._find(key, kind)
        if kind == "text":
            return [store / "text" / marker.id / name for name in (TOKENS, IDS)]
        return [store / kind / marker.id / "c" / "/".join("0" * len(marker.shape))]

    def _add(self, store: Path, marker: Marker) -> None:
        table = self._tables[marker.kind]
        for key in marker.captions if marker.kind == "text" else marker.rows:
            if key not in table or marker.id < table[key][1].id:
                table[key] = (store, marker)

    def latent(self, key: str, kind: Kind = "latents") -> NDArray[np.float16]:
        """Latent (C, T, h, w) of a sample key, read-only; raises StoreError when the store has no such row."""
        (path,), (_, marker) = self.files(key, kind), self._find(key, kind)
        file = self._file(path, marker.shape[0])
        return file.chunk(marker.rows[key]).view(np.float16).reshape(marker.shape[1:])

    def text(self, key: str) -> Text:
        """Embedding and token ids of a caption key."""
        (tokens_path, ids_path), (_, marker) = self.files(key, "text"), self._find(key, "text")
        place = marker.captions[key]
        tokens = self._rows(tokens_path, marker, place, np.dtype(np.float16), marker.shape[1])
        ids = self._rows(ids_path, marker, place, np.dtype(np.int32), 1)
        return Text(tokens, ids[:, 0], marker.spans(key))

    def _rows(self, path: Path, marker: Marker, place: TextRow, dtype: "np.dtype[Any]", columns: int) -> NDArray[Any]:
        file = self._file(path, marker.shape[0] // TEXT_CHUNK)
        first, last = place.start // TEXT_CHUNK, (place.start + place.count - 1) // TEXT_CHUNK
        chunks = [file.chunk(number).view(dtype) for number in range(first, last + 1)]
        return np.concatenate(chunks).reshape(-1, columns)[: place.count]

    def _find(self, key: str, kind: Kind) -> tuple[Path, Marker]:
        table = self._tables[kind]
        if key not in table:
            raise StoreError(f"the store has no {kind} for {key}; run: make encode")
        return table[key]
