"""Sharing a store: what arrives is what was pushed, only what is missing travels, and nothing foreign is trusted."""

import fcntl
import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared.errors import StoreError
from shared.store import read_datasets, read_markers
from shared.store_copy import local_store
from shared.store_read import StoreReader
from shared.store_remote import open_remote
from shared.store_share import INCOMING, MANIFEST, fetch, fill, look, pull, push
from tests.formats.stores import example, normal, write_rows
from tests.shared.places import add_file, files_of, quiet
from tests.shared.servers import plain_server, range_server


def test_only_what_is_new_travels(tmp_path: Path) -> None:
    store = example(tmp_path / "a.zarr")
    _, first = push(store, str(tmp_path / "there"), quiet)
    assert first == len(files_of(store))
    pull(str(tmp_path / "there"), tmp_path / "b.zarr", None, quiet)
    write_rows(store, normal(9, 2, 4, 2, 6, 8), ["new0", "new1"])
    _, second = push(store, str(tmp_path / "there"), quiet)
    assert second == 3  # data, metadata, marker
    assert pull(str(tmp_path / "there"), tmp_path / "b.zarr", None, quiet) == 1
    assert files_of(tmp_path / "b.zarr") == files_of(store)


def test_two_stores_pushed_to_one_place_are_merged(tmp_path: Path) -> None:
    for name in ("a", "b"):
        store = tmp_path / f"{name}.zarr"
        write_rows(store, normal(ord(name), 1, 4, 1, 2, 2), [f"key-{name}"])
        push(store, str(tmp_path / "there"), quiet)
    pull(str(tmp_path / "there"), tmp_path / "c.zarr", None, quiet)
    assert set(StoreReader([tmp_path / "c.zarr"]).latents) == {"key-a", "key-b"}


def test_stores_merge_by_copying_files(tmp_path: Path) -> None:
    import shutil

    for name in ("a", "b"):
        write_rows(tmp_path / f"{name}.zarr", normal(ord(name), 1, 4, 1, 2, 2), [f"key-{name}"])
    shutil.copytree(tmp_path / "a.zarr", tmp_path / "b.zarr", dirs_exist_ok=True)
    reader = StoreReader([tmp_path / "b.zarr"])
    for name in ("a", "b"):
        np.testing.assert_array_equal(reader.latent(f"key-{name}"), normal(ord(name), 4, 1, 2, 2).astype(np.float16))


def test_a_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    store, ranges = example(tmp_path / "a.zarr"), []
    push(store, str(tmp_path / "there"), quiet)
    marker = next(marker for marker in read_markers(store) if marker.kind == "latents")
    record = next(record for record in marker.files if "/c/" in record.path)
    left = tmp_path / "b.zarr" / f"{record.path}{INCOMING}"
    left.parent.mkdir(parents=True)
    left.write_bytes((store / record.path).read_bytes()[:100])
    with range_server(tmp_path / "there", ranges) as url:
        pull(url, tmp_path / "b.zarr", None, quiet)
    assert ranges == ["bytes=100-"]
    assert files_of(tmp_path / "b.zarr") == files_of(store)


def test_an_interrupted_pull_leaves_whole_units(tmp_path: Path) -> None:
    store = example(tmp_path / "a.zarr")
    push(store, str(tmp_path / "there"), quiet)

    def stopping(files: int, size: int) -> Callable[[float], None]:
        left = iter(range(2))

        def advance(count: float) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        pull(str(tmp_path / "there"), tmp_path / "b.zarr", None, stopping)
    there = read_markers(tmp_path / "b.zarr")
    assert len(there) < len(read_markers(store))
    for marker in there:
        assert all((tmp_path / "b.zarr" / record.path).is_file() for record in marker.files)
    pull(str(tmp_path / "there"), tmp_path / "b.zarr", None, quiet)
    assert files_of(tmp_path / "b.zarr") == files_of(store)


