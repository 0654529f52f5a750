"""Which run a command means, what may change in it, and what is refused in one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shared.config import Config
from shared.errors import ConfigError, RunError, StoreError
from shared.files import write_json
from shared.models import SPECS, ModelSpec, spec_of_folder
from shared.resolve import Choice, parse_set, to_json
from shared.shards import Index, write_index
from shared.store import read_datasets, write_dataset
from tests.train.make import config, events, listed, make_all, make_model, make_run, make_store, trained
from train.__main__ import main
from train.model import refuse_mismatch
from train.optim import rate_factor
from train.phases import make_phases
from train.run import Run, changed_keys, choose_run, default_folder, start_folder
from train.session import export_run, start
from train.stores import open_dataset

Made = tuple[Path, ModelSpec, Path]


def begin(run: Run) -> None:
    run.folder.mkdir(parents=True)
    start_folder(run, "data")


def test_the_newest_unfinished_run_of_the_same_stores_goes_on(single: Made, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    stores, settings = (single[2],), to_json(config(single[0]))
    assert default_folder("a", stores, None, settings) == Path("runs/a")
    begin(make_run(Path("runs/a"), config(single[0]), single[2]))
    assert default_folder("a", stores, None, settings) == Path("runs/a")
    assert default_folder("a", stores, "no", settings) == Path("runs/a-2")
    assert default_folder("a", (tmp_path / "other.zarr",), None, settings) == Path("runs/a-2")
    Path("runs/a/done").touch()
    assert default_folder("a", stores, None, settings) == Path("runs/a")  # the very same is not trained twice
    assert default_folder("a", stores, None, settings | {"seed": 77}) == Path("runs/a-2")
    begin(make_run(Path("runs/a-2"), config(single[0]), single[2]))
    assert default_folder("a", stores, None, settings) == Path("runs/a-2")


def test_a_run_is_named_after_store_and_preset_and_resumes_by_itself(
    single: Made, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    choice = Choice(preset="demo", model=str(single[0]))
    run = choose_run(choice, tmp_path / "cats", None, None, None)
    assert run.folder == Path("runs/cats-demo") and run.stores == (tmp_path / "cats" / "latents.zarr",)
    assert choose_run(choice, tmp_path, str(single[2]), None, None).folder == Path("runs/store-demo")
    with pytest.raises(RunError, match="no run to resume"):
        choose_run(choice, tmp_path, None, None, "yes")
    begin(make_run(Path("runs/mine"), config(single[0], max_steps=77), single[2]))
    with pytest.raises(RunError, match="RESUME=no"):
        choose_run(choice, tmp_path, None, Path("runs/mine"), "no")
    own = choose_run(Choice(), tmp_path, None, Path("runs/mine"), None)
    assert own.config.max_steps == 77 and own.stores == (single[2],)


def test_changes_are_named_and_those_that_break_a_run_refused(single: Made, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config(single[0]), single[2])
    begin(run)
    lines = start_folder(make_run(run.folder, config(single[0], learning_rate=0.5, max_steps=9), single[2]), "data")
    assert lines == ["changed since the run was started: learning_rate: 0.002 -> 0.5",
                     "changed since the run was started: max_steps: 6 -> 9"]  # fmt: skip
    for change in ({"lora_rank": 2}, {"seed": 5}, {"optimizer": {"name": "ADAFACTOR"}}, {"batch_size": 1}):
        with pytest.raises(RunError, match="cannot change in a run"):
            start_folder(make_run(run.folder, config(single[0], **change), single[2]), "data")
    before, after = to_json(config(single[0])), to_json(config(single[0], caption_prefix="x", prior={"ratio": 2.0}))
    assert changed_keys(before, after) == ["caption_prefix", "prior.folders", "prior.ratio"]


def test_what_ingest_alone_obeys_is_refused_when_it_comes_too_late(single: Made, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", to_json(config(single[0], caption_prefix="a zorb, ")))
    write_json(tmp_path / "my.json", {"validation": {"fraction": 0.2}})
    place = tmp_path, str(single[2]), tmp_path / "run", None
    for late in (Choice(set="caption_prefix=sks"), Choice(set="gates.black=3"), Choice(config=tmp_path / "my.json")):
        with pytest.raises(ConfigError, match=r"ingest alone obeys it.*make encode"):
            choose_run(late, *place)
    same = Choice(set='caption_prefix="a zorb, " learning_rate=0.5')
    assert choose_run(same, *place).config.learning_rate == 0.5
    assert choose_run(Choice(preset="demo"), *place).config.caption_prefix == ""  # a preset asks for nothing by itself


def test_a_finished_run_trains_on_when_asked_for_more_steps(single: Made, tmp_path: Path, capsys: Any) -> None:
    short = make_run(tmp_path / "run", config(single[0], max_steps=4, lr_scheduler="CONSTANT"), single[2])
    start(short, finished=False)
    start(short, finished=True)
    assert "is finished" in capsys.readouterr().out
    longer = make_run(tmp_path / "run", config(single[0], max_steps=6, lr_scheduler="CONSTANT"), single[2])
    start(longer, finished=True)
    whole = make_run(tmp_path / "whole", config(single[0], max_steps=6, lr_scheduler="CONSTANT"), single[2])
    start(whole, finished=False)
    assert all((trained(whole)[name] == value).all() for name, value in trained(longer).items())


def test_stores_that_cannot_be_trained_are_refused_by_name(single: Made, tmp_path: Path) -> None:
    model, spec, store = single
    settings = config(model)
    with pytest.raises(StoreError, match="make ingest"):
        open_dataset([tmp_path / "none.zarr"], tmp_path, settings, spec)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(StoreError, match="make encode"):
        open_dataset([tmp_path / "none.zarr"], tmp_path, settings, spec)
    (tmp_path / "index.json").unlink()
    with pytest.raises(StoreError, match=r"48 channels.*16 channels.*make encode MODEL=ti2v-5b"):
        open_dataset([store], tmp_path, settings, SPECS["ti2v-5b"])
    other = spec_of_folder(make_model(tmp_path / "other", text_dim=24))
    with pytest.raises(StoreError, match=r"width 24.*holds 16"):
        open_dataset([store], tmp_path, settings, other)
    with pytest.raises(StoreError, match=r"32x32x9.*resolution=64x64 frames=5.*make ingest") as error:
        open_dataset([store], tmp_path, config(model, resolution="64x64", frames=5), spec)
    told = parse_set(str(error.value).split('SET="')[1].split('"')[0])  # what the message advises is enough
    assert open_dataset([store], tmp_path, config(model, **told), spec).train


MISSING_ROWS = [({"keys": ("gone",)}, "1 listed samples are not in the store .first: gone"),
                ({"captions": ("gone",)}, "1 captions are not in the store .first: gone")]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISSING_ROWS)
def test_a_listed_sample_without_a_row_is_refused(single: Made, tmp_path: Path, change: Any, message: str) -> None:
    model, spec, _ = single
    store, facts = make_store(tmp_path / "made.zarr", spec, [listed(0, spec)]), {"keys": ("sample0",)} | change
    (dataset,) = read_datasets(store)
    write_dataset(store, dataset.model_copy(update={"samples": (listed(0, spec), listed(1, spec, **facts))}))
    with pytest.raises(StoreError, match=message + ".*make encode"):
        open_dataset([store], tmp_path, config(model), spec)


def test_samples_of_other_buckets_are_left_out_and_counted(mixed: Made, tmp_path: Path) -> None:
    model, spec, store = mixed
    data = open_dataset([store], tmp_path, config(model), spec)
    assert {str(sample.bucket) for sample in data.train} == {"32x32x9", "32x32x1"}
    assert data.remarks == ("3 samples of buckets 48x32x9 are left out",)


def test_stores_that_list_nothing_to_train_are_refused(single: Made, tmp_path: Path) -> None:
    model, spec, _ = single
    empty, held = (
        make_store(tmp_path / name, spec, [listed(0, spec, split="validation")]) for name in ("empty", "held")
    )
    (dataset,) = read_datasets(empty)
    write_dataset(empty, dataset.model_copy(update={"samples": ()}))
    for store, message in ((empty, "lists no samples.*make encode"), (held, "held out.*make ingest")):
        with pytest.raises(StoreError, match=message):
            open_dataset([store], tmp_path, config(model), spec)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"expert": "low_noise"}, "has one expert"),
    ({"expert_share": 0.5}, "one expert"),
    ({"first_frame_conditioning_probability": 0.5}, "no clean first frame"),
    ({"training_method": "FINE_TUNE"}, "SAFETENSORS or DIFFUSERS"),
    ({"output_model_format": "DIFFUSERS"}, "LORA gives an adapter"),
    ({"peft_type": "LOHA", "output_model_format": "DIFFUSERS_LORA"}, "cannot hold peft_type=LOHA"),
    ({"optimizer": {"rounding": "KAHAN"}}, "BFLOAT_16"),
    ({"transformer": {"train": False}}, "LORA is an adapter of the transformer"),
    ({"training_method": "FINE_TUNE", "output_model_format": "SAFETENSORS", "transformer": {"train": False}},
     "nothing would be trained.*text_encoder.train"),
    ({"training_method": "FINE_TUNE", "transformer": {"weight_dtype": "FLOAT_8"}}, "updates the weights"),
    ({"training_method": "FINE_TUNE", "output_model_format": "SAFETENSORS", "train_dtype": "FLOAT_16",
      "transformer": {"weight_dtype": "FLOAT_16"}}, "small updates of such weights vanish"),
    ({"optimizer": {"name": "SCHEDULE_FREE_ADAMW"}, "lr_scheduler": "COSINE"}, "takes the place of a schedule"),
    ({"optimizer": {"name": "SCHEDULE_FREE_ADAMW"}, "lr_scheduler": "CONSTANT", "ema": 0.9}, "averages the weights"),
    ({"optimizer": {"name": "ADAFACTOR", "beta2": 0.99}}, "optimizer.beta2=0.99: ADAFACTOR has no such number.*0.999"),
    ({"optimizer": {"name": "LION", "eps": 1e-6}}, "optimizer.eps=1e-06: LION has no such number"),
    ({"optimizer": {"name": "SCHEDULE_FREE_ADAMW", "beta1": 0.0}, "lr_scheduler": "CONSTANT"}, "averages with it"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(single: Made, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_mismatch(config(single[0], **changes), single[1])


def test_a_model_of_another_family_is_refused(single: Made, pair: Made) -> None:
    refuse_mismatch(config(single[0], model_type="WAN_2_1"), single[1])  # one expert: both families have such
    for settings, spec in ((config(pair[0], model_type="WAN_2_1"), pair[1]),
                           (Config(model_type="WAN_2_1"), SPECS["ti2v-5b"])):  # fmt: skip
        with pytest.raises(ConfigError, match=r"model_type=WAN_2_1.*Wan 2.2"):
            refuse_mismatch(settings, spec)


def test_experts_share_the_steps_by_probability_or_as_told(pair: Made) -> None:
    def spans(**changes: Any) -> list[tuple[str, int, int]]:
        settings = config(pair[0], timestep_distribution="UNIFORM", **changes)
        return [(phase.expert, phase.first, phase.stop) for phase in make_phases(settings, pair[1], 1000)]

    assert spans() == [("high_noise", 0, 417), ("low_noise", 417, 1000)]  # shift 5: 41.7 % above 0.875
    assert spans(expert_share=0.25)[0] == ("high_noise", 0, 250)
    assert spans(expert="low_noise") == [("low_noise", 0, 1000)]


def test_rates_follow_warmup_and_schedule() -> None:
    def factors(name: str) -> list[float]:
        settings = Config(lr_scheduler=name, warmup_steps=4)  # type: ignore[arg-type]
        return [rate_factor(settings, step, 14) for step in (0, 3, 4, 9, 13)]

    assert factors("CONSTANT") == [0.25, 1, 1, 1, 1]
    assert factors("LINEAR") == pytest.approx([0.25, 1, 1, 0.5, 0.1])
    assert factors("COSINE") == pytest.approx([0.25, 1, 1, 0.5, 0.0244717], abs=1e-6)


def test_the_command_trains_two_experts_explains_and_exports(tmp_path: Path, monkeypatch: Any) -> None:
    model, _, store = make_all(tmp_path / "made", pair=True)
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text(json.dumps(to_json(config(model, max_steps=4)) | {"prior": {"folders": []}}))
    common = ["--work", str(tmp_path), "--store", str(store), "--preset", "demo", "--config", "c.json"]
    told = CliRunner().invoke(main, ["explain", *common, "--set", "lora_rank=2"], catch_exceptions=False)
    assert re.search(r"^lora_rank +2 +SET$", told.output, re.M)
    assert re.search(r"^frames +9 +CONFIG c.json$", told.output, re.M)
    assert "expert high_noise: steps 1-" in told.output and "sigma 0.875-1" in told.output
    CliRunner().invoke(main, [*common, "--run", "runs/x"], catch_exceptions=False)
    names = sorted(path.name for path in Path("runs/x").glob("*.safetensors"))
    assert names == ["x_high_noise.safetensors", "x_low_noise.safetensors"]
    paths = export_run(Path("runs/x"), "KOHYA_LORA", tmp_path / "out")
    assert [path.name for path in paths] == [f"x-kohya_lora_{expert}_noise.safetensors" for expert in ("high", "low")]
    rows = events(make_run(Path("runs/x"), config(model), store))
    steps = [(row["step"], row["expert"]) for row in rows if row["event"] == "step"]
    assert steps == [(1, "high_noise"), (2, "low_noise"), (3, "low_noise"), (4, "low_noise")]


def test_a_store_older_than_the_index_of_its_dataset_is_refused(single: Made, tmp_path: Path) -> None:
    model, spec, store = single
    (dataset,) = read_datasets(store)
    write_index(tmp_path, Index(dataset=dataset.id, ingest_version=1))
    with pytest.raises(StoreError, match=r"newer than the store.*make encode"):
        open_dataset([store], tmp_path, config(model), spec)
    write_index(tmp_path, Index(dataset="another", ingest_version=1))
    assert open_dataset([store], tmp_path, config(model), spec).train
