"""`encode status` says what is there and what is not, and is fast on a large store."""

import subprocess
import sys
from pathlib import Path

from encode.plan import dataset_list
from shared.files import write_json
from shared.keys import caption_key, fingerprint
from shared.shards import Index, SampleRecord, ShardRecord, read_index, write_index
from shared.store import FileRecord, Marker, TextRow, create_store, marker_path, write_dataset
from tests.e2e.commands import ROOT
from tests.e2e.commands import run as command
from tests.encode.test_encode import SAID, run

SAMPLES, PER_SHARD = 10_000, 100
RECIPE = {"encode_version": 1, "precision": "FLOAT_32", "tiling": False, "vae": "another"}


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


def test_ten_thousand_samples_take_under_a_second_of_processor_time(tmp_path: Path, model: Path) -> None:
    large_store(tmp_path)
    code = (
        "import resource, sys; from encode.__main__ import main; import atexit; "
        "atexit.register(lambda: print('CPU', sum(resource.getrusage(resource.RUSAGE_SELF)[:2])));"
        f"sys.argv = ['encode', 'status', '--work', {str(tmp_path)!r}, '--model', {str(model)!r}, '--preset', 'demo'];"
        "main()"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert "latents: 10000 rows in 100 units, 400.0 MB" in done.stdout
        assert "10000 stale latents (vae another -> " in done.stdout
        seconds.append(float(done.stdout.split("CPU")[1]))
    assert min(seconds) < 1.0


def test_status_says_what_encode_would_do(work: Path, model: Path) -> None:
    arguments = ("encode", "status", "--work", work, "--model", model, "--preset", "demo", "--set", SAID)
    create_store(work / "latents.zarr")
    assert "to encode: 7 new latents, " in command(*arguments)
    run(work, model)
    said = command(*arguments)
    assert "latents: 7 rows in 3 units" in said
    assert "make train" in said
    index = read_index(work)
    write_index(work, index.model_copy(update={"samples": index.samples[1:]}))
    assert "to do: the list of samples changed; next: make encode" in (said := command(*arguments))
    assert "make train" not in said
    run(work, model)
    assert "make train" in command(*arguments)