def test_pulls_at_the_same_time_agree(tmp_path: Path) -> None:
    store = example(tmp_path / "a.zarr")
    push(store, str(tmp_path / "there"), quiet)
    with range_server(tmp_path / "there") as url:
        pulls = [threading.Thread(target=pull, args=(url, tmp_path / "b.zarr", None, quiet)) for _ in range(4)]
        for thread in pulls:
            thread.start()
        for thread in pulls:
            thread.join()
    assert files_of(tmp_path / "b.zarr") == files_of(store)


def test_who_waited_for_a_file_that_went_makes_a_new_one(tmp_path: Path) -> None:
    store, copy = example(tmp_path / "a.zarr"), tmp_path / "b.zarr"
    push(store, str(tmp_path / "there"), quiet)
    record = next(record for marker in read_markers(store) for record in marker.files if "/c/" in record.path)
    incoming = copy / (record.path + INCOMING)
    incoming.parent.mkdir(parents=True)
    with incoming.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remote, stop = open_remote(str(tmp_path / "there")), threading.Event()
        waiting = threading.Thread(target=fetch, args=(remote, record, copy, stop))
        waiting.start()
        time.sleep(0.3)
        incoming.unlink()
    waiting.join()
    assert (copy / record.path).read_bytes() == (store / record.path).read_bytes()
    with incoming.open("a+b") as late:  # of who looked before the file had its name
        fill(remote, record, late, copy, stop)
    assert not incoming.exists()


def test_a_file_of_another_size_is_fetched_again(tmp_path: Path) -> None:
    store, copy = example(tmp_path / "a.zarr"), tmp_path / "b.zarr"
    push(store, str(tmp_path / "there"), quiet)
    pull(str(tmp_path / "there"), copy, None, quiet)
    record = next(record for marker in read_markers(store) for record in marker.files if "/c/" in record.path)
    (copy / record.path).write_bytes(b"?")
    pull(str(tmp_path / "there"), copy, None, quiet)
    assert files_of(copy) == files_of(store)


def test_the_manifest_can_be_required(tmp_path: Path) -> None:
    sha256, _ = push(example(tmp_path / "a.zarr"), str(tmp_path / "there"), quiet)
    assert sha256 == hashlib.sha256((tmp_path / "there" / MANIFEST).read_bytes()).hexdigest()
    with pytest.raises(StoreError, match="SHA256"):
        pull(str(tmp_path / "there"), tmp_path / "b.zarr", "0" * 64, quiet)
    assert not (tmp_path / "b.zarr").exists()
    pull(str(tmp_path / "there"), tmp_path / "b.zarr", sha256, quiet)


