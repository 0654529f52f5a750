"""The store's format: every reader gives back what was written, damage is an error, other versions are refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from shared.errors import StoreError
from shared.keys import caption_key
from shared.store import create_store, open_store, read_datasets, read_markers
from shared.store_read import StoreReader
from shared.store_write import UnitDraft, text_origin, write_texts
from tests.formats.stores import READERS, TEXT_RECIPE, DirectReader, example, normal, write_captions, write_rows

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "golden_v1"
SHAPES = [(1, 1, 1, 1, 1), (1, 16, 1, 4, 6), (5, 48, 3, 2, 4), (64, 4, 2, 6, 8)]
every_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


@every_reader
@pytest.mark.parametrize("kind", ["latents", "cond"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_read_back_as_its_float16(tmp_path: Path, reader: Any, kind: str, shape: tuple[int, ...]) -> None:
    values = normal(0, *shape)
    write_rows(tmp_path, values, [f"key{row}" for row in range(shape[0])], kind)
    opened = reader([tmp_path])
    for row in range(shape[0]):
        np.testing.assert_array_equal(opened.latent(f"key{row}", kind), values[row].astype(np.float16))


@every_reader
def test_a_row_of_zeros_is_a_row(tmp_path: Path, reader: Any) -> None:
    write_rows(tmp_path, np.zeros((2, 4, 1, 2, 2), np.float32), ["a", "b"])
    assert not reader([tmp_path]).latent("b").any()


@every_reader
@pytest.mark.parametrize("lengths", [(1,), (31, 32, 33), (512, 1, 64)], ids=str)
def test_a_caption_is_read_back_with_its_ids(tmp_path: Path, reader: Any, lengths: tuple[int, ...]) -> None:
    _, rows = write_captions(tmp_path, {f"caption {length}": length for length in lengths})
    opened = reader([tmp_path])
    for (key, values), length in zip(rows.items(), lengths, strict=True):
        embedding, ids = opened.text(key)
        np.testing.assert_array_equal(embedding, values.astype(np.float16))
        np.testing.assert_array_equal(ids, np.arange(1, length + 1))


@every_reader
def test_two_units_of_the_same_rows_give_the_lowest_id(tmp_path: Path, reader: Any) -> None:
    values = normal(0, 2, 4, 1, 2, 2)
    markers = [write_rows(tmp_path, values + shift, ["a", "b"]) for shift in (0.0, 0.5, 1.0)]
    lowest = min(range(3), key=lambda number: markers[number].id)
    np.testing.assert_array_equal(reader([tmp_path]).latent("b"), (values + 0.5 * lowest)[1].astype(np.float16))


@every_reader
def test_the_golden_store_of_version_1_is_read(reader: Any) -> None:
    opened = reader([GOLDEN])
    np.testing.assert_array_equal(opened.latent("sample2"), normal(1, 3, 4, 2, 6, 8)[2].astype(np.float16))
    np.testing.assert_array_equal(opened.latent("sample1", "cond"), normal(2, 2, 4, 2, 6, 8)[1].astype(np.float16))
    embedding, ids = opened.text(caption_key("a red ball"))
    np.testing.assert_array_equal(embedding, normal(1, 40, 24).astype(np.float16))
    np.testing.assert_array_equal(ids, np.arange(1, 41))
    assert read_datasets(GOLDEN)[0].samples[0].keys == ("sample0",)


def test_the_writer_still_writes_the_golden_bytes(tmp_path: Path) -> None:
    example(tmp_path)
    files = {path.relative_to(GOLDEN): path.read_bytes() for path in GOLDEN.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_the_page_is_enough_to_read_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example(tmp_path / "latents.zarr")
    monkeypatch.chdir(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "shared/FORMAT.md").read_text(), re.DOTALL)
    assert snippet
    names: dict[str, Any] = {}
    exec(snippet[1], names)
    direct = StoreReader([tmp_path / "latents.zarr"])
    np.testing.assert_array_equal(names["texts"]["a red ball"], direct.text(caption_key("a red ball")).embedding_Sd)
    assert set(names["latents"]) <= set(direct.latents)
    assert len([line for line in snippet[1].splitlines() if line]) <= 11


def test_every_array_is_one_uncompressed_file(tmp_path: Path) -> None:
    example(tmp_path)
    for marker in read_markers(tmp_path):
        arrays = ("tokens", "ids", "offsets") if marker.kind == "text" else (".",)
        for name in arrays:
            folder = tmp_path / marker.kind / marker.id / name
            array = zarr.open_array(folder, mode="r")
            assert len([path for path in (folder / "c").rglob("*") if path.is_file()]) == 1
            (sharding,) = array.metadata.codecs
            assert [codec.to_dict()["name"] for codec in sharding.codecs] == ["bytes", "crc32c"]


def test_offsets_equal_the_marker(tmp_path: Path) -> None:
    marker, _ = write_captions(tmp_path, {"a": 40, "b": 3})
    offsets = zarr.open_array(tmp_path / "text" / marker.id / "offsets", mode="r")[...]
    assert offsets.tolist() == [[place.start, place.count] for place in marker.captions.values()]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_an_error_that_names_the_file(tmp_path: Path, damage: str) -> None:
    marker = write_rows(tmp_path, normal(0, 2, 4, 1, 2, 2), ["a", "b"])
    path = tmp_path / next(record.path for record in marker.files if record.path.endswith("c/0/0/0/0/0"))
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    damaged = {"flip": bytes(data), "truncate": bytes(data[:-3]), "remove": None}[damage]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(StoreError, match=marker.id):
        DirectReader([tmp_path]).latent("a")


def test_one_flipped_bit_costs_one_row(tmp_path: Path) -> None:
    values = normal(0, 2, 4, 1, 2, 2)
    marker = write_rows(tmp_path, values, ["a", "b"])
    path = tmp_path / "latents" / marker.id / "c/0/0/0/0/0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    np.testing.assert_array_equal(StoreReader([tmp_path]).latent("b"), values[1].astype(np.float16))


def test_a_unit_without_its_marker_does_not_exist(tmp_path: Path) -> None:
    marker = write_rows(tmp_path, normal(0, 2, 4, 1, 2, 2), ["a", "b"])
    (tmp_path / "units" / f"{marker.id}.json").unlink()
    with pytest.raises(StoreError, match="make encode"):
        StoreReader([tmp_path]).latent("a")


@pytest.mark.parametrize("name", ["zarr.json", "units", "datasets"])
def test_another_version_is_refused_by_number(tmp_path: Path, name: str) -> None:
    example(tmp_path)
    path = tmp_path / name if name == "zarr.json" else min((tmp_path / name).glob("*.json"))
    path.write_text(re.sub(r'version": 1', 'version": 7', path.read_text()))
    with pytest.raises(StoreError, match="version 7, this code reads version 1"):
        read_markers(open_store(tmp_path)) and read_datasets(tmp_path)


def test_a_damaged_marker_is_refused_by_name(tmp_path: Path) -> None:
    marker = write_rows(tmp_path, normal(0, 1, 4, 1, 2, 2), ["a"])
    (tmp_path / "units" / f"{marker.id}.json").write_text('{"version": 1, "id": ')
    with pytest.raises(StoreError, match=marker.id):
        read_markers(tmp_path)


def test_values_float16_cannot_hold_are_an_error_that_names_the_row(tmp_path: Path) -> None:
    for bad in (np.nan, np.inf, 1e6):
        values = normal(0, 2, 4, 1, 2, 2)
        values[1, 0, 0, 0, 0] = bad
        with pytest.raises(StoreError, match="clip-b"):
            write_rows(tmp_path, values, ["clip-a", "clip-b"])
    assert not read_markers(create_store(tmp_path))


def test_stale_units_are_not_read(tmp_path: Path) -> None:
    example(tmp_path)
    path = tmp_path / "datasets/example.json"
    listed = json.loads(path.read_text())
    assert StoreReader([tmp_path]).latents
    path.write_text(json.dumps(listed | {"recipes": listed["recipes"] | {"latents": "another recipe"}}))
    assert not StoreReader([tmp_path]).latents
    assert StoreReader([tmp_path]).texts


def test_a_concepts_places_are_kept_and_those_outside_a_caption_refused(tmp_path: Path) -> None:
    spans = {"key": ((1, 2), (4, 2)), "other": ()}
    draft = UnitDraft(create_store(tmp_path), "text", text_origin(spans), TEXT_RECIPE)
    marker = write_texts(draft, {"key": "x <c> x <c>", "other": "x"}, [normal(0, 7, 8), normal(1, 2, 8)],
                         [[5] * 7, [5, 1]])  # fmt: skip
    reader = StoreReader([tmp_path])
    assert reader.text("key").spans == spans["key"] and reader.text("other").spans == ()
    path = tmp_path / "units" / f"{marker.id}.json"
    good = json.loads(path.read_text())
    for bad in ({"key": [[6, 2]]}, {"key": [[-1, 1]]}, {"who": [[0, 1]]}, {"key": 5}, 5):
        path.write_text(json.dumps(good | {"made_from": {"captions": ["key"], "spans": bad}}))
        with pytest.raises(StoreError, match=marker.id):
            read_markers(tmp_path)
