"""Stores for the format tests: drawn from a seed, so that any version of the code writes the same rows."""

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from shared.keys import caption_key
from shared.store import DatasetList, ListedSample, Marker, create_store, read_markers, recipe_key, write_dataset
from shared.store_read import StoreReader
from shared.store_write import UnitDraft, write_latents, write_texts

RECIPE = {"encode_version": 1, "vae": "some weights", "precision": "FLOAT_32", "tiling": False}
TEXT_RECIPE = {"encode_version": 1, "text_encoder": "some weights", "tokenizer": "t", "precision": "FLOAT_32"}
Half = NDArray[np.float16]


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write_rows(store: Path, latents: NDArray[np.float32], names: list[str], kind: Any = "latents") -> Marker:
    draft = UnitDraft(create_store(store), kind, {"shard": "0" * 64, "keys": str(names)}, RECIPE)
    return write_latents(draft, names, latents, "kind")


def write_captions(
    store: Path, lengths: dict[str, int], dim: int = 24
) -> tuple[Marker, dict[str, NDArray[np.float32]]]:
    texts = {caption_key(text): text for text in lengths}
    rows = [normal(number, length, dim) for number, length in enumerate(lengths.values())]
    ids = [list(range(1, length + 1)) for length in lengths.values()]
    draft = UnitDraft(create_store(store), "text", {"captions": list(texts)}, TEXT_RECIPE)
    return write_texts(draft, texts, rows, ids), dict(zip(texts, rows, strict=True))


def example(store: Path) -> Path:
    """One unit of each kind and a dataset list."""
    write_rows(store, normal(1, 3, 4, 2, 6, 8), ["sample0", "sample1", "sample2"])
    write_rows(store, normal(2, 2, 4, 2, 6, 8), ["sample0", "sample1"], "cond")
    write_captions(store, {"": 1, "a red ball": 40, "a blue cube \u00e4\u4e2d": 7})
    sample = ListedSample(clip="clip", keys=("sample0",), num_frames=5, height=48, width=64, fps=8.0,
                          captions=(caption_key("a red ball"),), source="clip.mp4")  # fmt: skip
    recipes: Any = {"latents": recipe_key(RECIPE), "text": recipe_key(TEXT_RECIPE)}
    write_dataset(store, DatasetList(id="example", samples=(sample,), recipes=recipes,
                                     texts={caption_key("a red ball"): "a red ball"}))  # fmt: skip
    return store


class ZarrReader:
    """The reference: the same questions answered with zarr-python and the markers."""

    def __init__(self, stores: list[Path]) -> None:
        self.units = [(store, marker) for store in stores for marker in read_markers(store)]

    def latent(self, key: str, kind: str = "latents") -> Half:
        units = [
            (marker.id, store, marker) for store, marker in self.units if marker.kind == kind and key in marker.rows
        ]
        unit, store, marker = min(units, key=lambda found: found[0])
        return np.asarray(zarr.open_array(store / kind / unit, mode="r")[marker.rows[key]])

    def text(self, key: str) -> tuple[Half, NDArray[np.int32]]:
        store, marker = next((store, marker) for store, marker in self.units if key in marker.captions)
        place = marker.captions[key]
        span = slice(place.start, place.start + place.count)
        folder = store / "text" / marker.id
        tokens, ids = (np.asarray(zarr.open_array(folder / name, mode="r")[span]) for name in ("tokens", "ids"))
        return tokens, ids


class DirectReader:
    """The trainer's reader, in the shape of the reference."""

    def __init__(self, stores: list[Path]) -> None:
        self.reader = StoreReader(stores)

    def latent(self, key: str, kind: str = "latents") -> Half:
        return self.reader.latent(key, kind)

    def text(self, key: str) -> tuple[Half, NDArray[np.int32]]:
        text = self.reader.text(key)
        return text.embedding_Sd, text.ids_S


READERS = {"direct": DirectReader, "zarr-python": ZarrReader}
