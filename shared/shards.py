"""What ingest leaves: tar shards of samples and an index, written last, that names every sample and every drop.

A shard is an immutable WebDataset tar of samples of one bucket: `<key>.mp4` (`.mkv` when lossless, `.png` for an
image), `<key>.json` and a thumbnail for people, `<key>.jpg`.
The index is the only mutable file; it is replaced by rename. Anything not in the index does not exist.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.bucket import Bucket
from shared.errors import DatasetError
from shared.files import read_json, write_json

INDEX_VERSION = 1
Split = Literal["train", "validation"]


class Record(BaseModel):
    """A frozen, strict record of a file format."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def fault(error: Exception) -> str:
    """What is wrong with the JSON of a record, in a few words."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")


class SourceFacts(Record):
    """Probed facts of a source; `facts` holds what the probe found (codec, fps, rotation, colour ...), for people."""

    path: str  # relative to the dataset folder, POSIX
    sha256: str
    facts: dict[str, Any] = {}


class SampleFacts(Record):
    """What a sample is and how it is trained, as the index and a dataset list both say it."""

    clip: str  # key shared by the variants of one window at one resolution: the trainer draws one of them per epoch
    source: str  # path of its source
    num_frames: int
    height: int
    width: int
    fps: float
    repeats: int = 1
    prior: bool = False
    weight: float = 1.0
    split: Split = "train"

    @property
    def bucket(self) -> Bucket:
        """Size in pixels."""
        return Bucket(self.num_frames, self.height, self.width)


class SampleRecord(SampleFacts):
    """One sample of the index: where its pixels are, and what is said about them."""

    key: str
    shard: str  # file name of the tar
    extension: Literal["mp4", "png", "mkv"]
    captions: tuple[str, ...]
    start: float  # seconds in the source
    duration: float  # seconds of the source that the sample shows
    variant: str = "plain"  # temporal augmentation


class ShardRecord(Record):
    """One tar in work/shards."""

    name: str
    sha256: str
    bytes: int
    keys: tuple[str, ...]  # in the order of the tar


class Drop(Record):
    """Something that was not kept, and why."""

    source: str
    reason: str
    start: float | None = None
    value: float | str | None = None


class Index(Record):
    """Everything ingest decided."""

    version: int = INDEX_VERSION
    dataset: str  # id drawn at first ingest, kept in dataset.json
    ingest_version: int
    sources: tuple[SourceFacts, ...] = ()
    samples: tuple[SampleRecord, ...] = ()
    shards: tuple[ShardRecord, ...] = ()
    dropped: tuple[Drop, ...] = ()


def index_path(work: Path) -> Path:
    """Where the index of a work folder is."""
    return work / "index.json"


def shard_folder(work: Path) -> Path:
    """Where the tars of a work folder are."""
    return work / "shards"


def write_index(work: Path, index: Index) -> None:
    """Replace the index, atomically."""
    write_json(index_path(work), index.model_dump(mode="json"))


def read_index(work: Path) -> Index:
    """Load the index; raises DatasetError when there is none, it is damaged, or of another version."""
    path = index_path(work)
    if not path.is_file():
        raise DatasetError(f"{path} is missing: nothing was ingested here yet; run: make ingest DATA=your_videos/")
    try:
        value = read_json(path)
        if value.get("version") != INDEX_VERSION:
            raise DatasetError(f"{path} has version {value.get('version')}, this code reads {INDEX_VERSION}; "
                               "run make ingest again")  # fmt: skip
        return Index.model_validate(value)
    except (ValueError, AttributeError) as error:
        raise DatasetError(f"{path} is damaged ({fault(error)}); run make ingest again") from None
