"""Training from a URL: the first batch waits for its own files alone, the others come ahead, and no stop spoils one."""

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.config import Config
from shared.models import ModelSpec
from shared.store import ListedSample
from shared.store_copy import fetch_ahead, local_store
from shared.store_read import StoreReader
from shared.store_share import INCOMING, MANIFEST, push
from tests.e2e.commands import ROOT
from tests.shared.places import quiet
from tests.shared.servers import dripping_server, range_server
from tests.train.make import config, listed, make_store
from train.ahead import files_in_order
from train.data import Plan, Slots
from train.feed import prefetch
from train.flow import SigmaLaw
from train.group import Group
from train.stores import Dataset

Made = tuple[Path, ModelSpec, Path]
LAW = SigmaLaw("UNIFORM", 3.0)
ALONE = Group()
STEPS = 12
ALL = 10**9


@pytest.fixture
def shared(single: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, list[ListedSample], Path]:
    """Settings, samples of six buckets (a unit each), and a folder they were pushed to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    model, spec, _ = single
    samples = [listed(number, spec, (9, 128, 64 + 16 * (number % 6))) for number in range(12)]
    push(make_store(tmp_path / "s.zarr", spec, samples), str(tmp_path / "there"), quiet)
    return config(model, batch_size=2, max_steps=STEPS), samples, tmp_path / "there"


def dataset(store: Path, samples: list[ListedSample]) -> Dataset:
    return Dataset(samples, [], StoreReader([store]), {}, "", ())


def here(copy: Path) -> set[str]:
    """Data files of latents that a copy holds, whole ones."""
    return {path.relative_to(copy).as_posix() for path in copy.glob("latents/*/c/0/0/0/0/0")}


def latent_files(reader: StoreReader, plan: Plan, step: int) -> set[Path]:
    return {path for draw in plan.batch(step) for path in reader.files(draw.key, "latents")}


def equal(ours: list[Slots], theirs: list[Slots]) -> bool:
    names = ("latent_BCthw", "noise_BCthw", "sigma_B")
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs, strict=True) for name in names
    )


def test_the_first_batch_needs_only_the_files_of_its_units_and_all_are_those_of_a_local_store(
    shared: tuple[Config, list[ListedSample], Path],
) -> None:
    settings, samples, there = shared
    plan, first = Plan(samples, settings, 2), set[str]()
    opened = threading.Event()
    with dripping_server(
        there, lambda name: ALL if "/c/" not in name or name in first or opened.is_set() else 0
    ) as url:
        copy = local_store(url)
        data = dataset(copy, samples)
        first |= {path.relative_to(copy).as_posix() for path in latent_files(data.reader, plan, 0)}
        threads = fetch_ahead(files_in_order(data, plan, (0, STEPS), ALONE), data.reader.stop)
        batches = prefetch(data.reader, plan, LAW, (0, STEPS), ALONE)
        taken = [next(batches)]
        assert here(copy) == first and len(first) == 1
        opened.set()
        taken += batches
        for thread in threads:
            thread.join()
    local = list(prefetch(StoreReader([there]), Plan(samples, settings, 2), LAW, (0, STEPS), ALONE))
    assert all(equal(ours, theirs) for ours, theirs in zip(taken, local, strict=True))


def test_files_come_in_the_order_of_the_steps_each_once(shared: tuple[Config, list[ListedSample], Path]) -> None:
    settings, samples, there = shared
    with range_server(there) as url:
        held_out, trained = samples[:2], samples[2:]
        data = replace(dataset(local_store(url), trained), validation=held_out)
        plan = Plan(trained, settings, 2)
        named = [path for path in files_in_order(data, plan, (0, STEPS), ALONE) if "latents" in path.parts]
        assert len(set(named)) == len(named) == 6
        assert set(named[:2]) == {path for sample in held_out for path in data.reader.files(sample.keys[0], "latents")}
        order = [path for step in range(STEPS) for path in latent_files(data.reader, plan, step)]
        assert named[2:] == [path for path in dict.fromkeys(order) if path not in named[:2]]
        halves = [set(files_in_order(data, plan, (0, STEPS), Group(rank, 2))) for rank in range(2)]
        assert halves[0] | halves[1] == set(files_in_order(data, plan, (0, STEPS), ALONE))


def test_a_store_in_a_folder_has_nothing_to_fetch(shared: tuple[Config, list[ListedSample], Path]) -> None:
    settings, samples, there = shared
    assert not list(files_in_order(dataset(there, samples), Plan(samples, settings, 2), (0, STEPS), ALONE))


def test_files_are_there_before_they_are_read(shared: tuple[Config, list[ListedSample], Path]) -> None:
    settings, samples, there = shared
    plan = Plan(samples, settings, 2)
    with range_server(there) as url:
        data = dataset(local_store(url), samples)
        for thread in fetch_ahead(files_in_order(data, plan, (0, STEPS), ALONE), data.reader.stop):
            thread.join()
    assert len(list(prefetch(data.reader, plan, LAW, (0, STEPS), ALONE))) == STEPS  # the server is gone
    assert all(data.reader.text(caption).ids_S.size for sample in samples for caption in sample.captions)


def only_whole_files(copy: Path, there: Path) -> int:
    """Every data file of a copy is the one that was pushed, every beginning is one; returns the number of files."""
    files = [path for path in copy.glob("*/*/**/c/**/*") if path.is_file()]
    for path in files:
        name = path.relative_to(copy).as_posix()
        whole = (there / name.removesuffix(INCOMING)).read_bytes()
        assert whole.startswith(path.read_bytes()) if name.endswith(INCOMING) else whole == path.read_bytes()
    return len(files)


def wait_until(happened: Callable[[], object]) -> None:
    while not happened():
        time.sleep(0.005)


def test_a_stop_leaves_beginnings_that_the_next_run_goes_on_with(
    shared: tuple[Config, list[ListedSample], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, samples, there = shared
    monkeypatch.setattr("shared.store_remote.BLOCK", 4096)
    plan, allowed = Plan(samples, settings, 2), [14_000]
    with dripping_server(there, lambda name: allowed[0] if "/c/" in name else ALL) as url:
        copy = local_store(url)
        with dataset(copy, samples).reader as reader:
            data = replace(dataset(copy, samples), reader=reader)
            threads = fetch_ahead(files_in_order(data, plan, (0, STEPS), ALONE), reader.stop)
            wait_until(lambda: any(path.stat().st_size > 4096 for path in copy.rglob(f"*{INCOMING}")))
        allowed[0] = ALL
        for thread in threads:
            thread.join()
        assert not here(copy) and only_whole_files(copy, there)
        taken = list(prefetch(dataset(copy, samples).reader, plan, LAW, (0, STEPS), ALONE))
    local = list(prefetch(StoreReader([there]), plan, LAW, (0, STEPS), ALONE))
    assert all(equal(ours, theirs) for ours, theirs in zip(taken, local, strict=True))


READ_ALL = """
import sys, hashlib, shared.store_remote
shared.store_remote.BLOCK = 4096
from shared.store_copy import fetch_ahead, local_store
from shared.store_read import StoreReader
with StoreReader([local_store(sys.argv[1])]) as reader:
    keys = sorted(reader.latents)
    fetch_ahead((path for key in keys for path in reader.files(key, "latents")), reader.stop)
    print("reading", flush=True)
    print(hashlib.sha256(b"".join(reader.latent(key).tobytes() for key in keys)).hexdigest())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_reader_leaves_nothing_half_written(
    shared: tuple[Config, list[ListedSample], Path], number: signal.Signals
) -> None:
    there = shared[2]
    files = [record for record in json.loads((there / MANIFEST).read_text())["files"] if "/c/" in record["path"]]
    allowed = dict.fromkeys((record["path"] for record in files), 14_000)
    allowed[sorted(record["path"] for record in files if record["path"].startswith("latents"))[0]] = ALL
    with dripping_server(there, lambda name: allowed.get(name, ALL)) as url:
        command = [sys.executable, "-c", READ_ALL, url]
        copy = local_store(url)
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None and process.stdout.readline() == b"reading\n"
            wait_until(lambda: here(copy))
            process.send_signal(number)
            for name in allowed:
                allowed[name] = ALL  # a transfer that is under way ends
            assert process.wait() != 0
        assert len(here(copy)) < 6 and only_whole_files(copy, there)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    reader = StoreReader([there])
    expected = hashlib.sha256(b"".join(reader.latent(key).tobytes() for key in sorted(reader.latents))).hexdigest()
    assert done.stdout.split() == ["reading", expected]
    assert not list(copy.rglob(f"*{INCOMING}")) and only_whole_files(copy, there) == 6
