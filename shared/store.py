"""The store of latents and text: immutable units, commit markers, dataset lists. Format: shared/FORMAT.md.

    zarr.json  latents/<id>/  cond/<id>/  text/<id>/{tokens,ids,offsets}/  units/<id>.json  datasets/<id>.json

This module knows names and records and opens stores; `store_write.py` writes units, `store_read.py` reads rows fast.
A unit exists only if its marker does; array shapes are never trusted.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, TypeAdapter, ValidationError, model_validator

from shared.concept import Spans
from shared.errors import StoreError
from shared.files import read_json, write_json
from shared.keys import fingerprint
from shared.shards import Record, SampleFacts, fault

STORE_VERSION = 1
MEND = "delete it and run make encode"  # a damaged record
Kind = Literal["latents", "cond", "text"]
TEXT_CHUNK = 32  # rows of an inner chunk of a text unit; captions start on chunk boundaries
PLACES = TypeAdapter(dict[str, tuple[tuple[NonNegativeInt, NonNegativeInt], ...]])  # of text key -> Spans
GROUP_METADATA: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}


class FileRecord(Record):
    """One file of a unit, relative to the store."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TextRow(Record):
    """Where a caption is in its text unit: `count` real tokens from row `start` (a multiple of TEXT_CHUNK)."""

    text: str
    start: int = Field(ge=0)
    count: int = Field(ge=1)


class Marker(Record):
    """Commit marker of a unit, `units/<id>.json`, written last."""

    version: int = STORE_VERSION
    id: str
    kind: Kind
    made_from: dict[str, Any]  # what the unit's content follows from: shard or captions, and `recipe`
    recipe: dict[str, Any]  # VAE or text encoder weights and config, precision, tiling, encode version ...
    vae_kind: str | None = None  # VaeKind.fingerprint of latents and cond units
    text_dim: int | None = None  # columns of a text unit
    shape: tuple[int, ...]
    rows: dict[str, int] = Field({})  # sample key -> row, of latents and cond units
    captions: dict[str, TextRow] = Field({})  # caption key -> place, of text units
    files: tuple[FileRecord, ...]

    @property
    def source(self) -> str:
        """Name of what the unit was made from: equal for two units that hold the same rows made the same way."""
        return fingerprint(kind=self.kind, made_from=self.made_from, recipe=self.recipe)

    def spans(self, key: str) -> Spans:
        """(first token, number of tokens) of each placeholder in a caption of a text unit."""
        return PLACES.validate_python(self.made_from.get("spans", {})).get(key, ())

    @model_validator(mode="after")
    def _spans_are_inside(self) -> "Marker":
        for key, spans in PLACES.validate_python(self.made_from.get("spans", {})).items():
            if key not in self.captions or any(sum(span) > self.captions[key].count for span in spans):
                raise ValueError(f"the spans of {key} are outside its tokens")
        return self


class ListedSample(SampleFacts):
    """A live sample of a dataset."""

    keys: tuple[str, ...]  # of the variants of its clip
    captions: tuple[str, ...]  # caption keys


class DatasetList(Record):
    """What is trained: `datasets/<id>.json`, a pure function of the index. The only mutable object of a store."""

    version: int = STORE_VERSION
    id: str
    samples: tuple[ListedSample, ...]
    texts: dict[str, str]  # caption key -> text, of every caption of the samples
    recipes: dict[Kind, str] = Field(
        default_factory=dict
    )  # recipe_key of the units to read, per kind: others are stale


class ListHead(BaseModel):
    """A dataset list without its samples, which take most of the time and memory of reading one."""

    version: int
    recipes: dict[Kind, str] = {}


def recipe_key(recipe: dict[str, Any]) -> str:
    """Name of a recipe, as dataset lists hold it."""
    return fingerprint(recipe=recipe)


def open_store(path: Path) -> Path:
    """Check that `path` is a store of this version; raises StoreError naming the command that makes one."""
    meta = path / "zarr.json"
    if not meta.is_file():
        raise StoreError(f"{path} is not a latent store; make one with: make encode")
    version = read_json(meta).get("attributes", {}).get("prewan_store_version")
    if version != STORE_VERSION:
        raise StoreError(f"{path} has store version {version}, this code reads version {STORE_VERSION}")
    return path


def create_store(path: Path) -> Path:
    """Make an empty store (a zarr v3 group), or open the one that is there."""
    for kind in ("latents", "cond", "text"):
        if not (path / kind / "zarr.json").is_file():
            write_json(path / kind / "zarr.json", GROUP_METADATA)
    if not (path / "zarr.json").is_file():
        write_json(path / "zarr.json", GROUP_METADATA | {"attributes": {"prewan_store_version": STORE_VERSION}})
    return open_store(path)


def marker_path(store: Path, unit: str) -> Path:
    """Where a unit's marker is."""
    return store / "units" / f"{unit}.json"


def read_markers(store: Path) -> list[Marker]:
    """All units of the store, in order of id. Raises StoreError on a marker of another version or a damaged one."""
    return [_read_record(path, Marker) for path in sorted((store / "units").glob("*.json"))]


def write_dataset(store: Path, dataset: DatasetList) -> None:
    """Replace a dataset list; writing equal content again leaves equal bytes."""
    write_json(store / "datasets" / f"{dataset.id}.json", dataset.model_dump(mode="json"))


def read_datasets(store: Path) -> list[DatasetList]:
    """All dataset lists of the store, in order of id."""
    return [_read_record(path, DatasetList) for path in sorted((store / "datasets").glob("*.json"))]


def read_recipes(store: Path) -> dict[Kind, set[str]]:
    """recipe_key of the units to read by kind, of all dataset lists together; a kind that none names is left out."""
    wanted: dict[Kind, set[str]] = {}
    for path in sorted((store / "datasets").glob("*.json")):
        for kind, recipe in _read_record(path, ListHead).recipes.items():
            wanted.setdefault(kind, set()).add(recipe)
    return wanted


def _read_record(path: Path, kind: type[Any]) -> Any:
    return parse_record(path.read_bytes(), kind, str(path))


def parse_record(data: bytes, kind: type[Any], where: str, version: int = STORE_VERSION, mend: str = MEND) -> Any:
    """A record from JSON bytes, own or foreign; raises StoreError naming `where` for other versions and damage."""
    with suppress(ValidationError):  # what is wrong is said below; straight from the bytes takes a third of the time
        record = kind.model_validate_json(data)
        if record.version == version:
            return record
    try:
        value = json.loads(data)
        if value.get("version") != version:
            raise StoreError(f"{where} has version {value.get('version')}, this code reads version {version}")
        return kind.model_validate(value)
    except (ValueError, AttributeError, RecursionError) as error:
        raise StoreError(f"{where} is damaged ({fault(error)}); {mend}") from None
