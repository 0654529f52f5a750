"""Weights in safetensors files, one at a time, under one set of names whatever the file calls them.

Input: a file or a folder of files; weights may be bf16, fp16, fp32, plain fp8, or fp8 with a scale per tensor as
ComfyUI repackages them: W = codes x scale, in float32 (keys `scale_weight`, in newer files `weight_scale`).
Output: tensors by name. A header is read without torch; nothing stays mapped between two reads.
"""

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from shared.errors import ModelError
from shared.names import Rename, without_prefix

FLOATS = {"F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
SCALES = (".scale_weight", ".weight_scale")  # of ComfyUI's older and newer files, beside `.weight`
# no weights: scales of inputs (for fp8 arithmetic), marks of the format, the tokenizer of a text encoder
BESIDE = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8", "spiece_model")
LARGEST_HEADER = 100 << 20  # bytes, as in safetensors


class Entry(NamedTuple):
    """A tensor as its header describes it; the bytes are file[start:stop]."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a safetensors file says of itself."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


class Place(NamedTuple):
    """Where a weight is."""

    path: Path
    key: str
    scale: str | None  # key of its scale
    shape: tuple[int, ...]


def read_header(path: Path) -> Header:
    """Header of a safetensors file whose length is checked; raises ModelError when it is another or a damaged file."""
    facts = path.stat()
    return _read_header(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=16)
def _read_header(path: Path, size: int, changed: int) -> Header:
    del changed  # part of the cache's key
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if 2 <= length <= min(size - 8, LARGEST_HEADER) else b""
    try:
        values = json.loads(text)
        metadata = values.pop("__metadata__", {})
        entries = {
            name: Entry(value["dtype"], tuple(value["shape"]), *(8 + length + at for at in value["data_offsets"]))
            for name, value in values.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path} is damaged, or no safetensors file; download it again") from None
    if max((entry.stop for entry in entries.values()), default=0) != size:
        raise ModelError(f"{path} is damaged (it is {size} bytes long, its header says otherwise); download it again")
    return Header(entries, metadata)


def places_of(source: Path, rename: Callable[[set[str]], Rename]) -> dict[str, Place]:
    """Every weight of a file, or of a folder's files, by its new name. `rename` gets all names, without prefix."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{source} has no .safetensors file; it must be a complete model folder in diffusers layout")
    headers = {path: read_header(path).entries for path in files}
    renamed = rename({without_prefix(key) for entries in headers.values() for key in entries})
    places: dict[str, Place] = {}
    for path, entries in headers.items():
        for key in sorted(entries):
            if not key.endswith((*SCALES, *BESIDE)):
                places[renamed(without_prefix(key))] = _place(path, key, entries)
    return places


def _place(path: Path, key: str, entries: dict[str, Entry]) -> Place:
    entry, stem = entries[key], key.removesuffix(".weight")
    if entry.dtype not in FLOATS:
        raise ModelError(f"{path}: {key} is stored as {entry.dtype}, by a program whose way of quantising is not known "
                         "here; take the bf16, fp16, fp8 or fp8_scaled file of the model")  # fmt: skip
    if f"{stem}.comfy_quant" in entries:
        kind = quantised_as(path, entries[f"{stem}.comfy_quant"])
        if not kind.startswith("float8_"):
            raise ModelError(
                f"{path}: {key} is quantised as {kind}; take the bf16, fp16 or fp8_scaled file of the model"
            )
    scale = next((stem + end for end in SCALES if stem + end in entries and key != stem), None)
    if scale is not None and math.prod(entries[scale].shape) not in (1, entry.shape[0]):
        raise ModelError(
            f"{path}: {scale} is neither one scale nor one per row; take the bf16 or fp16 file of the model"
        )
    return Place(path, key, scale, entry.shape)


def quantised_as(path: Path, mark: Entry) -> str:
    """The `format` that ComfyUI's mark of a quantised weight names."""
    with path.open("rb") as file:
        file.seek(mark.start)
        text = file.read(max(0, mark.stop - mark.start))
    try:
        return str(json.loads(text).get("format"))
    except (ValueError, AttributeError):
        raise ModelError(f"{path} is damaged (a comfy_quant in it is no JSON object); download it again") from None


def read(place: Place, rows: slice | list[int] | None = None) -> Any:
    """The tensor, or some of its rows: memory-mapped as stored, fp8 made float32. Raises ModelError when damaged."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place.path, framework="pt") as file:
            value = file.get_tensor(place.key) if rows is None else _rows(file.get_slice(place.key), rows)
            scale = None if place.scale is None else file.get_tensor(place.scale).float()
    except SafetensorError as error:
        raise ModelError(f"{place.path} is damaged ({error}); download it again") from None
    if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        value = value.float()
    if scale is None:
        return value
    if scale.numel() > 1:  # one per row
        scale = scale.view(-1, 1) if rows is None else scale.view(-1, 1)[rows]
    return value.float() * scale


def _rows(table: Any, rows: slice | list[int]) -> Any:
    """A range of rows, or single ones, of which only these are read."""
    import torch

    return table[rows] if isinstance(rows, slice) else torch.cat([table[row : row + 1] for row in rows])
