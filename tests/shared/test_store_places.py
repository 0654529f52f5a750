"""Every kind of place: a folder, web servers, S3, Google's storage and the Hub give back what was pushed, or refuse."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from shared.errors import StoreError
from shared.store import read_markers
from shared.store_remote import Hub, open_remote
from shared.store_share import INCOMING, pull, push
from tests.formats.stores import example
from tests.shared.hub import REPO, HubServer, hub_address, hub_server
from tests.shared.places import add_file, files_of, place, pushed, quiet
from tests.shared.servers import plain_server, s3_server


@pytest.mark.parametrize("kind", ["folder", "ranges", "plain", "s3", "gs", "hf"])
def test_what_is_pulled_is_what_was_pushed(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = example(tmp_path / "a.zarr")
    with pushed(kind, store, tmp_path / "there", monkeypatch) as url:
        fetched = pull(url, tmp_path / "b.zarr", None, quiet)
        assert fetched == sum("/c/" in name for name in files_of(store))
        assert files_of(tmp_path / "b.zarr") == files_of(store)
        assert pull(url, tmp_path / "b.zarr", None, quiet) == 0
        if not url.startswith("http"):
            assert push(store, url, quiet)[1] == 0


def test_a_new_data_set_on_the_hub_is_private_and_few_commits_fill_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = HubServer(tmp_path / "there")
    store = example(tmp_path / "a.zarr")
    with hub_address(hub, monkeypatch):
        _, count = push(store, f"hf://datasets/{REPO}", quiet)
        assert (hub.visibility, hub.commits) == ("private", [count, 1])  # the manifest comes last, by itself
        assert {path.name for path in hub.objects.iterdir()} == {
            hashlib.sha256(data).hexdigest() for name, data in files_of(store).items() if not name.endswith(".json")
        }


def test_a_branch_of_a_data_set_is_made_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = example(tmp_path / "a.zarr")
    with hub_server(tmp_path / "there", monkeypatch) as url:
        with pytest.raises(StoreError, match="has no MANIFEST"):
            pull(f"{url}@v2/sets", tmp_path / "b.zarr", None, quiet)
        push(store, f"{url}@v2/sets", quiet)
        pull(f"{url}@v2/sets", tmp_path / "b.zarr", None, quiet)
        with pytest.raises(StoreError, match="has no MANIFEST"):
            pull(f"{url}/sets", tmp_path / "c.zarr", None, quiet)
    assert files_of(tmp_path / "b.zarr") == files_of(store)


@pytest.mark.parametrize("kind", ["s3", "gs", "hf"])
def test_an_object_of_several_parts_arrives_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).bytes(11 * 2**20 + 3)  # obstore uploads parts of 5 MiB
    (tmp_path / "data").write_bytes(data)
    with s3_server(monkeypatch) if kind == "s3" else place(kind, tmp_path / "there", monkeypatch) as url:
        remote = open_remote(url)
        remote.write({"latents/0/c/0": tmp_path / "data"})
        assert b"".join(remote.read("latents/0/c/0")) == data
        assert b"".join(remote.read("latents/0/c/0", 7 * 2**20)) == data[7 * 2**20 :]


@pytest.mark.parametrize("kind", ["ranges", "plain"])
def test_a_file_is_read_from_where_it_is_asked_for(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the server sends it whole all the same."""
    data = np.random.default_rng(0).bytes(3 * 2**20 + 3)
    (tmp_path / "data").write_bytes(data)
    with place(kind, tmp_path, monkeypatch) as url:
        for start in (0, 5, 2**20, 2**21 + 7):
            assert b"".join(open_remote(url).read("data", start)) == data[start:]


@pytest.mark.parametrize("kind", ["folder", "gs", "hf"])
def test_a_hostile_manifest_is_refused_wherever_it_lies(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(example(tmp_path / "a.zarr"), str(tmp_path / "there"), quiet)
    add_file(tmp_path / "there", "../evil")
    before = sorted(tmp_path.rglob("*"))
    with place(kind, tmp_path / "there", monkeypatch) as url:
        with pytest.raises(StoreError, match=r"'\.\./evil'"):
            pull(url, tmp_path / "b.zarr", None, quiet)
        with pytest.raises(StoreError, match=r"'\.\./evil'"):
            push(tmp_path / "a.zarr", url, quiet)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["ranges", "plain", "gs", "hf"])
def test_a_wrong_beginning_is_fetched_again(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = example(tmp_path / "a.zarr")
    push(store, str(tmp_path / "there"), quiet)
    records = [record for marker in read_markers(store) for record in marker.files if "/c/" in record.path]
    for record in records:
        left = tmp_path / "b.zarr" / f"{record.path}{INCOMING}"
        left.parent.mkdir(parents=True, exist_ok=True)
        left.write_bytes(b"?" * min(100, record.size // 2))
    with place(kind, tmp_path / "there", monkeypatch) as url:
        pull(url, tmp_path / "b.zarr", None, quiet)
    assert files_of(tmp_path / "b.zarr") == files_of(store)


@pytest.mark.parametrize("kind", ["ranges", "plain", "gs", "hf"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "longer", "swap", "remove"])
def test_a_wrong_object_is_refused_by_name(
    tmp_path: Path, kind: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, there = example(tmp_path / "a.zarr"), tmp_path / "there"
    push(store, str(there), quiet)
    marker = next(marker for marker in read_markers(store) if marker.kind == "latents")
    name = next(record.path for record in marker.files if "/c/" in record.path)
    data = (there / name).read_bytes()
    other = next(path for path in there.rglob("0") if path.is_file() and path.read_bytes() != data)
    wrong = {"flip": bytes([data[0] ^ 1]) + data[1:], "truncate": data[:-1], "longer": data + b"?",
             "swap": other.read_bytes(), "remove": b""}[damage]  # fmt: skip
    (there / name).unlink() if damage == "remove" else (there / name).write_bytes(wrong)
    with place(kind, there, monkeypatch) as url, pytest.raises(StoreError, match=name):
        pull(url, tmp_path / "b.zarr", None, quiet)
    assert marker.id not in {marker.id for marker in read_markers(tmp_path / "b.zarr")}
    assert not list((tmp_path / "b.zarr").rglob(f"*{INCOMING}"))


@pytest.mark.parametrize("url", ["ftp://host/store", "file:///etc", "hf://models/user/name", "hf://datasets/name"])
def test_other_places_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match=url):
        open_remote(url)


def test_a_hub_address_is_taken_apart() -> None:
    hub = Hub("hf://datasets/user/name@v2/sets/latents.zarr/")
    assert (hub.repo, hub.revision, hub.prefix) == ("user/name", "v2", "sets/latents.zarr/")


def test_a_place_without_a_store_says_so(tmp_path: Path) -> None:
    with plain_server(tmp_path) as url, pytest.raises(StoreError, match="has no MANIFEST"):
        pull(url, tmp_path / "b.zarr", None, quiet)
    with pytest.raises(StoreError, match="check the address"):
        pull("http://127.0.0.1:9/none", tmp_path / "b.zarr", None, quiet)


def test_nothing_is_pushed_over_http(tmp_path: Path) -> None:
    store = example(tmp_path / "a.zarr")
    with plain_server(tmp_path / "a.zarr") as url, pytest.raises(StoreError, match="over http"):
        push(store, url, quiet)
