"""What `explain` says is what a run does: sources of values, sizes, batches, steps, experts."""

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shared.config import leaf_keys
from shared.models import ModelSpec
from shared.resolve import Choice, resolve, save_config
from tests.train.make import config, events, make_run
from train.__main__ import main
from train.data import load_step
from train.explain import idle, plan_lines
from train.flow import SigmaLaw
from train.session import open_data, start

Made = tuple[Path, ModelSpec, Path]


def test_every_setting_is_told_with_its_source_after_ingest_too(single: Made, tmp_path: Path) -> None:
    save_config(tmp_path / "config.json", resolve(Choice(preset="demo", model=str(single[0]), set="frames=12")))
    told = CliRunner().invoke(main, ["explain", "--work", str(tmp_path), "--set", "seed=7"], catch_exceptions=False)
    lines = {line.split()[0]: line for line in told.output.splitlines() if line}
    by_way = f", by way of {tmp_path / 'config.json'}"
    assert set(leaf_keys()) <= set(lines)
    assert lines["seed"].endswith(" SET") and lines["frames"].endswith(f" SET{by_way}")
    assert lines["lora_rank"].endswith(f" preset demo{by_way}") and lines["base_model_name"].endswith(f" MODEL{by_way}")
    assert "clips: 13 frames" in told.output  # brought to 4n+1


@pytest.mark.parametrize("batch_size", [4, 3])
def test_batches_and_steps_are_those_of_the_run(mixed: Made, tmp_path: Path, batch_size: int) -> None:
    changes: dict[str, Any] = {"batch_size": batch_size, "max_steps": None, "epochs": 2, "resolution": "32x32,48x32",
                               "video_config": {"video_batch_size_multiplier": 0.5}}  # fmt: skip
    run = make_run(tmp_path / "run", config(mixed[0], **changes), mixed[2])
    data, plan = open_data(run.resolved, run.stores, run.work)
    text = "\n".join(plan_lines(run.resolved, data, plan))
    start(run, finished=False)
    steps = sum(row["event"] == "step" for row in events(run))
    assert f"steps: {steps}, {steps // 2} per epoch" in text
    for step in range(steps // 2):
        parts = load_step(data.reader, run.config, SigmaLaw("UNIFORM", 1.0), step, plan.batch(step))
        (line,) = re.findall(rf"^size {parts[0].bucket}: .*$", text, re.M)
        batch = int(re.findall(r"batches of (\d+)", line)[0])
        last = int((re.findall(r"the last of (\d+)", line) or [batch])[0])
        at_once = int((re.findall(r"computed (\d+) at a time", line) or [batch])[0])
        drawn = sum(len(part.captions) for part in parts)
        assert drawn in (batch, last)
        assert max(len(part.captions) for part in parts) == min(at_once, drawn)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"text_encoder": {"learning_rate": 1e-5}}, ["text_encoder.learning_rate"]),
        ({"embedding_learning_rate": 1e-3}, ["embedding_learning_rate"]),
        ({"training_method": "EMBEDDING", "transformer": {"learning_rate": 1e-5}}, ["transformer.learning_rate"]),
        ({"sample_after": 5, "validate_after": 5}, ["sample_after", "validate_after"]),
        ({"sample_after": 5, "sample_prompts": ["a prompt"]}, []),
    ],
)
def test_a_setting_that_does_nothing_is_said_to_be_idle(
    single: Made, tmp_path: Path, changes: dict[str, Any], named: list[str]
) -> None:
    settings = config(single[0], **changes)
    run = make_run(tmp_path / "run", settings.model_copy(update={"training_method": "LORA"}), single[2])
    data, plan = open_data(run.resolved, run.stores, run.work)
    lines = idle(settings) + plan_lines(run.resolved, data, plan)
    assert [line.split()[0] for line in lines if " is idle: " in line] == named
