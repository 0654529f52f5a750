"""The four workflows of the guide: configs resolve at full size as written, and train with model and sizes swapped."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.config import Config
from shared.keys import caption_key
from shared.models import ModelSpec, spec_of_folder
from shared.resolve import Choice, resolve
from tests.train.make import add_text_encoder, events, listed, make_model, make_run, make_store
from train.explain import derived, settings
from train.run import resolve_for_train
from train.session import start

BASE = {"base_model_name": "wan-ai/WAN_2_2"}
CHARACTER_VIDEO = {"max_frames": 8, "frame_sample_strategy": "uniform", "target_fps": 12.0, "max_duration": 8.0,
                   "temporal_consistency_weight": 1.2}  # fmt: skip
STYLE_VIDEO = {"max_frames": 16, "frame_sample_strategy": "uniform", "target_fps": 24.0,
               "temporal_consistency_weight": 1.0, "temporal_augmentation": True}  # fmt: skip
CHARACTER = {"training_method": "LORA", "batch_size": 1, "learning_rate": 3e-4, "epochs": 15, "resolution": "384",
             "frames": 8, "video_config": CHARACTER_VIDEO}  # fmt: skip
STYLE = {"training_method": "LORA", "batch_size": 2, "learning_rate": 2e-4, "epochs": 20, "resolution": "512",
         "frames": 16, "video_config": STYLE_VIDEO}  # fmt: skip
DOMAIN = {"training_method": "FINE_TUNE", "batch_size": 2, "learning_rate": 1e-4, "epochs": 30, "resolution": "512",
          "frames": 16, "transformer": {"train": True, "learning_rate": 1e-4},
          "text_encoder": {"train": True, "learning_rate": 5e-5}}  # fmt: skip
CONCEPT = {"training_method": "EMBEDDING", "batch_size": 4, "learning_rate": 1e-3, "embedding_learning_rate": 5e-3,
           "epochs": 50, "resolution": "512", "frames": 12}  # fmt: skip
WORKFLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "character": ("8gb", BASE | CHARACTER),
    "style": ("16gb", BASE | STYLE),
    "domain": ("24gb-finetune", BASE | DOMAIN),
    "concept": ("embedding", BASE | CONCEPT),
}
FRAMES = {"character": 9, "style": 17, "domain": 17, "concept": 13}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_resolves_at_full_size(name: str, tmp_path: Path) -> None:
    preset, values = WORKFLOWS[name]
    (tmp_path / "my.json").write_text(json.dumps(values))
    resolved = resolve_for_train(Choice(preset=preset, config=tmp_path / "my.json"), tmp_path / "none")
    assert resolved.spec.name == "ti2v-5b"
    lines = derived(resolved)
    assert any(line.startswith(f"clips: {FRAMES[name]} frames") for line in lines)
    told = [line for line in settings(resolved) if line.startswith("learning_rate ")]
    assert told[0].endswith("my.json")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_trains_with_model_and_sizes_swapped(name: str, tmp_path: Path) -> None:
    preset, values = WORKFLOWS[name]
    model = add_text_encoder(make_model(tmp_path / "model", num_attention_heads=4, attention_head_dim=16, ffn_dim=128))
    spec: ModelSpec = spec_of_folder(model)
    small = {"base_model_name": str(model), "resolution": "32x32", "frames": 9, "max_steps": 2}
    (tmp_path / "my.json").write_text(json.dumps(values | small))
    config: Config = resolve(Choice(preset=preset, config=tmp_path / "my.json")).config
    samples = [listed(number, spec, captions=(caption_key("<concept> one"),)) for number in range(4)]
    store = make_store(tmp_path / "s.zarr", spec, samples, ("<concept> one",), config.embedding)
    run = make_run(tmp_path / "run", config, store)
    start(run, finished=False)
    assert [row["loss"] is not None for row in events(run) if row["event"] == "step"] == [True, True]
    assert (run.folder / "done").is_file() and list(run.folder.glob("run*"))
