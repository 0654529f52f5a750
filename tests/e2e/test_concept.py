"""A LoRA of a concept the tiny model has never seen, by the commands a user runs: the loss of held-out clips falls
and samples wear its colour.

Seeds 0, 1 and 2 brought it from 1.94 to 0.70, 0.71 and 0.71 in 60 updates: 64 % is gone; half of that is asked for.
Seeds 1 and 2 showed the pink in 4 samples of 4, and in none before; 2 are asked for. `make demo` trains longer and asks
for all of the concept, in all samples.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.demo.__main__ import CONCEPT_PROMPTS
from tests.demo.check import PINK
from tests.demo.dataset import read_mp4, write_clip, write_dataset
from tests.e2e.commands import run as command
from tests.tiny import draw
from tests.tiny.score import concept_share

CONFIG = {"batch_size": 8, "max_steps": 60, "warmup_steps": 5, "sample_prompts": CONCEPT_PROMPTS, "sample_steps": 12,
          "validation": {"folder": "held"}}  # fmt: skip


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


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (1, 2))])
def test_a_lora_learns_an_unseen_concept(work: Path, seed: int) -> None:
    run = work / f"run{seed}"
    command("train", *settings(work), "--run", run, "--set", f"seed={seed}")
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    before, after = (row["loss"] for row in rows if row["event"] == "validation")
    assert after < 0.68 * before
    shares = {name: [concept_share(read_mp4(run / "samples" / name / f"{name}_{number}.mp4"))[0] for number in range(4)]
              for name in ("before", "after")}  # fmt: skip
    shown = {name: sum(share >= PINK for share in found) for name, found in shares.items()}
    assert shown["before"] == 0 and shown["after"] >= 2, shares
