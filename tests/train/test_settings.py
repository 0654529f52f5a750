"""Settings do what they say: presets train as they are, things recur when due, results go where they are wanted."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import Config
from shared.errors import RunError
from shared.keys import caption_key
from shared.models import ModelSpec
from shared.resolve import PRESETS, preset_names, read_layer
from tests.train.make import config, events, listed, make_model, make_run, make_store, trained
from train import checkpoint
from train.compiled import CompiledBlock
from train.data import Plan
from train.log import NoLog
from train.model import load_model
from train.offload import BlockRunner
from train.optim import make_optimizer
from train.phases import Due, make_phases
from train.session import open_data, start
from train.task import Task

Made = tuple[Path, ModelSpec, Path]
SMALL = {"resolution": "32x32", "frames": 9, "max_steps": 2, "lora_rank": 4, "sample_prompts": [], "prior": {}}


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_trains(preset: str, tmp_path: Path) -> None:
    """Only model and sizes are swapped; storage, arithmetic, method, optimizer and format are the preset's."""
    from shared.models import spec_of_folder

    model = make_model(tmp_path / "model", num_attention_heads=4, attention_head_dim=16, ffn_dim=128)
    spec = spec_of_folder(model)
    samples = [listed(number, spec, captions=(caption_key("a <concept>"),)) for number in range(3)]
    values = read_layer(PRESETS / f"{preset}.json") | SMALL | {"base_model_name": str(model)}
    settings = Config.model_validate(values)
    store = make_store(tmp_path / "s.zarr", spec, samples, ("a <concept>",), settings.embedding)
    run = make_run(tmp_path / "run", settings, store)
    start(run, finished=False)
    losses = [row["loss"] for row in events(run) if row["event"] == "step"]
    assert len(losses) == 2 and all(loss is not None for loss in losses) and list(run.folder.glob("run*"))


