"""Several processes with a share of the batch each do what one process does with the whole."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from shared.config import EmbeddingConfig
from shared.errors import ConfigError, RunError
from shared.files import read_json, write_json
from shared.keys import caption_key
from shared.models import ModelSpec, spec_of_folder
from shared.resolve import to_json
from tests.train.double import plan_run, planned, train_double
from tests.train.make import add_text_encoder, config, events, listed, make_model, make_run, make_store, trained
from train import checkpoint
from train.group import Group, refuse_odd_launch, refuse_undivided
from train.session import start

Made = tuple[Path, ModelSpec, Path]
ROOT = Path(__file__).parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}  # an abort says where it was
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
CONCEPT = {"placeholder": "<zorb>", "initial_text": "a thing", "token_count": 3}
EMBEDDING = {"training_method": "EMBEDDING", "output_model_format": "SAFETENSORS", "embedding": CONCEPT}
FINE_TUNE = {"training_method": "FINE_TUNE", "output_model_format": "SAFETENSORS", "output_dtype": "FLOAT_32"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.3},
    "lokr": {"peft_type": "LOKR", "lora_dropout": 0.3},  # of whole layers
    "embedding": EMBEDDING,
    "input": EMBEDDING | {"embedding": CONCEPT | {"kind": "INPUT"}},
    "fine-tune": FINE_TUNE,
    # one caption per slot: what UMT5 does in float32 then sees the same numbers, however slots are divided
    "text encoder": FINE_TUNE
    | {"text_encoder": {"train": True, "weight_dtype": "FLOAT_32"}, "caption_dropout_probability": 0.0},
}
DIVIDED = ("fine-tune", "text encoder")
# three buckets, of which two do not fill a batch: one process has fewer samples than the other, or none
SIZES = [(9, 32, 32)] * 5 + [(9, 32, 48)] * 3 + [(1, 32, 32)]
LAW: dict[str, Any] = {
    "max_steps": 6, "backup_after": 4, "backup_keep": 9, "ema": 0.9, "learning_rate": 1e-2, "lr_scheduler": "CONSTANT",
    "resolution": "32x32,48x32", "video_config": {"video_batch_size_multiplier": 0.5, "frame_dropout_probability": 0.3},
}  # fmt: skip
Pairs = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Folders of runs in float64 by method: of one process with batches of 4, and of two with 2 each."""
    root = tmp_path_factory.mktemp("both")
    model = add_text_encoder(make_model(root / "model"))
    spec = spec_of_folder(model)
    texts = tuple(f"<zorb> moving {'very ' * (number % 3)}far, {number}" for number in range(len(SIZES)))
    samples = [listed(n, spec, size, captions=(caption_key(texts[n]),), split="validation" if n == 4 else "train")
               for n, size in enumerate(SIZES)]  # fmt: skip
    store = make_store(root / "s.zarr", spec, samples, texts, EmbeddingConfig(**CONCEPT))
    pairs = {}
    for method, changes in METHODS.items():
        one = plan_run(root / method / "one", config(model, batch_size=4, **LAW | changes), store)
        two = plan_run(root / method / "two", config(model, batch_size=2, **LAW | changes), store)
        train_double(one)
        pairs[method] = one.folder, two.folder
    names = [str(two) for _, two in pairs.values()]
    command = [*TORCHRUN, "tests.train.double", *names, *(f"{two}@4" for two in names)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return pairs


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_weights_of_one(both: Pairs, method: str) -> None:
    one, two = map(planned, both[method])
    for kind in ("weights", "average"):
        ours, theirs = trained(one, kind=kind), trained(two, kind=kind)
        assert ours.keys() == theirs.keys() and {value.dtype for value in ours.values()} == {torch.float64}
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-10, atol=1e-10)
    rows = list(zip(events(one), events(two), strict=True))
    assert sum(row["event"] == "validation" for row, _ in rows) == 2
    for row, other in rows:
        for name in row.keys() & {"loss", "grad_norm"}:
            assert other[name] == pytest.approx(row[name], rel=1e-10)


