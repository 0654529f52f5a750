"""What train cannot use is refused by the command: one line that names it and what mends it, exit code 2, no run begun.

A disk that is full at a checkpoint is in test_start.py; a model that is too large for the machine in test_fit.py.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shared.models import ModelSpec
from shared.resolve import to_json
from shared.store import read_datasets, write_dataset
from tests.train.make import config, listed, make_model, make_store
from train.__main__ import main

Made = tuple[Path, ModelSpec, Path]


def refused(folder: Path, store: Path, values: dict[str, Any]) -> str:
    """The line with which `train` ends."""
    (folder / "c.json").write_text(json.dumps(values))
    places = ["--work", folder, "--store", store, "--config", folder / "c.json", "--run", folder / "run"]
    done = CliRunner().invoke(main, [str(part) for part in places])
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.exit_code == 2 and len(errors) == 1 and isinstance(done.exception, SystemExit), done.output
    return errors[0]


def empty_store(made: Made, folder: Path) -> Path:
    store = make_store(folder / "empty.zarr", made[1], [listed(0, made[1])])
    (dataset,) = read_datasets(store)
    write_dataset(store, dataset.model_copy(update={"samples": ()}))
    return store


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a larger bucket": ({"resolution": "16x16"}, r"buckets .32x32x9. .*resolution=16x16 .*make ingest"),
    "an unknown key": ({"learing_rate": 1.0}, "learing_rate.*learning_rate"),
    "an unknown nested key": ({"video_config": {"max_frame": 9}}, "video_config.max_frame.*max_frames"),
    "contradicting keys": ({"training_method": "FINE_TUNE", "output_model_format": "COMFY_LORA"},
                           "COMFY_LORA: FINE_TUNE gives whole weights; use SAFETENSORS or DIFFUSERS"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_refused(single: Made, tmp_path: Path, case: str) -> None:
    model, _, store = single
    changes, message = SETTINGS[case]
    line = refused(tmp_path, store, to_json(config(model)) | changes)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_model_names_what_both_are(single: Made, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", text_dim=24)
    line = refused(tmp_path, single[2], to_json(config(other)))
    assert "width 24" in line and "holds 16" in line and "make encode" in line
    assert not (tmp_path / "run").exists()


def test_a_store_that_lists_nothing_names_encode(single: Made, tmp_path: Path) -> None:
    line = refused(tmp_path, empty_store(single, tmp_path), to_json(config(single[0])))
    assert "lists no samples" in line and line.endswith("make encode")
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_cannot_be_encoded_is_named_with_the_command_that_can(single: Made, tmp_path: Path) -> None:
    """The made model has no text encoder. (That one is used when it is at hand: tests/e2e/test_readme.py.)"""
    line = refused(tmp_path, single[2], to_json(config(single[0], sample_prompts=["never embedded"])))
    assert "'never embedded' has no stored embedding" in line and "make encode" in line