def test_things_recur_by_steps_epochs_and_minutes(single: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan([listed(number, single[1]) for number in range(10)], config(single[0]), 4)  # 3 steps per epoch
    assert [step for step in range(1, 13) if Due(5, "STEP", plan).after(step)] == [5, 10]
    assert [step for step in range(1, 13) if Due(2, "EPOCH", plan).after(step)] == [6, 12]
    assert not any(Due(None, "STEP", plan).after(step) for step in range(1, 13))
    due = Due(1, "MINUTE", plan)
    assert not due.after(1)
    due.last -= 61
    assert due.after(2) and not due.after(3)
    assert time.monotonic() - due.last < 5


def test_backups_results_and_previews_count_in_their_own_units(single: Made, tmp_path: Path) -> None:
    """10 samples in batches of 4: an epoch ends after steps 3 and 6."""
    units = {"backup_after_unit": "EPOCH", "save_after_unit": "EPOCH", "sample_after_unit": "MINUTE"}
    settings = config(single[0], max_steps=7, backup_after=1, backup_keep=9, save_after=2, sample_after=60, **units)
    run = make_run(tmp_path / "run", settings, single[2])
    start(run, finished=False)
    assert checkpoint.steps_saved(run.folder) == [3, 6, 7]
    assert [path.name for path in run.folder.glob("*-step*")] == ["run-step000006.safetensors"]
    task = Task(run, *open_data(run.resolved, run.stores, run.work), NoLog())
    assert (task.sample.every, task.sample.unit) == (60, "MINUTE")


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_runs_use_deterministic_kernels(single: Made, tmp_path: Path, wanted: bool) -> None:
    try:
        start(make_run(tmp_path / "run", config(single[0], max_steps=1, deterministic=wanted), single[2]), False)
        assert torch.are_deterministic_algorithms_enabled() is wanted
    finally:
        torch.use_deterministic_algorithms(False)


def test_results_on_the_way_and_where_they_are_wanted(single: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = make_run(
        tmp_path / "run", config(single[0], save_after=2, max_steps=5, output_model_destination=str(out)), single[2]
    )
    start(run, finished=False)
    names = sorted(path.name for path in run.folder.glob("*.safetensors"))
    assert names == ["run-step000002.safetensors", "run-step000004.safetensors", "run.safetensors"]
    assert [path.name for path in out.iterdir()] == ["run.safetensors"]


def test_validation_is_before_after_and_between(mixed: Made, tmp_path: Path) -> None:
    settings = config(mixed[0], max_steps=5, validate_after=2, validation={"timesteps": 3}, resolution="32x32,48x32")
    run = make_run(tmp_path / "run", settings, mixed[2])
    start(run, finished=False)
    rows = [row for row in events(run) if row["event"] == "validation"]
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    assert sum(name.startswith("t0") for name in rows[0]) == 3
    assert {name for name in rows[0] if name.startswith("bucket")} == {"bucket 32x32x9", "bucket 48x32x9"}


def test_losses_that_are_not_finite_are_skipped_and_end_a_run_that_is_lost(single: Made, tmp_path: Path) -> None:
    settings = config(
        single[0], max_steps=40, learning_rate=1e30, warmup_steps=0, backup_after=1, lr_scheduler="CONSTANT"
    )
    run = make_run(tmp_path / "run", settings, single[2])
    with pytest.raises(RunError, match=r"10 updates in a row were not finite.*checkpoints.*lower learning_rate"):
        start(run, finished=False)
    rows = [row for row in events(run) if row["event"] == "step"]
    assert rows[0]["loss"] is not None and [row["loss"] for row in rows[-9:]] == [None] * 9
    assert all(value.isfinite().all() for value in trained(run).values())


def test_an_update_that_the_device_leaves_out_is_one_that_the_host_leaves_out(single: Made, tmp_path: Path) -> None:
    """With an average beside the weights the host decides before the update; without, the device does."""
    samples = [listed(number, single[1], weight=3e38 if number == 2 else 1.0) for number in range(4)]
    store = make_store(tmp_path / "s.zarr", single[1], samples)
    runs = []
    for ema in (None, 0.5):
        settings = config(single[0], ema=ema, batch_size=1, max_steps=9, backup_after=7)
        runs.append(make_run(tmp_path / f"ema{ema}", settings, store))
        start(runs[-1], finished=False)
    device, host = (checkpoint.latest(run.folder) or Path() for run in runs)
    losses = [row["loss"] for row in events(runs[0]) if row["event"] == "step"]
    assert events(runs[0]) == events(runs[1]) and losses.count(None) == checkpoint.read_state(device).skipped == 2
    ours, theirs = (checkpoint.read_optimizer(saved)["state"] for saved in (device, host))
    assert ours[0]["step"] == 7
    for name, state in ours.items():
        assert all(torch.equal(value, theirs[name][kind]) for kind, value in state.items())
    assert all(torch.equal(value, trained(runs[1])[name]) for name, value in trained(runs[0]).items())


def test_gradients_are_clipped_and_rates_are_the_parts_own(single: Made, tmp_path: Path) -> None:
    def weights(name: str, **changes: Any) -> dict[str, torch.Tensor]:
        base = {"max_steps": 2, "warmup_steps": 0, "lr_scheduler": "CONSTANT", "optimizer": {"eps": 1.0}}
        run = make_run(tmp_path / name, config(single[0], **base | changes), single[2])
        start(run, finished=False)
        rates = [row["lr"] for row in events(run)]
        assert rates == [changes.get("transformer", {}).get("learning_rate", 0.002)] * 2
        return trained(run)

    free, clipped = weights("free", max_grad_norm=0.0), weights("clipped", max_grad_norm=1e-3)
    own = weights("own", max_grad_norm=0.0, transformer={"learning_rate": 1e-5, "weight_dtype": "FLOAT_32"})
    name = next(name for name in free if "lora_B" in name)
    assert free[name].abs().sum() > 10 * clipped[name].abs().sum() > 0
    assert free[name].abs().sum() > 10 * own[name].abs().sum() > 0


@pytest.mark.parametrize("wanted", [True, False])
def test_blocks_are_compiled_when_asked_for(single: Made, wanted: bool) -> None:
    """That this changes no number is in test_compiled.py."""
    runner = load_model(single[1], "single", config(single[0], compile=wanted), torch.device("cpu")).options.run_block
    assert isinstance(runner, BlockRunner) and isinstance(runner.forward, CompiledBlock) is wanted


@pytest.mark.parametrize("change", [{"beta1": 0.5}, {"beta2": 0.5}, {"weight_decay": 0.5}])
def test_an_optimizers_numbers_change_its_update(change: dict[str, float]) -> None:
    """Against AdamW written out (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2)."""
    settings = Config(learning_rate=0.1, optimizer={"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0} | change)  # type: ignore[arg-type]
    part = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer, ours = make_optimizer(settings, {"part": part}), settings.optimizer
    weight, first, second = 1.0, 0.0, 0.0
    for step, gradient in enumerate((1.0, -0.3, 0.7), 1):
        part.grad = torch.full_like(part, gradient)
        optimizer.step()
        first = ours.beta1 * first + (1 - ours.beta1) * gradient
        second = ours.beta2 * second + (1 - ours.beta2) * gradient**2
        update = first / (1 - ours.beta1**step) / ((second / (1 - ours.beta2**step)) ** 0.5 + ours.eps)
        weight -= 0.1 * (update + ours.weight_decay * weight)
        assert float(part.detach()) == pytest.approx(weight, rel=1e-9)


def test_the_training_shift_is_the_models_unless_set(single: Made) -> None:
    for changes, shift in (({}, 5.0), ({"timestep_shift": 2.0}, 2.0)):
        assert make_phases(config(single[0], **changes), single[1], 10)[0].law.shift == shift


def test_the_average_follows_its_recursion_and_has_a_file_of_its_own(single: Made, tmp_path: Path) -> None:
    kept = []
    for steps in (1, 2):
        settings = config(single[0], max_steps=steps, ema=0.75, lr_scheduler="CONSTANT")
        run = make_run(tmp_path / f"run{steps}", settings, single[2])
        start(run, finished=False)
        kept.append((trained(run), trained(run, kind="average")))
        assert (run.folder / f"run{steps}_ema.safetensors").is_file()
    (_, average), (weights, moved) = kept
    for name, value in moved.items():
        torch.testing.assert_close(value, 0.75 * average[name] + 0.25 * weights[name])
