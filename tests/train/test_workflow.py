"""What ComfyUI does with our files: every key has its place in its map, and the workflow is a graph that it can run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from shared.config import Config
from shared.errors import RunError
from shared.files import read_json
from shared.models import SPECS, ModelSpec
from shared.names import original_name
from shared.resolve import Resolved
from tests.train.make import config, make_run
from train import workflow as subject
from train.adapter import ADAPTER, add_adapter
from train.export import formatted
from train.run import Run
from train.sample import scene_of
from train.workflow import write_workflow

ALL = r".*\.(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)"
# parts of a module that ComfyUI's adapters read (comfy/weight_adapter/: lora, loha, lokr; dora_scale and alpha in all)
PARTS = {"lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "dora_scale",
         *(f"hada_w{n}_{x}" for n in (1, 2) for x in "ab"), *(f"lokr_w{n}{x}" for n in (1, 2) for x in ("", "_a", "_b"))
         }  # fmt: skip


def comfy_key_map(names: list[str]) -> dict[str, str]:
    """ComfyUI's map from names in adapter files to weights (comfy/lora.py, model_lora_keys_unet, as described there):
    for each weight diffusion_model.<name>.weight the keys lora_unet_<name with underscores> and itself without .weight;
    a tensor that is no .weight stands for itself."""
    found = {}
    for name in (f"diffusion_model.{name}" for name in names):
        if name.endswith(".weight"):
            stem = name.removesuffix(".weight")
            found[stem] = name
            found["lora_unet_" + stem.removeprefix("diffusion_model.").replace(".", "_")] = name
        else:
            found[name] = name
    return found


def real_dit(name: str) -> tuple[ModelSpec, Any]:
    """The real model without data."""
    spec = SPECS[name]
    sizes = {"num_attention_heads": spec.heads, "attention_head_dim": spec.head_dim, "ffn_dim": spec.ffn_dim,
             "in_channels": spec.in_channels, "out_channels": spec.vae.channels, "text_dim": spec.text_dim}  # fmt: skip
    with torch.device("meta"):
        return spec, WanTransformer3DModel(**sizes, num_layers=spec.num_layers)


@pytest.mark.parametrize("name", ["t2v-a14b", "i2v-a14b", "ti2v-5b"])
@pytest.mark.parametrize("peft_type", ["LORA", "DORA", "LOHA", "LOKR"])
def test_comfyui_finds_every_key_of_an_export(name: str, peft_type: Any) -> None:
    """For the real models: none left over, and all ten linears of all blocks are reached."""
    spec, dit = real_dit(name)
    keys = comfy_key_map([original_name(key) for key in dit.state_dict()])
    linears = {f"{module}.weight" for module, part in dit.named_modules() if isinstance(part, torch.nn.Linear)
               and module.startswith("blocks.")}  # fmt: skip
    settings = Config.model_validate({"peft_type": peft_type, "lora_rank": 1, "lora_targets": ALL})
    tensors = adapter_names(dit, settings)
    forms: tuple[Any, ...] = ("COMFY_LORA", "KOHYA_LORA")
    for form in forms:
        reached, stray = set(), []
        for key in formatted(tensors, settings, spec, form):
            part = next((part for part in PARTS if key.endswith(f".{part}")), None)
            stem = key.removesuffix(f".{part}")
            stray += [key] if part is None or stem not in keys else []
            reached.add(keys.get(stem, ""))
        assert not stray
        assert reached == {f"diffusion_model.{original_name(linear)}" for linear in linears}


def adapter_names(dit: Any, settings: Config) -> dict[str, torch.Tensor]:
    """Names of what is trained, as add_adapter gives them for one small block, for every block of the real model."""
    small = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, text_dim=8)
    names = add_adapter(small, settings, 0)
    assert ADAPTER not in "".join(names)
    return {name.replace("blocks.0.", f"blocks.{block}.", 1): torch.zeros(1, 1)
            for block in range(len(dit.blocks)) for name in names}  # fmt: skip


# slots of ComfyUI's nodes (nodes.py, comfy_extras/nodes_wan.py, nodes_video.py, nodes_model_advanced.py,
# nodes_hunyuan.py): inputs that must be linked, by type; values; outputs
NODES: dict[str, tuple[dict[str, str], set[str], list[str]]] = {
    "UNETLoader": ({}, {"unet_name", "weight_dtype"}, ["MODEL"]),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, {"lora_name", "strength_model"}, ["MODEL"]),
    "ModelSamplingSD3": ({"model": "MODEL"}, {"shift"}, ["MODEL"]),
    "CLIPLoader": ({}, {"clip_name", "type", "device"}, ["CLIP"]),
    "CLIPTextEncode": ({"clip": "CLIP"}, {"text"}, ["CONDITIONING"]),
    "VAELoader": ({}, {"vae_name"}, ["VAE"]),
    "LoadImage": ({}, {"image"}, ["IMAGE", "MASK"]),
    "EmptyHunyuanLatentVideo": ({}, {"width", "height", "length", "batch_size"}, ["LATENT"]),
    "Wan22ImageToVideoLatent": ({"vae": "VAE"}, {"width", "height", "length", "batch_size"}, ["LATENT"]),
    "WanImageToVideo": (
        {"positive": "CONDITIONING", "negative": "CONDITIONING", "vae": "VAE", "start_image": "IMAGE"},
        {"width", "height", "length", "batch_size"}, ["CONDITIONING", "CONDITIONING", "LATENT"]),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {"seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"}, ["LATENT"]),
    "KSamplerAdvanced": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {"add_noise", "noise_seed", "steps", "cfg", "sampler_name", "scheduler", "start_at_step", "end_at_step",
         "return_with_leftover_noise"}, ["LATENT"]),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, set(), ["IMAGE"]),
    "CreateVideo": ({"images": "IMAGE"}, {"fps"}, ["VIDEO"]),
    "SaveVideo": ({"video": "VIDEO"}, {"filename_prefix", "format", "codec"}, []),
}  # fmt: skip


def check_graph(nodes: dict[str, Any]) -> None:
    """Every link leads to an earlier node's output of the right type; every input is there; every node is used."""
    used = set()
    for number, node in nodes.items():
        links, values, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == links.keys() | values, node
        for name, kind in links.items():
            source, slot = node["inputs"][name]
            assert int(source) < int(number) and NODES[nodes[source]["class_type"]][2][slot] == kind
            used.add(source)
        assert not any(isinstance(node["inputs"][name], list) for name in values)
    assert nodes.keys() - used == {max(nodes, key=int)}, "only the saved video is used by no other node"


