"""`encode status` says what is there and what is not, from small files alone."""

from pathlib import Path

from encode.plan import ENCODE_VERSION, dataset_list
from shared.files import write_json
from shared.keys import caption_key, fingerprint
from shared.shards import Index, SampleRecord, ShardRecord, read_index, write_index
from shared.store import FileRecord, Marker, TextRow, create_store, marker_path, write_dataset
from tests.e2e.commands import run as command
from tests.encode.test_encode import SAID, run

SAMPLES, PER_SHARD = 10_000, 100
RECIPE = {"encode_version": ENCODE_VERSION, "precision": "FLOAT_32", "tiling": False, "vae": "another"}


def large_store(work: Path) -> None:
    """Index and markers of 10,000 samples with a caption each; status reads nothing else."""
    store = create_store(work / "latents.zarr")
    samples, shards = [], []
    for first in range(0, SAMPLES, PER_SHARD):
        keys = [fingerprint(number=number) for number in range(first, first + PER_SHARD)]
        name = f"{first}.tar"
        shards.append(ShardRecord(name=name, sha256="0" * 64, bytes=1, keys=tuple(keys)))
        samples += [SampleRecord(key=key, shard=name, extension="mp4", num_frames=17, height=512, width=512, fps=24,
                                 captions=(f"caption of {key}",), source=f"{key}.mp4", start=0, duration=1, clip=key)
                    for key in keys]  # fmt: skip
        captions = {caption_key(f"caption of {key}"): TextRow(text=f"caption of {key}", start=32 * row, count=9)
                    for row, key in enumerate(keys)}  # fmt: skip
        for kind, rows in (("latents", {key: row for row, key in enumerate(keys)}), ("text", {})):
            unit = fingerprint(kind=kind, first=first)
            file = FileRecord(path=f"{kind}/{unit}/c/0/0/0/0/0", size=4_000_000, sha256="0" * 64)
            marker = Marker(id=unit, kind=kind, made_from={}, recipe=RECIPE, shape=(100, 48, 5, 32, 32), rows=rows,
                            captions=captions if kind == "text" else {}, files=(file,))  # fmt: skip
            write_json(marker_path(store, unit), marker.model_dump(mode="json"))
    index = Index(dataset="large", ingest_version=1, samples=tuple(samples), shards=tuple(shards))
    write_index(work, index)
    write_dataset(store, dataset_list(index, {"latents": RECIPE, "text": RECIPE}))


def test_status_reads_the_index_and_the_markers_alone(tmp_path: Path, model: Path) -> None:
    """There are no shards and no arrays here (`make bench ROWS=status` takes its time)."""
    large_store(tmp_path)
    said = command("encode", "status", "--work", tmp_path, "--model", model, "--preset", "demo")
    assert "latents: 10000 rows in 100 units, 400.0 MB" in said
    assert "10000 stale latents (" in said
    assert "vae another -> " in said


def test_status_says_what_encode_would_do(work: Path, model: Path) -> None:
    arguments = ("encode", "status", "--work", work, "--model", model, "--preset", "demo", "--set", SAID)
    create_store(work / "latents.zarr")
    assert "to encode: 7 new latents, " in command(*arguments)
    run(work, model)
    said = command(*arguments)
    assert "latents: 7 rows in 3 units" in said and "in 1 unit," in said
    assert "make train" in said
    index = read_index(work)
    write_index(work, index.model_copy(update={"samples": index.samples[1:]}))
    assert "to do: the list of samples changed; next: make encode" in (said := command(*arguments))
    assert "make train" not in said
    run(work, model)
    assert "make train" in command(*arguments)
