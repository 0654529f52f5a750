"""The four workflows of the guide, as README.md prints them: they resolve at full size, and train with model and sizes
swapped. (tests/e2e/test_readme.py takes each from videos to a result by the commands printed there.)
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shared.config import Config
from shared.keys import caption_key
from shared.models import ModelSpec, spec_of_folder
from shared.resolve import Choice, resolve
from tests.train.guide import FRAGMENTS
from tests.train.make import add_text_encoder, events, listed, make_model, make_run, make_store
from train.__main__ import main
from train.session import start

WORKFLOWS = {section: (preset, values) for section, preset, values in FRAGMENTS if section.startswith("Workflow")}
FRAMES = {"8gb": 9, "16gb": 17, "24gb-finetune": 17, "embedding": 13}  # 8, 16, 16 and 12, brought to 4n+1
NAMES = pytest.mark.parametrize("name", WORKFLOWS, ids=lambda name: name.partition(":")[0].replace(" ", "-"))


def config_file(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "my.json").write_text(json.dumps(values))
    return folder / "my.json"


@NAMES
def test_explain_accepts_a_workflow_at_full_size(name: str, tmp_path: Path) -> None:
    preset, values = WORKFLOWS[name]
    choice = ["--work", str(tmp_path), "--preset", preset, "--config", str(config_file(tmp_path, values))]
    told = CliRunner().invoke(main, ["explain", *choice], catch_exceptions=False)
    assert told.exit_code == 0
    assert re.search(rf"^model: ti2v-5b .*, {values['training_method']},", told.output, re.M)
    assert re.search(rf"^clips: {FRAMES[preset]} frames", told.output, re.M)
    assert re.search(rf"^epochs +{values['epochs']} +CONFIG .*my.json$", told.output, re.M)
    assert "known after make encode" in told.output  # there is no store yet


@NAMES
def test_a_workflow_trains_with_model_and_sizes_swapped(name: str, tmp_path: Path) -> None:
    preset, values = WORKFLOWS[name]
    model = add_text_encoder(make_model(tmp_path / "model", num_attention_heads=4, attention_head_dim=16, ffn_dim=128))
    spec: ModelSpec = spec_of_folder(model)
    small = {"base_model_name": str(model), "resolution": "32x32", "frames": 9, "max_steps": 2}
    config: Config = resolve(Choice(preset=preset, config=config_file(tmp_path, values | small))).config
    samples = [listed(number, spec, captions=(caption_key("<concept> one"),)) for number in range(4)]
    store = make_store(tmp_path / "s.zarr", spec, samples, ("<concept> one",), config.embedding)
    run = make_run(tmp_path / "run", config, store)
    start(run, finished=False)
    assert [row["loss"] is not None for row in events(run) if row["event"] == "step"] == [True, True]
    assert (run.folder / "done").is_file() and list(run.folder.glob("run*"))