def test_divided_weights_are_exported_whole(both: Pairs) -> None:
    one, two = both["fine-tune"]
    for name in ("", "_ema"):
        ours, theirs = (load_file(folder / f"{folder.name}{name}.safetensors") for folder in (one, two))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_resume_bit_equal(both: Pairs, method: str) -> None:
    """From what a run killed after its first checkpoint leaves behind."""
    ours, theirs = (planned(both[method][1].with_name(name)) for name in ("two", "two@4"))
    assert (theirs.folder / "done").is_file()
    for kind in ("weights", "average"):
        values = trained(theirs, kind=kind)
        assert all(torch.equal(value, values[name]) for name, value in trained(ours, kind=kind).items())
    assert events(ours) == events(theirs)
    for rank in (0, 1) if method in DIVIDED else (0,):  # divided weights: each process keeps its own part
        states = [checkpoint.read_optimizer(run.folder / "checkpoints" / "6", rank)["state"] for run in (ours, theirs)]
        assert all(torch.equal(part[name], states[1][number][name])
                   for number, part in states[0].items() for name in part)  # fmt: skip


@pytest.mark.parametrize("method", ["fine-tune", pytest.param("lora", marks=pytest.mark.soak)])
def test_two_processes_survive_a_kill(single: Made, tmp_path: Path, method: str) -> None:
    model, _, store = single
    shared = METHODS[method] | {"max_steps": 30, "ema": 0.9, "backup_after": 3, "optimizer": {"eps": 1e-3}}
    one = make_run(tmp_path / "one", config(model, batch_size=4, **shared), store)
    start(one, finished=False)
    write_json(tmp_path / "c.json", to_json(config(model, batch_size=2, **shared)))
    two = make_run(tmp_path / "two", config(model, batch_size=2, **shared), store)
    command = [*TORCHRUN, "train", "--work", str(tmp_path), "--store", str(store), "--config", str(tmp_path / "c.json"),
               "--run", str(two.folder)]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        launcher = psutil.Popen(command, cwd=ROOT, env=ONE_THREAD, stdout=log, stderr=log)
        while launcher.poll() is None and checkpoint.latest(two.folder) is None:
            time.sleep(0.01)
        assert launcher.poll() is None, (tmp_path / "log").read_text()[-3000:]
        for process in [*launcher.children(recursive=True), launcher]:
            with suppress(psutil.NoSuchProcess):  # the launcher ends the others when it sees one die
                process.kill()
        launcher.wait()
        assert not (two.folder / "done").exists()
        again = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, stdout=log, stderr=log, check=False, timeout=240)
    said = (tmp_path / "log").read_text()
    assert again.returncode == 0 and "processes: 2" in said and "resuming" in said, said[-9000:]
    for kind in ("weights", "average"):
        ours, theirs = trained(one, kind=kind), trained(two, kind=kind)
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-3 if method == "fine-tune" else 1e-4, atol=1e-5)
    for row, other in zip(events(one), events(two), strict=True):
        assert json.dumps(row)[:40] == json.dumps(other)[:40]
        if row["event"] == "step":
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)


def test_another_number_of_processes_is_refused(single: Made, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(single[0], max_steps=2), single[2])
    start(run, finished=False)
    state = (checkpoint.latest(run.folder) or Path()) / "state.json"
    write_json(state, read_json(state) | {"processes": 3})
    with pytest.raises(RunError, match=r"trained by 3 processes, this is 1.*torchrun.*RUN=new_folder"):
        start(run, finished=False)


def test_launches_that_do_not_do_what_was_asked_are_refused_by_name() -> None:
    refuse_odd_launch({"MASTER_ADDR": "here", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    refuse_odd_launch({"ACCELERATE_USE_CPU": "True"})
    with pytest.raises(RunError, match=r"FSDP.*torchrun"):
        refuse_odd_launch({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "here"})
    with pytest.raises(RunError, match=r"asked for several processes and started one.*torchrun"):
        refuse_odd_launch({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "True"})


@pytest.mark.soak
def test_accelerate_launch_on_cpu_is_refused(single: Made, tmp_path: Path) -> None:
    accelerate = Path(sys.executable).with_name("accelerate")
    command = [accelerate, "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "-m", "train", "--work", tmp_path, "--store", single[2], "--model", single[0],
               "--preset", "demo", "--set", "resolution=32x32"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode != 0 and "asked for several processes and started one" in done.stderr, done.stderr


def test_optimizers_that_need_whole_matrices_are_refused_by_several_processes(single: Made) -> None:
    settings = config(single[0], **METHODS["fine-tune"], optimizer={"name": "ADAFACTOR"})
    refuse_undivided(settings, Group())
    with pytest.raises(ConfigError, match=r"ADAFACTOR.*whole matrices.*use ADAMW"):
        refuse_undivided(settings, Group(0, 2))
    refuse_undivided(config(single[0], optimizer={"name": "ADAFACTOR"}), Group(0, 2))
