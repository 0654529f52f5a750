"""A LoRA of a concept the tiny model has never seen, by the commands a user runs: the loss of held-out clips falls.

Seeds 0, 1 and 2 brought it from 1.94 to 0.70, 0.71 and 0.71 in 60 updates: 64 % is gone; half of that is asked for.
What samples show is checked by `make demo`, which trains longer and fails when they do not show the concept.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.demo.dataset import write_clip, write_dataset
from tests.e2e.commands import run as command
from tests.tiny import draw

CONFIG = {"batch_size": 8, "max_steps": 60, "warmup_steps": 5, "sample_prompts": [], "validation": {"folder": "held"}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of the concept beside eight ordinary ones, and four that are held out, ingested and encoded."""
    folder, rng = tmp_path_factory.mktemp("concept"), np.random.default_rng(11)
    write_dataset(folder / "data", 8, 8)
    for number, (way, behind) in enumerate(zip(draw.DIRECTIONS, list(draw.BACKGROUNDS)[:2] * 2, strict=True)):
        clip, text = draw.draw_concept(way, behind, rng), draw.concept_caption(way, behind)
        write_clip(folder / "data" / "held" / f"{number}.mp4", clip, text)
    (folder / "my.json").write_text(json.dumps(CONFIG))
    command("ingest", "--data", folder / "data", *settings(folder))
    command("encode", *settings(folder))
    return folder


def settings(work: Path) -> tuple[object, ...]:
    return "--work", work, "--preset", "demo", "--config", work / "my.json"


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_a_lora_learns_an_unseen_concept(work: Path, seed: int) -> None:
    run = work / f"run{seed}"
    command("train", *settings(work), "--run", run, "--set", f"seed={seed}")
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    before, after = (row["loss"] for row in rows if row["event"] == "validation")
    assert after < 0.68 * before
