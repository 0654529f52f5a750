"""The resume law: killed at any moment and started again, a run ends with the same bits as one that was left alone."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from shared.config import Config
from shared.keys import caption_key
from shared.models import ModelSpec
from tests.train.children import child
from tests.train.make import config, equal, events, listed, make_run, make_store, trained
from train import checkpoint
from train.run import Run
from train.session import start

Made = tuple[Path, ModelSpec, Path]
BASE: dict[str, Any] = {"max_steps": 8, "backup_after": 3, "ema": 0.9, "resolution": "32x32,48x32",
                        "video_config": {"video_batch_size_multiplier": 0.5}}  # fmt: skip


def assert_same_runs(ours: Run, theirs: Run, experts: tuple[str, ...]) -> None:
    for expert in experts:
        for kind in ("weights", "average"):
            assert equal(trained(ours, expert, kind), trained(theirs, expert, kind))
    states = [checkpoint.read_optimizer(checkpoint.latest(run.folder) or Path()) for run in (ours, theirs)]
    assert states[0] and equal(*states)
    assert events(ours) == events(theirs)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 6))])
@pytest.mark.parametrize("experts", [("single",), ("high_noise", "low_noise")])
def test_killed_at_random_moments_a_run_ends_bit_equal(
    mixed: Made, pair: Made, tmp_path: Path, experts: Any, seed: int
) -> None:
    model, _, store = mixed if len(experts) == 1 else pair
    kill_and_compare(tmp_path, config(model, **BASE), store, experts, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("method", ["FINE_TUNE", "EMBEDDING"])
def test_killed_at_random_moments_every_method_ends_bit_equal(
    single: Made, tmp_path: Path, method: str, seed: int
) -> None:
    """With accumulation, averages and several buckets, as above; one kill without them is in test_method.py."""
    model, spec, _ = single
    settings = config(model, **BASE, training_method=method, output_model_format="SAFETENSORS")
    text = f"{settings.embedding.placeholder} here"
    samples = [
        listed(number, spec, (9, 32, 32 + 16 * (number % 2)), captions=(caption_key(text),)) for number in range(8)
    ]
    store = make_store(tmp_path / "s.zarr", spec, samples, (text,), settings.embedding)
    kill_and_compare(tmp_path, settings, store, ("single",), seed)


def kill_and_compare(folder: Path, settings: Config, store: Path, experts: tuple[str, ...], seed: int) -> None:
    """A run left alone, and one that is killed four times."""
    whole, broken = (make_run(folder / name, settings, store) for name in ("whole", "broken"))
    began = time.monotonic()
    start(whole, finished=False)
    length, dice = time.monotonic() - began, random.Random(f"{seed} {experts}")
    for turn in range(4):
        process = child(broken)
        if turn:
            time.sleep(dice.uniform(0.1, 1.2) * length)
        while not turn and checkpoint.latest(broken.folder) is None:  # one at least is to be gone on from
            assert process.is_alive()
            time.sleep(0.005)
        process.kill()
        process.join()
    start(broken, finished=False)
    assert_same_runs(whole, broken, experts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(single: Made, tmp_path: Path, number: signal.Signals) -> None:
    model, _, store = single
    run = make_run(tmp_path / "run", config(model, max_steps=100_000, ema=0.5), store)
    process = child(run)
    log = run.folder / "events.jsonl"
    while process.is_alive() and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    saved = checkpoint.latest(run.folder)
    assert saved is not None and events(run)[-1]["step"] == int(saved.name)


def test_old_checkpoints_go_the_newest_stay(single: Made, tmp_path: Path) -> None:
    model, _, store = single
    run = make_run(tmp_path / "run", config(model, max_steps=7, backup_after=1, backup_keep=3), store)
    start(run, finished=False)
    assert checkpoint.steps_saved(run.folder) == [5, 6, 7]


def test_a_full_disk_costs_checkpoints_not_the_run(single: Made, tmp_path: Path) -> None:
    model, _, store = single
    settings = config(model, max_steps=6, backup_after=2, ema=0.5)
    whole, full = (make_run(tmp_path / name, settings, store) for name in ("whole", "full"))
    start(whole, finished=False)
    process = child(full, file_limit=20_000)  # files of adapters are larger, the log is smaller
    process.join()
    assert process.exitcode == 1
    assert [row["step"] for row in events(full) if row["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.steps_saved(full.folder) == [] and not list(full.folder.rglob("*.part"))
    start(full, finished=False)
    assert_same_runs(whole, full, ("single",))
