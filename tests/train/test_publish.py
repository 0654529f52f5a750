"""Publishing: the folder says what was trained and how, and reaches a stand-in of the Hub as it is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from shared.errors import RunError
from shared.models import ModelSpec
from shared.resolve import Resolved
from tests.shared.hub import REPO, hub_address
from tests.train.hub import ModelHub
from tests.train.make import config, make_run
from train.__main__ import main
from train.curve import chart, nice_ticks
from train.publish import model_card, publish, validation_losses, write_folder
from train.run import Run, start_folder

Made = tuple[Path, ModelSpec, Path]


@pytest.fixture
def run(single: Made, tmp_path: Path) -> Run:
    """A finished run with two decoded previews and three validations."""
    settings = config(single[0], caption_prefix="zorb, ", lora_alpha=6.0, sample_prompts=["a zorb", "a <b>"])
    made = make_run(tmp_path / "cats", settings, single[2])
    start_folder(made, "data")
    save_file({"x": torch.zeros(2)}, made.folder / "cats.safetensors")
    for name in ("before", "after", "step000100"):
        latents = made.folder / "samples" / f"{name}.safetensors"
        latents.parent.mkdir(exist_ok=True)
        save_file({"0": torch.zeros(1), "1": torch.zeros(1)}, latents, {"labels": '["a zorb", "a \\"b\\": c"]'})
        latents.with_suffix("").mkdir()
        for number in range(2):
            (latents.with_suffix("") / f"{name}_{number}.mp4").write_bytes(f"{name}{number}".encode())
    rows = [{"event": "validation", "step": step, "expert": "single", "loss": loss}
            for step, loss in ((0, 1.5), (50, 1.25), (100, 1.125))]  # fmt: skip
    rows.append({"event": "step", "step": 100, "loss": 1.0, "lr": 1e-4})
    (made.folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_the_folder_holds_all_that_a_stranger_needs(run: Run) -> None:
    folder = write_folder(run, "user/zorb-lora")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"README.md", "cats.safetensors", "config.json", "validation.png", "cats-comfyui.json",
                     "samples/after_0.mp4", "samples/after_1.mp4"}  # fmt: skip
    assert (folder / "cats.safetensors").read_bytes() == (run.folder / "cats.safetensors").read_bytes()
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    facts = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in front.splitlines())}
    assert facts["instance_prompt"] == "zorb" and facts["pipeline_tag"] == "text-to-video"
    assert facts["widget"] == [{"text": "a zorb", "output": {"url": "samples/after_0.mp4"}},
                               {"text": 'a "b": c', "output": {"url": "samples/after_1.mp4"}}]  # fmt: skip
    for told in ("# zorb-lora", "`zorb`", "| rank | 4 |", "| alpha | 6.0 |", "| steps | 100 |", "1.5000 -> 1.1250",
                 'load_lora_weights("user/zorb-lora", weight_name="cats.safetensors")'):  # fmt: skip
        assert told in body


def test_the_card_of_a_table_model_names_it_and_both_experts(run: Run) -> None:
    pair = replace(run, resolved=Resolved(run.config.model_copy(update={"base_model_name": "i2v-a14b"}), {}))
    card = model_card(pair, "me/x", ["x_high_noise.safetensors", "x_low_noise.safetensors"], [], {}, [])
    assert 'base_model: ["Wan-AI/Wan2.2-I2V-A14B-Diffusers"]' in card and "image-to-video" in card
    assert 'weight_name="x_low_noise.safetensors", load_into_transformer_2=True)' in card
    assert "Gallery" not in card and "Validation" not in card
    whole = {"base_model_name": "ti2v-5b", "training_method": "FINE_TUNE", "output_model_format": "DIFFUSERS"}
    tuned = replace(run, resolved=Resolved(run.config.model_copy(update=whole), {}))
    card = model_card(tuned, "me/x", ["x"], [], {}, [])
    assert 'from_pretrained("me/x", subfolder="x/transformer"' in card and "load_lora_weights" not in card
    assert 'base_model_relation: "finetune"' in card


def test_the_curve_shows_the_measured_points(run: Run) -> None:
    losses = validation_losses(run)
    assert losses == {"single": [(0, 1.5), (50, 1.25), (100, 1.125)]}
    plain, drawn = chart({"single": [(0, 1.5), (100, 1.5)]}, "t", "x"), chart(losses, "t", "x")
    assert drawn.size == (900, 480) and drawn.tobytes() != plain.tobytes()
    with Image.open(write_folder(run, "a/b") / "validation.png") as image:
        assert image.format == "PNG" and image.size == (900, 480)
    for values in ([0.0, 100.0], [1.125, 1.5], [3.0], [0.0], [-1e-6, 2e-6]):
        ticks = nice_ticks(values)
        assert ticks[0] <= min(values) and max(values) <= ticks[-1] and 2 <= len(ticks) <= 8


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_publishing_uploads_the_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = ModelHub(tmp_path / "hub")
    with hub_address(hub, monkeypatch):
        address = publish(run, REPO, dry_run=False, private=True)
        assert REPO in address and hub.visibility == "private"
        assert contents(hub.folder) == contents(run.folder / "publish") != {}
        publish(run, REPO, dry_run=False)  # again: the repository is there already
        with pytest.raises(RunError, match="hf auth login"):
            publish(run, "nobody/nothing at all", dry_run=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody answers there
    with pytest.raises(RunError, match=r"^REPO=.*the folder is"):
        publish(run, REPO, dry_run=False)


def test_a_dry_run_uploads_nothing_and_a_run_without_results_says_how_to_make_some(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["publish", "--run", str(run.folder), "--dry-run", "yes"]
    main.main([*command, "--repo", "me/x"])
    assert capsys.readouterr().out == f"wrote {run.folder / 'publish'}; look at it, then leave DRY_RUN out\n"
    with pytest.raises(SystemExit, match="2"):
        main.main(command)
    assert "REPO=user/name" in capsys.readouterr().err
    (run.folder / "cats.safetensors").unlink()
    shutil.rmtree(run.folder / "publish")
    with pytest.raises(RunError, match="make export"):
        publish(run, "me/x", dry_run=True)
