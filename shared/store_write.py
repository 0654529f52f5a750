"""Write units of a store with zarr-python. Input: arrays in memory. Output: files, then the marker, last.

Every array is sharded into exactly one file with bytes + crc32c and no compression, so that a row is one byte range.
A unit's id is the hash of what it was made from plus the sha256 of its data, so unequal bytes never share a name.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from shared.concept import Spans
from shared.errors import StoreError
from shared.files import PART, sha256_of, sync, write_json
from shared.keys import fingerprint
from shared.store import GROUP_METADATA, TEXT_CHUNK, FileRecord, Kind, Marker, TextRow, marker_path

Array = NDArray[Any]


def write_array(folder: Path, values: Array, inner_chunk: tuple[int, ...]) -> None:
    """One zarr v3 array of one shard file; the array must be non-empty and a whole number of inner chunks.

    Chunks of zeros are written too: a missing chunk always means damage.
    """
    codec = ShardingCodec(chunk_shape=inner_chunk, codecs=[BytesCodec(), Crc32cCodec()])
    array = zarr.create_array(
        store=folder,
        shape=values.shape,
        dtype=values.dtype,
        chunks=values.shape,
        serializer=codec,
        compressors=None,
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[...] = values


def as_float16(values: NDArray[np.float32] | NDArray[np.float16], names: list[str]) -> NDArray[np.float16]:
    """Cast rows to float16; a value that is not finite afterwards is an error that names its row, never replaced."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16, copy=False)
    for row, name in zip(half, names, strict=True):
        if not np.isfinite(row).all():
            raise StoreError(
                f"{name}: encoding gave NaN, infinite or too large values; check the file and weights, "
                "or encode in FLOAT_32"
            )
    return half


class UnitDraft:
    """A unit being written in a folder of its own; `commit` renames it into place and writes its marker."""

    def __init__(self, store: Path, kind: Kind, made_from: dict[str, Any], recipe: dict[str, Any]) -> None:
        self.store, self.kind, self.made_from, self.recipe = store, kind, made_from, recipe
        # a name of its own: two machines may make the same unit at the same time
        self.folder = store / kind / f"{fingerprint(made_from=made_from, recipe=recipe)}.{uuid4().hex[:8]}{PART}"

    def commit(self, shape: tuple[int, ...], **fields: Any) -> Marker:
        """Name the unit by its content, move it into place, write the marker; returns the marker."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        for path in files:
            sync(path)
        sums = {path.relative_to(self.folder).as_posix(): (path.stat().st_size, sha256_of(path)) for path in files}
        unit = fingerprint(
            made_from=self.made_from, recipe=self.recipe, data={name: sha for name, (_, sha) in sums.items()}
        )
        self._move_to(self.store / self.kind / unit, sums)
        records = tuple(FileRecord(path=f"{self.kind}/{unit}/{name}", size=size, sha256=sha)
                        for name, (size, sha) in sorted(sums.items()))  # fmt: skip
        marker = Marker(id=unit, kind=self.kind, made_from=self.made_from, recipe=self.recipe, shape=shape,
                        files=records, **fields)  # fmt: skip
        write_json(marker_path(self.store, unit), marker.model_dump(mode="json"))
        return marker

    def _move_to(self, final: Path, sums: dict[str, tuple[int, str]]) -> None:
        """Rename the draft; the same unit, left without a marker by a crash or made by another machine, is kept."""
        if final.exists() and all(
            (final / name).is_file() and sha256_of(final / name) == sha for name, (_, sha) in sums.items()
        ):
            shutil.rmtree(self.folder)
            return
        if final.exists():
            shutil.rmtree(final)
        self.folder.rename(final)
        sync(final.parent)


def write_latents(draft: UnitDraft, keys: list[str], latents_nCThw: NDArray[np.float32] | NDArray[np.float16],
                  vae_kind: str) -> Marker:  # fmt: skip
    """Commit a unit of normalised latents, one row per sample key, in order."""
    half = as_float16(latents_nCThw, keys)
    write_array(draft.folder, half, (1, *half.shape[1:]))
    return draft.commit(half.shape, rows={key: row for row, key in enumerate(keys)}, vae_kind=vae_kind)


def text_origin(spans: Mapping[str, Spans]) -> dict[str, Any]:
    """`made_from` of a text unit: its keys in order, and where a learned concept's tokens are, by key."""
    placed = {key: [list(span) for span in found] for key, found in spans.items() if found}
    return {"captions": list(spans)} | ({"spans": placed} if placed else {})


def write_texts(
    draft: UnitDraft, texts: dict[str, str], embeddings: list[NDArray[np.float32]], ids: list[list[int]]
) -> Marker:
    """Commit a unit of captions: `texts` is key -> text, in order; embeddings are (S, text_dim), ids are S ints."""
    places: dict[str, TextRow] = {}
    start = 0
    for (key, text), rows in zip(texts.items(), embeddings, strict=True):
        places[key] = TextRow(text=text, start=start, count=len(rows))
        start += -(-len(rows) // TEXT_CHUNK) * TEXT_CHUNK
    dim = embeddings[0].shape[1]
    tokens, padded_ids = np.zeros((start, dim), np.float16), np.zeros(start, np.int32)
    for (key, place), rows, row_ids in zip(places.items(), embeddings, ids, strict=True):
        span = slice(place.start, place.start + place.count)
        tokens[span] = as_float16(rows[None], [f"caption {texts[key]!r}"])[0]
        padded_ids[span] = row_ids
    write_json(draft.folder / "zarr.json", GROUP_METADATA)
    write_array(draft.folder / "tokens", tokens, (TEXT_CHUNK, dim))
    write_array(draft.folder / "ids", padded_ids, (TEXT_CHUNK,))
    offsets = np.array([[place.start, place.count] for place in places.values()], np.int64)
    write_array(draft.folder / "offsets", offsets, offsets.shape)
    return draft.commit(tokens.shape, captions=places, text_dim=dim)