def rewrite(there: Path, path: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a shared store and make its manifest agree, as an attacker can."""
    value = change(json.loads((there / path).read_text()))
    (there / path).write_text(json.dumps(value))
    data, manifest = (there / path).read_bytes(), json.loads((there / MANIFEST).read_text())
    for record in manifest["files"]:
        if record["path"] == path:
            record |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (there / MANIFEST).write_text(json.dumps(manifest))


PATHS = ["../evil", "/etc/evil", "latents/../../evil", "units/../evil.json", "zarr.json/evil", "run.py", "",
         "latents//zarr.json", "datasets/.evil.json", "c:\\evil", "units/evil.json", "zarr.json",
         f"latents/{'0' * 32}/c/0/0/0/0/0/0/0"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_no_stores_is_refused_before_anything_is_written(tmp_path: Path, path: str) -> None:
    there = tmp_path / "there"
    push(example(tmp_path / "a.zarr"), str(there), quiet)
    add_file(there, path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=MANIFEST):
        pull(str(there), tmp_path / "b.zarr", None, quiet)
    assert sorted(tmp_path.rglob("*")) == before


def array_change(**fields: Any) -> Callable[[Any], Any]:
    return lambda meta: meta | fields


HUGE = [2**40, 4, 2, 6, 8]
ZSTD = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd", "configuration": {"level": 1}}]
ARRAYS = {
    "huge shape": array_change(shape=HUGE),
    "other dtype": array_change(data_type="float64"),
    "bomb": array_change(codecs=ZSTD),
    "storage": array_change(storage_transformers=[{"name": "evil"}]),
    "many shards": array_change(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1, 4, 2, 6, 8]}}),
    "not an object": lambda meta: [meta],
}


@pytest.mark.parametrize("change", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("consistent", [True, False])
def test_an_array_other_than_ours_is_refused(tmp_path: Path, change: Callable[[Any], Any], consistent: bool) -> None:
    there = tmp_path / "there"
    push(example(tmp_path / "a.zarr"), str(there), quiet)
    marker = next(marker for marker in read_markers(there) if marker.kind == "latents")
    path = f"latents/{marker.id}/zarr.json"
    rewrite(there, path, change)
    if consistent:  # the marker lists the changed file too
        record = next(
            record for record in json.loads((there / MANIFEST).read_text())["files"] if record["path"] == path
        )
        rewrite(there, f"units/{marker.id}.json", lambda value: value | {
            "files": [record if old["path"] == path else old for old in value["files"]]})  # fmt: skip
    with pytest.raises(StoreError, match="is refused"):
        pull(str(there), tmp_path / "b.zarr", None, quiet)
    assert not (tmp_path / "b.zarr").exists()


def other_sum(marker: dict[str, Any]) -> dict[str, Any]:
    return marker | {"files": [record | {"sha256": "0" * 64} for record in marker["files"]]}


def moved_caption(marker: dict[str, Any]) -> dict[str, Any]:
    return marker | {"captions": {key: row | {"start": 960} for key, row in marker["captions"].items()}}


WHO = "inputs are not permitted); whoever shared it has to push it again"
# what a marker of a kind says falsely, and the words with which it is refused
MARKERS = {
    "other id": ("latents", lambda marker: marker | {"id": "0" * 32}, "is the marker of 0000"),
    "foreign file": ("latents", lambda marker: marker | {"files": [ELSEWHERE]}, "differ about 'zarr.json'"),
    "other sum": ("latents", other_sum, "and the manifest differ about"),
    "huge shape": ("latents", lambda marker: marker | {"shape": HUGE}, "does not hold its 3 rows"),
    "rows beyond": ("latents", lambda marker: marker | {"rows": {"a": 0, "b": 7, "c": 2}}, "does not hold its 3 rows"),
    "caption beyond": ("text", moved_caption, "a caption lies outside its array"),
    "version": ("latents", lambda marker: marker | {"version": 2}, "has version 2"),
    "unknown field": (
        "latents",
        lambda marker: marker | {"code": "import os"},
        f"damaged (code: Extra {WHO}",
    ),
    "other kind of value": (
        "latents",
        lambda marker: marker | {"made_from": "x"},
        "(made_from: Input should be a valid dict",
    ),
}
ELSEWHERE = {"path": "zarr.json", "size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(("kind", "change", "message"), MARKERS.values(), ids=MARKERS)
def test_a_marker_that_lies_is_refused(tmp_path: Path, kind: str, change: Callable[[Any], Any], message: str) -> None:
    there = tmp_path / "there"
    push(example(tmp_path / "a.zarr"), str(there), quiet)
    marker = next(marker for marker in read_markers(there) if marker.kind == kind)
    rewrite(there, f"units/{marker.id}.json", change)
    with pytest.raises(StoreError) as refused:
        pull(str(there), tmp_path / "b.zarr", None, quiet)
    assert message in str(refused.value)
    assert not (tmp_path / "b.zarr").exists()


def test_a_data_file_of_another_size_than_its_shape_is_refused(tmp_path: Path) -> None:
    """Manifest and marker agree on it."""
    there = tmp_path / "there"
    push(example(tmp_path / "a.zarr"), str(there), quiet)
    marker = next(marker for marker in read_markers(there) if marker.kind == "latents")
    data = f"latents/{marker.id}/c/0/0/0/0/0"

    def grown(listed: dict[str, Any]) -> dict[str, Any]:
        return listed | {"files": [record | ({"size": 2**40} if record["path"] == data else {})
                                   for record in listed["files"]]}  # fmt: skip

    rewrite(there, f"units/{marker.id}.json", grown)
    (there / MANIFEST).write_text(json.dumps(grown(json.loads((there / MANIFEST).read_text()))))
    with pytest.raises(StoreError, match="which is not its shape's size"):
        pull(str(there), tmp_path / "b.zarr", None, quiet)
    assert not (tmp_path / "b.zarr").exists()


def test_a_swapped_json_file_is_refused_by_name(tmp_path: Path) -> None:
    there = tmp_path / "there"
    push(example(tmp_path / "a.zarr"), str(there), quiet)
    path = there / "datasets" / "example.json"
    path.write_bytes(path.read_bytes().replace(b"clip.mp4", b"evil.mp4"))
    with pytest.raises(StoreError, match=r"datasets/example\.json is not the file that the manifest lists"):
        pull(str(there), tmp_path / "b.zarr", None, quiet)
    assert not (tmp_path / "b.zarr").exists()


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(example(tmp_path / "a.zarr"), str(tmp_path / "there"), quiet)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match="free space or choose another STORE"):
        pull(str(tmp_path / "there"), tmp_path / "b.zarr", None, quiet)
    assert not (tmp_path / "b.zarr").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    store, there = example(tmp_path / "a.zarr"), tmp_path / "there"
    push(store, str(there), quiet)
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b.zarr/latents").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        pull(str(there), tmp_path / "b.zarr", None, quiet)
    assert not list((tmp_path / "elsewhere").iterdir())
    name = next(record.path for record in look(str(there)).manifest.files if "/c/" in record.path)
    (tmp_path / "secret").write_bytes((there / name).read_bytes())
    (there / name).unlink()
    (there / name).symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError, match="has no"):
        pull(str(there), tmp_path / "c.zarr", None, quiet)


def test_a_manifest_larger_than_any_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(example(tmp_path / "a.zarr"), str(tmp_path / "there"), quiet)
    monkeypatch.setattr("shared.store_share.LARGEST_JSON", 1000)
    with pytest.raises(StoreError, match="larger than it may be"):
        pull(str(tmp_path / "there"), tmp_path / "b.zarr", None, quiet)


def test_a_url_is_read_through_a_copy_that_fetches_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    store = example(tmp_path / "a.zarr")
    push(store, str(tmp_path / "there"), quiet)
    with range_server(tmp_path / "there") as url:
        copy = local_store(url)
        assert read_datasets(copy) == read_datasets(store)
        assert not list(copy.glob("*/*/c"))
        reader, here = StoreReader([copy]), StoreReader([store])
        np.testing.assert_array_equal(reader.latent("sample1"), here.latent("sample1"))
        assert len(list(copy.glob("*/*/c"))) == 1
        for key in here.texts:
            np.testing.assert_array_equal(reader.text(key).embedding_Sd, here.text(key).embedding_Sd)
    np.testing.assert_array_equal(StoreReader([copy]).latent("sample2"), here.latent("sample2"))


def test_a_swapped_object_is_not_read_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    store, there = example(tmp_path / "a.zarr"), tmp_path / "there"
    push(store, str(there), quiet)
    with plain_server(there) as url:
        copy = local_store(url)
        for path in there.rglob("0"):
            if path.is_file():
                path.write_bytes(b"?" * path.stat().st_size)
        with pytest.raises(StoreError, match="manifest"):
            StoreReader([copy]).latent("sample1")


def test_a_folder_is_its_own_local_store(tmp_path: Path) -> None:
    assert local_store(str(tmp_path)) == tmp_path
