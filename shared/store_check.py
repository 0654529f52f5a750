"""Does a foreign unit's metadata describe what its marker says? Input: a marker and JSON bytes. Output: the trouble.

Only what `store_write.py` writes is accepted: float16 or int, one shard, bytes + crc32c, no compression. So a huge
shape, another dtype or a chunk that unpacks to gigabytes is refused before a data file is fetched.
"""

import json
import math
from typing import Any

from shared.store import TEXT_CHUNK, Marker

ITEM_SIZES = {"float16": 2, "int32": 4, "int64": 8}
INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def check_arrays(marker: Marker, small: dict[str, bytes]) -> str:
    """What is wrong with a unit, in words; empty when nothing is."""
    sizes = {record.path: record.size for record in marker.files}
    base = f"{marker.kind}/{marker.id}"
    if marker.kind != "text":
        rows, ndim = marker.shape[0] if marker.shape else 0, len(marker.shape)
        if ndim != 5 or len(marker.rows) != rows or set(marker.rows.values()) != set(range(rows)):
            return f"shape {marker.shape} does not hold its {len(marker.rows)} rows"
        return check_array(base, marker.shape, "float16", (1, *marker.shape[1:]), small, sizes)
    if len(marker.shape) != 2 or marker.shape[1] != marker.text_dim or marker.shape[0] % TEXT_CHUNK:
        return f"shape {marker.shape} is not that of token embeddings"
    if any(row.start % TEXT_CHUNK or row.start + row.count > marker.shape[0] for row in marker.captions.values()):
        return "a caption lies outside its array"
    rows, dim = marker.shape
    offsets = (len(marker.captions), 2)
    return (
        check_array(f"{base}/tokens", (rows, dim), "float16", (TEXT_CHUNK, dim), small, sizes)
        or check_array(f"{base}/ids", (rows,), "int32", (TEXT_CHUNK,), small, sizes)
        or check_array(f"{base}/offsets", offsets, "int64", offsets, small, sizes)
    )


def check_array(folder: str, shape: tuple[int, ...], dtype: str, inner: tuple[int, ...], small: dict[str, bytes],
                sizes: dict[str, int]) -> str:  # fmt: skip
    """Metadata and file size of one array against what they must be."""
    data = f"{folder}/c" + "/0" * len(shape)
    if f"{folder}/zarr.json" not in small or data not in sizes or min(shape) < 1:
        return f"{folder} is incomplete"
    meta = _object(small[f"{folder}/zarr.json"])
    if meta.get("data_type") != dtype or meta.get("shape") != list(shape):
        return f"{folder} is {meta.get('data_type')} {meta.get('shape')}, its marker says {dtype} {list(shape)}"
    if meta.get("codecs") != [sharding(inner)] or meta.get("storage_transformers"):
        return f"{folder} has codecs other than one shard of bytes + crc32c"
    if meta.get("chunk_grid") != {"name": "regular", "configuration": {"chunk_shape": list(shape)}}:
        return f"{folder} is not one shard"
    chunks = math.prod(shape) // math.prod(inner)
    if sizes[data] != math.prod(shape) * ITEM_SIZES[dtype] + chunks * (4 + 16) + 4:
        return f"{data} has {sizes[data]} bytes, which is not its shape's size"
    return ""


def sharding(inner: tuple[int, ...]) -> dict[str, Any]:
    """The one codec of every array."""
    return {"name": "sharding_indexed", "configuration": {"chunk_shape": list(inner), "codecs": INDEX_CODECS,
            "index_codecs": INDEX_CODECS, "index_location": "end"}}  # fmt: skip


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
