"""Laws of the verdict: device and RAM are judged before loading, what is proposed is legal and fits, processes share.

No GPU is needed: a plan is arithmetic over a dry run.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import Config
from shared.errors import RunError
from shared.models import SPECS, WAN21_VAE, ModelSpec
from shared.resolve import Choice, resolve
from tests.train.make import config as small_config
from tests.train.make import make_run
from train.contradictions import refuse_contradictions
from train.fit import measured_peaks, out_of_memory, refuse_if_too_large, ways_to_fit, with_setting
from train.memory import (
    GATHERED,
    GIB,
    MemoryPlan,
    Placement,
    Room,
    add_up,
    available_ram,
    block_cost_of,
    largest_bucket,
    placements,
    plan_memory,
    weight_cost_of,
)
from train.plan import report
from train.session import start

Made = tuple[Path, ModelSpec, Path]
SMALL = ModelSpec("small", "small", WAN21_VAE, fps=16, heads=4, head_dim=32, ffn_dim=320, num_layers=4, in_channels=16,
                  text_dim=64)  # fmt: skip
TUNED = {"training_method": "FINE_TUNE", "output_model_format": "SAFETENSORS", "ema": 0.9}


def config(**values: Any) -> Config:
    asked = {"lora_rank": 4, "resolution": "128x96", "frames": 9, "batch_size": 4, "layer_offload_fraction": "AUTO",
             "gradient_checkpointing": "CPU_OFFLOADED", "transformer": {"weight_dtype": "BFLOAT_16"}}  # fmt: skip
    return Config.model_validate(asked | values)


def planned(cfg: Config, room: Room) -> MemoryPlan:
    return plan_memory(cfg, SMALL, largest_bucket(cfg, SMALL), room)


def changed(cfg: Config, way: str) -> Config:
    for part in way.split():
        key, value = part.split("=")
        cfg = with_setting(cfg, key, float(value) if value.replace(".", "").isdigit() and "." in value else value)
    return cfg


def test_a_run_that_needs_more_ram_than_there_is_loads_nothing(
    single: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("train.memory.available_ram", lambda: GIB)
    run = make_run(tmp_path / "run", small_config(single[0], batch_size=10**5), single[2])
    with pytest.raises(
        RunError, match=r"needs \d+\.\d GiB of RAM, this process can have \d\.\d GiB; it fits with SET="
    ):
        start(run, finished=False, loader=load)
    assert not run.folder.exists()


@pytest.mark.parametrize("gpu", [True, False])
def test_short_of_ram_changes_are_named_that_fit(gpu: bool) -> None:
    cfg = config(gradient_checkpointing="NONE")
    room = Room(64 * GIB if gpu else None, planned(cfg, Room(None, gpu=gpu)).ram - (1 << 18), gpu)
    plan = planned(cfg, room)
    with pytest.raises(RunError, match=r"needs \d\.\d GiB of RAM, this process can have \d\.\d GiB; it fits with SET="):
        refuse_if_too_large(plan, cfg, SMALL)
    ways = ways_to_fit(cfg, SMALL, room)
    assert ways
    assert all(planned(changed(cfg, way), room).fits for way in ways)


def test_short_of_ram_beside_a_gpu_the_placement_is_the_fastest_that_fits_the_device() -> None:
    cfg = config()
    room = Room(planned(cfg, Room(64 * GIB)).need - (1 << 20))
    enough, short = planned(cfg, room), planned(cfg, Room(room.device, 1 << 20))
    assert enough.fits and not short.fits
    assert short.placement == enough.placement != Placement(0, 0)


def test_changes_that_training_would_refuse_are_not_proposed() -> None:
    cfg = config(**TUNED, optimizer={"name": "PRODIGY"})
    bucket = largest_bucket(cfg, SMALL)
    costs = weight_cost_of(SMALL, cfg), block_cost_of(SMALL, cfg, bucket)
    least = min(add_up(cfg, SMALL, costs, (bucket, place), Room(None)).need for place in placements(cfg, 4))
    for room in (Room(least - (1 << 18)), Room(least - (1 << 20))):
        assert not planned(cfg, room).fits and ways_to_fit(cfg, SMALL, room)
        for way in ways_to_fit(cfg, SMALL, room):
            refuse_contradictions(changed(cfg, way), SMALL)
            assert planned(changed(cfg, way), room).fits


@pytest.mark.parametrize("parts", [2, 4])
def test_block_weights_and_their_states_are_divided_among_processes(
    monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    cfg = config(**TUNED, gradient_checkpointing="NONE", max_grad_norm=0.0)
    cost, lora = weight_cost_of(SMALL, cfg), planned(config(), Room(None))
    alone = planned(with_setting(cfg, "clip", "BLOCK"), Room(None))
    monkeypatch.setenv("WORLD_SIZE", str(parts))
    each = planned(cfg, Room(None))
    matrices = cost.blocks * cost.block_matrices
    saved = matrices - matrices // parts
    assert each.device["weights"] == alone.device["weights"] - saved + GATHERED * cost.block_matrices
    for name, times in (("optimizer", 2), ("averages", 2)):  # two moments; float32 beside bfloat16
        assert each.device[name] == alone.device[name] - times * saved
    assert alone.device["gradients"] < each.device["gradients"]  # of all blocks, not of one
    assert planned(config(), Room(None)) == lora  # adapters are held whole by all


def test_processes_on_one_computer_share_its_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.memory import room_of

    alone = room_of(torch.device("cpu")).ram
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    each = room_of(torch.device("cpu")).ram
    assert alone is not None and each is not None
    assert each * 4 == pytest.approx(alone, rel=0.2)


def test_plan_says_what_several_processes_need_and_what_they_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines = report(resolve(Choice("24gb-finetune", None, "tiny")), 24.0, None, None)
    assert "each of 2 processes" in lines[0]
    assert any("make train refuses this: clip=BLOCK" in line for line in lines)
    asked = Choice("24gb-finetune", None, "tiny", "clip=GLOBAL optimizer.name=ADAMW")
    lines = report(resolve(asked), 24.0, None, None)
    assert lines[-1].startswith("verdict: fits") and not any("refuses" in line for line in lines)


def test_without_a_gpu_everything_is_ram() -> None:
    cfg = config(layer_offload_fraction=0.0)
    on_cpu, on_gpu = planned(cfg, Room(None, gpu=False)), planned(cfg, Room(None))
    assert on_cpu.device == {} and on_cpu.pinned == 0 and on_cpu.need == 0
    parked = on_gpu.host["inputs of blocks"]
    assert parked > 0 and "inputs of blocks" not in {name for name, size in on_cpu.host.items() if size}
    kept = planned(with_setting(cfg, "gradient_checkpointing", "DEFAULT"), Room(None, gpu=False))
    assert on_cpu.ram == kept.ram  # what is in RAM already cannot be moved there
    assert on_cpu.host["activations"] == pytest.approx(on_gpu.device["activations"] + parked / 2, rel=0.01)


def test_plans_verdict_is_about_the_computer_that_will_train() -> None:
    if torch.cuda.is_available():
        return
    here = report(resolve(Choice("demo")), None, None, None)
    assert here[-1].startswith("verdict: fits this computer, on its CPU") and not any("device" in line for line in here)
    huge = report(resolve(Choice("demo", None, None, "batch_size=1000000")), None, None, None)
    assert "verdict: does not fit this computer, on its CPU: it needs" in huge[-1] and "of RAM" in huge[-1]
    card = report(resolve(Choice("16gb", None, "tiny", "layer_offload_fraction=0.5")), None, None, None)
    assert card[-1].startswith("verdict: fits the 16 GiB card") and "GiB of RAM are needed beside it" in card[-1]
    assert any(line.startswith("  next smaller:") for line in card)


def test_a_containers_limit_is_the_ram_there_is(tmp_path: Path) -> None:
    free = available_ram(tmp_path / "none")
    texts = {"memory.max": "max\n", "memory.current": "700\n", "memory.stat": "anon 5\ninactive_file 200\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert available_ram(tmp_path) == pytest.approx(free, rel=0.3)
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_ram(tmp_path) == 500


def test_running_out_of_memory_names_the_numbers_the_change_and_the_checkpoint() -> None:
    cfg = config(layer_offload_fraction=0.0)
    plan = planned(cfg, Room(16 * GIB))
    error = str(out_of_memory(plan, cfg, SMALL, Path("runs/a/checkpoints/20")))
    assert f"{plan.need / GIB:.1f} GiB predicted; go on from runs/a/checkpoints/20, with SET=" in error
    assert "start again, with SET=" in str(out_of_memory(plan, cfg, SMALL, None))


def test_what_a_run_took_is_written_beside_what_was_predicted() -> None:
    plan = planned(config(), Room(8 * GIB, 16 * GIB))
    told = measured_peaks(plan, torch.device("cpu"))
    assert told["unit"] == "GiB" and told["could have"] == {"device": 8.0, "RAM": 16.0}
    assert told["RAM of the process"]["predicted"] == pytest.approx(plan.ram / GIB, abs=1e-3)
    assert told["RAM of the process"]["measured"] > 0.1
    assert sum(told["predicted in RAM"].values()) == pytest.approx(plan.ram / GIB, abs=0.01)


@pytest.mark.parametrize("model", ["ti2v-5b", "t2v-a14b"])
def test_pinned_memory_is_what_is_streamed_and_parked(model: str) -> None:
    resolved = resolve(Choice("8gb", None, model))
    plan = plan_memory(resolved.config, SPECS[model], largest_bucket(resolved.config, SPECS[model]), Room(8 * GIB))
    assert (plan.pinned > 0) == (plan.placement != Placement(0, 0))
    assert plan.pinned == plan.host["streamed blocks"] + plan.host["inputs of blocks"]
