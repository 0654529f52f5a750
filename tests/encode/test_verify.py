"""`encode verify` finds damage by name, and measures what the VAE makes of the stored latents."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image

from encode.verify import Compared, check_files, check_finite, compare, decoder_of
from shared.errors import StoreError
from shared.files import sha256_of
from shared.shards import read_index
from shared.store import Marker, marker_path, read_markers
from shared.store_read import StoreReader
from shared.weights import load_vae
from tests.e2e.commands import refused
from tests.e2e.commands import run as command
from tests.encode.test_encode import run, settings
from tests.formats.stores import example


def nothing(share: float) -> None:
    del share


def store_of(tmp_path: Path) -> tuple[Path, list[Marker]]:
    store = example(tmp_path / "latents.zarr")
    return store, read_markers(store)


def test_every_damaged_file_is_found_by_name(tmp_path: Path) -> None:
    store, markers = store_of(tmp_path)
    check_files(store, markers, nothing)
    for marker in markers:
        for record in marker.files:
            path = store / record.path
            good = path.read_bytes()
            path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
            with pytest.raises(StoreError, match=record.path):
                check_files(store, markers, nothing)
            path.write_bytes(good)


def test_a_nan_latent_names_its_clip(tmp_path: Path) -> None:
    store, markers = store_of(tmp_path)
    marker = next(marker for marker in markers if marker.kind == "latents")
    array: Any = zarr.open_array(store / "latents" / marker.id, mode="r+")
    array[1, 0, 0, 0, 0] = np.nan
    path = store / "latents" / marker.id / "c/0/0/0/0/0"
    good = {"sha256": sha256_of(path)}
    files = tuple(record.model_copy(update=good if "/c/" in record.path else {}) for record in marker.files)
    marker_path(store, marker.id).write_text(marker.model_copy(update={"files": files}).model_dump_json())
    check_files(store, read_markers(store), nothing)
    with pytest.raises(StoreError, match=r"birds\.mp4 at 3 s"):
        check_finite(StoreReader([store]), {"sample1": "birds.mp4 at 3 s"})


def test_psnr_is_that_of_the_definition() -> None:
    pixels = np.full((2, 4, 4, 3), 100, np.uint8)
    sample: Any = None
    assert Compared(sample, pixels, pixels).psnr == np.inf
    assert Compared(sample, pixels, pixels + 1).psnr == pytest.approx(48.1308, abs=1e-3)


def test_what_is_compared_is_the_same_clip(work: Path, model: Path) -> None:
    reader = StoreReader([run(work, model)])
    vae = load_vae(settings(model).spec, None)
    compared = list(compare(work, read_index(work), reader, decoder_of(vae), 4))
    assert len({pair.sample.key for pair in compared}) == 4
    for pair in compared:
        assert pair.pixels.shape == pair.decoded.shape
        swapped = [other for other in compared if other.pixels.shape == pair.pixels.shape]
        assert all(other.sample.key == pair.sample.key or (other.pixels != pair.pixels).any() for other in swapped)


def test_the_command_reports_and_draws(work: Path, model: Path) -> None:
    store = run(work, model)
    said = command("encode", "verify", "--work", work, "--model", model, "--preset", "demo", "--samples", 2)
    assert "all intact" in said
    assert said.count(" dB  ") == 2
    with Image.open(work / "verify.png") as sheet:
        assert sheet.width > 2 * 48
    unit = next(marker for marker in read_markers(store) if marker.kind == "text")
    (store / unit.files[0].path).unlink()
    assert unit.files[0].path in refused("encode", "verify", "--work", work)
