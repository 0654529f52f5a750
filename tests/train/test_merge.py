"""Adapters merged before training: stock diffusers' fusing for plain LoRA, ComfyUI's rule for the other kinds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from shared.config import Config
from shared.errors import ConfigError, RunError
from shared.models import ModelSpec
from shared.names import original_name
from shared.tensors import read
from shared.weights import dit_places
from tests.train.make import config, make_run
from tests.train.test_export import CPU, comfy_weight, exported, ours, pipeline, stock, trained_model
from train.adapter import add_adapter
from train.adapter_file import base_adapters
from train.export import describe, formatted
from train.load import SAVED, load_quantized
from train.merge import Merge
from train.model import load_model, refuse_mismatch
from train.quantize import store
from train.run import check_changes, start_folder

Made = tuple[Path, ModelSpec, Path]
ALL = r".*\.(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)"


def merged_with(made: Made, *adapters: Any, **changes: Any) -> Config:
    return config(made[0], base_adapters=list(adapters), **changes)


@pytest.mark.parametrize("form", ["COMFY_LORA", "DIFFUSERS_LORA", "KOHYA_LORA"])
def test_merging_is_what_stock_diffusers_fuses(single: Made, tmp_path: Path, form: Any) -> None:
    settings = config(single[0], lora_alpha=6.0, lora_targets=ALL, output_model_format=form)
    path, *_ = exported(single, tmp_path, settings)
    settings = merged_with(single, {"file": str(path), "strength": 0.7})
    model = load_model(single[1], "single", settings, CPU)
    pipe = pipeline(single[0])
    before = stock(pipe.transformer)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    pipe.fuse_lora(components=["transformer"], lora_scale=0.7)
    pipe.unload_lora_weights()
    fused = pipe.transformer.state_dict()
    for name, value in model.transformer.state_dict().items():
        torch.testing.assert_close(value, fused[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(model), stock(pipe.transformer), rtol=1e-5, atol=1e-5)
    assert (before - ours(model)).abs().max() > 0.05


def test_several_adapters_add_up_and_a_fresh_one_is_trained_on_top(single: Made, tmp_path: Path) -> None:
    path, *_ = exported(single, tmp_path, config(single[0], lora_alpha=6.0, lora_targets=ALL))
    halves = merged_with(single, {"file": str(path), "strength": 0.25}, {"file": str(path), "strength": 0.75})
    whole = load_model(single[1], "single", merged_with(single, str(path)), CPU)
    both = load_model(single[1], "single", halves, CPU)
    torch.testing.assert_close(ours(both), ours(whole), rtol=1e-5, atol=1e-5)
    tuned = load_model(single[1], "single", merged_with(single, str(path), training_method="FINE_TUNE",
                                                        output_model_format="SAFETENSORS"), CPU)  # fmt: skip
    torch.testing.assert_close(ours(tuned), ours(whole), rtol=1e-5, atol=1e-5)
    add_adapter(whole.transformer, halves, 0)
    torch.testing.assert_close(ours(both), ours(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("peft_type", ["LORA", "DORA", "LOHA", "LOKR"])
def test_every_kind_is_merged_by_comfyuis_rule(single: Made, tmp_path: Path, peft_type: Any) -> None:
    """W + s (W' - W), where W' is the weight that ComfyUI makes of the file at full strength."""
    strength, made_with = 0.4, config(single[0], lora_alpha=6.0, peft_type=peft_type)
    _, tensors = trained_model(single, made_with)
    file = formatted(tensors, made_with, single[1], "COMFY_LORA")
    save_file(file, tmp_path / "a.safetensors")
    settings = merged_with(single, {"file": str(tmp_path / "a.safetensors"), "strength": strength})
    state = load_model(single[1], "single", settings, CPU).transformer.state_dict()
    base = WanTransformer3DModel.from_pretrained(single[0] / "transformer").state_dict()
    changed = 0
    for name, before in base.items():
        prefix = f"diffusion_model.{original_name(name.removesuffix('.weight'))}."
        if name.endswith(".weight") and f"{prefix}alpha" in file:
            wanted = before + strength * (comfy_weight(before, prefix, file, made_with) - before)
            torch.testing.assert_close(state[name], wanted, rtol=1e-4, atol=1e-5)
            changed += 1
        else:
            assert torch.equal(state[name], before)
    assert changed >= 8


def test_differences_of_weights_biases_and_norms_are_added(single: Made, tmp_path: Path) -> None:
    """`diff` and `diff_b`, as in published 4-step adapters; a modulation has no `.weight` in its name."""
    base = WanTransformer3DModel.from_pretrained(single[0] / "transformer").state_dict()
    names = {"blocks.0.self_attn.q.diff": "blocks.0.attn1.to_q.weight", "blocks.1.modulation.diff":
             "blocks.1.scale_shift_table", "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
             "patch_embedding.diff": "patch_embedding.weight", "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
             "blocks.0.cross_attn.norm_k.diff": "blocks.0.attn2.norm_k.weight"}  # fmt: skip
    parts = {key: torch.randn_like(base[name]) for key, name in names.items()}
    save_file({f"diffusion_model.{key}": part for key, part in parts.items()}, tmp_path / "a.safetensors")
    settings = merged_with(single, {"file": str(tmp_path / "a.safetensors"), "strength": 0.5})
    state = load_model(single[1], "single", settings, CPU).transformer.state_dict()
    for key, name in names.items():
        torch.testing.assert_close(state[name], base[name] + 0.5 * parts[key])
    assert all(torch.equal(state[name], base[name]) for name in base.keys() - names.values())


def test_an_adapter_of_a_convolution_is_merged(single: Made, tmp_path: Path) -> None:
    down, up = torch.randn(2, 16, 1, 2, 2), torch.randn(24, 2, 1, 1, 1)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_file(
        {f"diffusion_model.patch_embedding.{part}": value for part, value in parts.items()}, tmp_path / "a.safetensors"
    )
    base = WanTransformer3DModel.from_pretrained(single[0] / "transformer").state_dict()["patch_embedding.weight"]
    merged = load_model(single[1], "single", merged_with(single, str(tmp_path / "a.safetensors")), CPU)
    wanted = base + 0.5 * torch.einsum("orabc,rixyz->oixyz", up, down)
    torch.testing.assert_close(merged.transformer.state_dict()["patch_embedding.weight"], wanted)


@pytest.mark.parametrize("dtype", ["FLOAT_8", "NFLOAT_4"])
def test_what_is_stored_is_the_merged_weight(single: Made, tmp_path: Path, dtype: str) -> None:
    """Merging comes before quantising; what is saved is named after the adapter's content and strength."""
    path, *_ = exported(single, tmp_path, config(single[0], lora_alpha=6.0, lora_targets=ALL))
    (tmp_path / "model").mkdir()
    for part in ("transformer", "vae", "model_index.json"):
        (tmp_path / "model" / part).symlink_to(single[0] / part)
    spec = replace(single[1], repo=str(tmp_path / "model"))
    merged = load_model(single[1], "single", merged_with(single, str(path)), CPU).transformer.state_dict()
    found = load_quantized(spec, "single", dtype, "FLOAT_32", [(path, 1.0)], save_above=0).state_dict()  # type: ignore[arg-type]
    name = "blocks.1.ffn.net.0.proj"
    assert torch.equal(bits(found[f"{name}.codes"]), bits(store(merged[f"{name}.weight"], dtype).codes))  # type: ignore[arg-type]
    (first,) = (tmp_path / "model" / SAVED).glob("*.safetensors")
    kept = first.name
    again = load_quantized(spec, "single", dtype, "FLOAT_32", [(path, 1.0)], save_above=0).state_dict()  # type: ignore[arg-type]
    assert torch.equal(bits(again[f"{name}.codes"]), bits(found[f"{name}.codes"])) and first.name == kept
    load_quantized(spec, "single", dtype, "FLOAT_32", [(path, 0.5)], save_above=0)  # type: ignore[arg-type]
    (second,) = (tmp_path / "model" / SAVED).glob("*.safetensors")
    assert second.name != kept


def bits(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


def test_each_expert_gets_its_own_of_a_pair(pair: Made, single: Made, tmp_path: Path) -> None:
    path, *_ = exported(single, tmp_path, config(single[0], lora_alpha=6.0, lora_targets=ALL))
    tensors = load_file(path)
    files = {expert: tmp_path / f"fast_{expert}.safetensors" for expert in ("high_noise", "low_noise")}
    for factor, file in zip((1.0, -1.0), files.values(), strict=True):
        save_file({key: value * (factor if "lora_B" in key else 1) for key, value in tensors.items()}, file)
    settings = config(pair[0], base_adapters=[str(files["high_noise"])])
    assert base_adapters(settings, "low_noise") == ((files["low_noise"], 1.0),)
    for part, expert in enumerate(files):
        merged = load_model(pair[1], expert, settings, CPU).transformer.state_dict()
        plain = load_model(pair[1], expert, config(pair[0]), CPU).transformer.state_dict()
        module = "diffusion_model.blocks.0.self_attn.q"
        change = (1, -1)[part] * 1.5 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        name = "blocks.0.attn1.to_q.weight"
        torch.testing.assert_close(merged[name] - plain[name], change, rtol=1e-4, atol=1e-5)


def test_results_say_what_was_merged_and_a_run_keeps_it(single: Made, tmp_path: Path) -> None:
    path, *_ = exported(single, tmp_path, config(single[0]))
    settings = merged_with(single, {"file": str(path), "strength": 0.5})
    facts = describe(settings, single[1], "single", 1, "data")
    (told,) = json.loads(facts["base_adapters"])
    assert told["file"] == "a.safetensors" and told["strength"] == 0.5 and len(told["sha256"]) == 64
    assert "base_adapters" not in describe(config(single[0]), single[1], "single", 1, "data")
    run = make_run(tmp_path / "started", settings, single[2])
    start_folder(run, "data")
    other = replace(run, resolved=replace(run.resolved, config=config(single[0])))
    with pytest.raises(RunError, match="base_adapters"):
        check_changes(other)


def test_adapters_of_other_models_and_broken_ones_are_refused(single: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        refuse_mismatch(merged_with(single, "nowhere.safetensors"), single[1])
    with pytest.raises(ConfigError, match="resume_from_adapter: nowhere"):
        refuse_mismatch(config(single[0], resume_from_adapter="nowhere.safetensors"), single[1])

    def refused(match: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        with pytest.raises(RunError, match=match):
            load_model(single[1], "single", merged_with(single, str(tmp_path / "x.safetensors")), CPU)

    stem, rank = "diffusion_model.blocks.0.self_attn.q", torch.zeros(4, 24)
    half = {f"{stem}.lora_A.weight": rank}
    refused("only lora_A", half)
    refused("made for another model", half | {f"{stem}.lora_B.weight": torch.zeros(5120, 4)})
    refused("fit nothing in the model", {key.replace("blocks.0", "blocks.39"): value for key, value in half.items()})
    refused("is no part of an adapter", {"diffusion_model.patch_embedding.weight": torch.zeros(2)})
    whole = half | {f"{stem}.lora_B.weight": torch.zeros(24, 4)}
    refused("magnitudes of columns", whole | {f"{stem}.dora_scale": torch.zeros(1, 25)})
    refused("rsLoRA", whole, {"lora_adapter_metadata": '{"transformer.use_rslora": true}'})
    refused("not what peft writes", whole, {"lora_adapter_metadata": '{"transformer.lora_alpha": [1]}'})
    hadamard = {f"{stem}.hada_w{n}_{x}": torch.zeros(24, 4) if x == "a" else torch.zeros(4, 25)
                for n in (1, 2) for x in "ab"}  # fmt: skip
    refused("24x25.*made for another model", hadamard)
    refused("20x25.*made for another model", {f"{stem}.lokr_w{n}": torch.zeros(6 - n, 5) for n in (1, 2)})
    refused("24x25.*made for another model", {f"{stem}.diff": torch.zeros(24, 25)})
    (tmp_path / "y.safetensors").write_bytes(b"no adapter")
    with pytest.raises(RunError, match="damaged"):
        load_model(single[1], "single", merged_with(single, str(tmp_path / "y.safetensors")), CPU)


FACTORS = {
    "lora": {"lora_A.weight": (4, 30), "lora_B.weight": (100, 4)},
    "dora": {"lora_A.weight": (4, 30), "lora_B.weight": (100, 4), "dora_scale": (100, 1)},
    "loha": {"hada_w1_a": (100, 4), "hada_w1_b": (4, 30), "hada_w2_a": (100, 4), "hada_w2_b": (4, 30)},
    "lokr": {"lokr_w1": (5, 3), "lokr_w2_a": (20, 2), "lokr_w2_b": (2, 10)},
    "diff": {"diff": (100, 30)},
}


@pytest.mark.parametrize("kind", FACTORS)
def test_rows_merged_in_pieces_are_the_whole(tmp_path: Path, kind: str) -> None:
    """Pieces end wherever they like, inside a block of a Kronecker product too."""
    torch.manual_seed(0)
    name, stem = "blocks.0.attn1.to_q.weight", "diffusion_model.blocks.0.self_attn.q"
    save_file({name: torch.randn(100, 30)}, tmp_path / "w.safetensors")
    parts = {f"{stem}.{part}": torch.randn(shape) for part, shape in FACTORS[kind].items()}
    save_file(parts | {f"{stem}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    places = dit_places(tmp_path / "w.safetensors")
    weight, adapters = read(places[name]), [(tmp_path / "a.safetensors", 0.6)]
    whole = Merge(adapters, places).rows(name, 0, weight)
    assert (whole - weight).abs().max() > 0.1
    merge = Merge(adapters, places)
    pieces = [merge.rows(name, first, weight[first : first + 37]) for first in range(0, 100, 37)]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-6, atol=1e-6)
