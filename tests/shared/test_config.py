"""Configuration: strict, complete presets, later layers win, every mistake named in one line."""

import json
from pathlib import Path

import pytest

from shared.config import Config
from shared.errors import ConfigError
from shared.geometry import geometry
from shared.models import SPECS
from shared.resolve import (
    PRESET_ALIASES,
    PRESETS,
    Choice,
    preset_names,
    preset_path,
    resolve,
    save_config,
    to_json,
)

PRESET_NAMES = ["16gb", "24gb", "24gb-finetune", "48gb", "8gb", "cpu", "demo", "embedding"]


def test_the_shipped_presets_are_the_promised_ones() -> None:
    assert preset_names() == PRESET_NAMES


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_preset_is_a_complete_config(name: str) -> None:
    text = json.loads((PRESETS / f"{name}.json").read_text())
    assert to_json(Config.model_validate(text)) == text
    assert text["video_config"]["max_frames"] is None
    assert text["video_config"]["max_duration"] is None


@pytest.mark.parametrize("alias", PRESET_ALIASES)
@pytest.mark.parametrize("form", ["#wan 2.2 {}", "{}", "{}.json", "#Wan 2.2 {}.json"])
def test_the_guides_preset_names_are_aliases(alias: str, form: str) -> None:
    assert preset_path(form.format(alias)).stem == PRESET_ALIASES[alias]


def test_later_layers_win_and_each_value_knows_its_source(tmp_path: Path) -> None:
    overlay = tmp_path / "my.json"
    overlay.write_text('{"batch_size": 3, "seed": 5, "video_config": {"target_fps": 12}}')
    resolved = resolve(Choice(preset="cpu", config=overlay, model="tiny", set="seed=7 caption_prefix=a zorb"))
    assert (resolved.config.batch_size, resolved.config.seed, resolved.config.caption_prefix) == (3, 7, "a zorb")
    assert resolved.config.base_model_name == "tiny"
    assert resolved.sources["batch_size"] == f"CONFIG {overlay}"
    assert resolved.sources["video_config.target_fps"] == f"CONFIG {overlay}"
    assert (resolved.sources["seed"], resolved.sources["base_model_name"]) == ("SET", "MODEL")
    assert resolved.sources["epochs"] == "preset cpu"


def test_without_a_preset_the_work_folders_config_is_the_base(tmp_path: Path) -> None:
    left = tmp_path / "config.json"
    left.write_text((PRESETS / "cpu.json").read_text())
    assert resolve(Choice(), left).config == resolve(Choice(preset="cpu")).config


def test_a_preset_chosen_later_keeps_the_ingested_model_unless_one_is_named(tmp_path: Path) -> None:
    left = tmp_path / "config.json"
    left.write_text(json.dumps(json.loads((PRESETS / "cpu.json").read_text()) | {"base_model_name": "t2v-a14b"}))
    kept = resolve(Choice(preset="8gb"), left)
    assert kept.config == resolve(Choice(preset="8gb", model="t2v-a14b")).config
    assert kept.sources["base_model_name"] == str(left)
    assert resolve(Choice(preset="8gb", model="tiny"), left).config.base_model_name == "tiny"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(preset="17gb"), "did you mean 16gb.* there are: 16gb, .*cpu"),
        (Choice(set="learing_rate=1"), "learing_rate: unknown key, did you mean learning_rate"),
        (Choice(set="max_frames=9"), "did you mean video_config.max_frames"),
        (Choice(set="batch_size=0"), r"batch_size: .* \(value 0, from SET\)"),
        (Choice(set="batch_size=two"), r"batch_size: .* \(value 'two', from SET\)"),
        (Choice(set="max_steps = 5"), "without spaces around ="),
        (Choice(set="seed"), "'seed' is not key=value"),
        (Choice(set="layer_offload_fraction=1.5"), "between 0 and 1"),
        (Choice(config=Path("no/such.json")), "no such file"),
    ],
)
def test_a_mistake_is_named_with_its_value_and_the_way_out(choice: Choice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(choice)


def test_a_corrupt_config_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    for text in ("{", "[1]", '{"seed": NaN}', "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"broken\.json|seed"):
            resolve(Choice(config=path))


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_wanted_compression_scales_sides_frames_and_fps_together(spec: object) -> None:
    from shared.models import ModelSpec

    assert isinstance(spec, ModelSpec)
    own = spec.vae.stride_THW
    plain = geometry(Config(frames=17, resolution="512"), spec)
    met = geometry(_wanted(own[1] // 2, own[0] // 2), spec)
    assert (met.num_frames, met.fps, met.resolutions) == (plain.num_frames, plain.fps, plain.resolutions)
    assert len(met.remarks) == 2
    half = geometry(_wanted(own[1] * 2, own[0] * 2), spec)
    assert (half.num_frames, half.fps, half.resolutions) == (9, plain.fps / 2, (256,))


def _wanted(spatial: int, temporal: int) -> Config:
    video = {"spatial_compression_ratio": spatial, "temporal_compression_ratio": temporal}
    return Config.model_validate({"frames": 17, "resolution": "512", "video_config": video})


def test_the_smaller_of_frames_and_max_frames_counts() -> None:
    config = Config.model_validate({"frames": 33, "video_config": {"max_frames": 16}})
    assert geometry(config, SPECS["ti2v-5b"]).num_frames == 17


def test_a_saved_config_remembers_where_its_values_came_from(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_config(path, resolve(Choice(preset="8gb", set="seed=3 video_config.max_frames=9")))
    for _ in range(2):  # saved again by the next command, as it is
        again = resolve(Choice(set="epochs=4"), path)
        told = {key: again.sources[key] for key in ("seed", "lora_rank", "video_config.max_frames", "epochs")}
        assert told == {"seed": f"SET, by way of {path}", "lora_rank": f"preset 8gb, by way of {path}",
                        "video_config.max_frames": f"SET, by way of {path}", "epochs": "SET"}  # fmt: skip
        save_config(path, resolve(Choice(), path))
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    edited = resolve(Choice(), path)
    assert edited.config.seed == 4 and edited.sources["seed"] == str(path)
    assert edited.sources["lora_rank"] == f"preset 8gb, by way of {path}"
    assert resolve(Choice(preset="16gb"), path).sources["lora_rank"] == "preset 16gb"