def real_run(folder: Path, name: str, **changes: Any) -> Run:
    """A run of a real model, of which only the result's files exist."""
    settings = Config.model_validate({"base_model_name": name, "frames": 81, "resolution": "832x480",
                                      "sample_prompts": ["a zorb"], **changes})  # fmt: skip
    run = Run(folder / "cats", Resolved(settings, {}), (), folder)
    run.folder.mkdir()
    for expert in run.spec.experts:
        (run.folder / f"cats{'' if expert == 'single' else '_' + expert}.safetensors").touch()
    return run


def of_kind(nodes: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in nodes.values() if node["class_type"] == kind]


@pytest.mark.parametrize("name", ["t2v-a14b", "i2v-a14b", "ti2v-5b", "t2v-1.3b"])
def test_the_workflow_is_a_graph_that_names_the_exported_files(name: str, tmp_path: Path) -> None:
    run = real_run(tmp_path, name)
    path, lines = write_workflow(run, None)
    nodes = read_json(path)
    check_graph(nodes)
    assert {item["lora_name"] for item in of_kind(nodes, "LoraLoaderModelOnly")} == {
        file.name for file in run.folder.glob("*.safetensors")
    }
    assert {item["text"] for item in of_kind(nodes, "CLIPTextEncode")} == {"a zorb", ""}
    (video,) = of_kind(nodes, "CreateVideo")
    assert video["fps"] == run.spec.fps
    assert {item["shift"] for item in of_kind(nodes, "ModelSamplingSD3")} == {run.spec.sample_shift}
    assert any(line.startswith("models/loras: cats") and "copy" in line for line in lines)
    assert [len(of_kind(nodes, "LoadImage")), len(of_kind(nodes, "WanImageToVideo"))] == (
        [1, 1] if name == "i2v-a14b" else [0, 0]
    )


@pytest.mark.parametrize(("name", "switch"), [("t2v-a14b", 26), ("i2v-a14b", 15)])
def test_the_pair_hands_over_at_the_boundary(name: str, switch: int, tmp_path: Path) -> None:
    """High noise first, down to the boundary, each expert with its own file, adapter and guidance."""
    run = real_run(tmp_path, name)
    nodes = subject.workflow(run, scene_of(run.config, run.spec), {"high_noise": "h", "low_noise": "l"}).nodes
    high, low = of_kind(nodes, "KSamplerAdvanced")
    assert (high["start_at_step"], high["end_at_step"], low["start_at_step"]) == (0, switch, switch)
    assert (high["add_noise"], low["add_noise"]) == ("enable", "disable")
    assert (high["cfg"], low["cfg"]) == run.spec.guidance
    assert low["latent_image"][0] in {number for number, node in nodes.items() if node["inputs"] is high}
    for sampler, expert, lora in ((high, "high_noise", "h"), (low, "low_noise", "l")):
        adapter = nodes[nodes[sampler["model"][0]]["inputs"]["model"][0]]["inputs"]
        assert adapter["lora_name"] == lora and adapter["strength_model"] == 1.0
        assert expert in nodes[adapter["model"][0]]["inputs"]["unet_name"]


def test_what_was_merged_in_training_is_loaded_too(tmp_path: Path) -> None:
    (tmp_path / "fast.safetensors").touch()
    run = real_run(tmp_path, "ti2v-5b", base_adapters=[{"file": str(tmp_path / "fast.safetensors"), "strength": 0.5}])
    nodes = subject.workflow(run, scene_of(run.config, run.spec), {"single": "cats.safetensors"}).nodes
    check_graph(nodes)
    assert [(item["lora_name"], item["strength_model"]) for item in of_kind(nodes, "LoraLoaderModelOnly")] == [
        ("fast.safetensors", 0.5), ("cats.safetensors", 1.0)]  # fmt: skip


def test_one_trained_expert_and_whole_models(tmp_path: Path) -> None:
    run = real_run(tmp_path, "t2v-a14b", expert="low_noise")
    (run.folder / "cats_high_noise.safetensors").unlink()
    graph = subject.workflow(run, scene_of(run.config, run.spec), {"low_noise": "cats_low_noise.safetensors"})
    assert len(of_kind(graph.nodes, "LoraLoaderModelOnly")) == 1
    check_graph(graph.nodes)
    whole = run.config.model_copy(update={"training_method": "FINE_TUNE", "output_model_format": "SAFETENSORS"})
    tuned = replace(run, resolved=Resolved(whole, {}))
    nodes = subject.workflow(tuned, scene_of(whole, tuned.spec), {"low_noise": "cats_low_noise.safetensors"}).nodes
    assert [item["unet_name"] for item in of_kind(nodes, "UNETLoader")][1] == "cats_low_noise.safetensors"
    assert not of_kind(nodes, "LoraLoaderModelOnly")


def test_a_run_without_a_file_for_comfyui_is_told_the_export_command(single: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "cats", config(single[0], output_model_format="DIFFUSERS_LORA"), single[2])
    run.folder.mkdir()
    (run.folder / "cats.safetensors").touch()
    with pytest.raises(RunError, match=r"make export RUN=.*cats FORMAT=COMFY_LORA"):
        write_workflow(run, None)
    (run.folder / "cats-comfy_lora.safetensors").touch()
    assert "cats-comfy_lora.safetensors" in write_workflow(run, tmp_path)[0].read_text()
    embedding = make_run(tmp_path / "words", config(single[0], training_method="EMBEDDING",
                                                    output_model_format="SAFETENSORS"), single[2])  # fmt: skip
    with pytest.raises(RunError, match="make embed RUN="):
        write_workflow(embedding, None)
