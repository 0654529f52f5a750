"""What is exported gives elsewhere what it gave in training: every format, loaded by stock diffusers or by its rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shared.config import Config
from shared.errors import RunError
from shared.models import SPECS, ModelSpec, model_spec
from shared.names import original_name
from shared.weights import load_transformer
from tests.train.make import config, make_run
from train.adapter import add_adapter
from train.adapter_file import adapter_path, start_from
from train.export import block_linears, describe, formatted, write_result
from train.lean import collate_text, project_text
from train.model import Model, load_model, predict
from train.run import Run

Made = tuple[Path, ModelSpec, Path]
CPU = torch.device("cpu")
LATENT, TIME = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([700.0, 300.0])


def trained_model(made: Made, settings: Config) -> tuple[Model, dict[str, torch.Tensor]]:
    """A model whose adapter was moved away from its start."""
    model = load_model(made[1], "single", settings, CPU)
    tensors = add_adapter(model.transformer, settings, 0)
    torch.manual_seed(3)
    for value in tensors.values():
        value.data += 0.2 * torch.randn_like(value)
    return model, {name: value.detach() for name, value in tensors.items()}


def exported(made: Made, folder: Path, settings: Config, metadata: dict[str, str] | None = None
             ) -> tuple[Path, Model, dict[str, torch.Tensor]]:  # fmt: skip
    """The file of such an adapter in the settings' format, the model and the tensors it was made from."""
    model, tensors = trained_model(made, settings)
    what = make_run(folder / "run", settings, made[2]), "single", settings.output_model_format
    (path,) = write_result(folder, "a", what, tensors, metadata or {"format": "pt"})
    return path, model, tensors


def ours(model: Model) -> torch.Tensor:
    text = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    rows = project_text(model.transformer, text)
    with torch.no_grad():
        return predict(model, LATENT, TIME[:, None], collate_text([rows, rows]))


def stock(transformer: Any) -> torch.Tensor:
    text = torch.zeros(2, 512, 16)
    text[:, :7] = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return transformer(LATENT, TIME, text).sample


def pipeline(folder: Path) -> WanPipeline:
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(),
                       transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"))  # fmt: skip


@pytest.mark.parametrize(
    "targets", [r".*\.(to_q|to_v)", r".*\.(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)"]
)
@pytest.mark.parametrize("form", ["COMFY_LORA", "DIFFUSERS_LORA", "KOHYA_LORA"])
def test_stock_diffusers_gives_our_output(single: Made, tmp_path: Path, form: Any, targets: str) -> None:
    settings = config(single[0], lora_alpha=6.0, lora_targets=targets, output_model_format=form)
    path, model, _ = exported(single, tmp_path, settings, describe(settings, single[1], "single", 5, "data"))
    pipe = pipeline(single[0])
    before = stock(pipe.transformer)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    torch.testing.assert_close(stock(pipe.transformer), ours(model), rtol=1e-5, atol=1e-5)
    assert (before - ours(model)).abs().max() > 0.05


@pytest.mark.parametrize("peft_type", ["LORA", "DORA", "LOHA", "LOKR"])
def test_the_comfy_rule_of_each_kind_gives_our_weights(single: Made, peft_type: Any) -> None:
    """ComfyUI's rules: alpha / rank times B A, dora_scale over the column norms, Hadamard and Kronecker products."""
    settings = config(single[0], lora_alpha=6.0, peft_type=peft_type)
    model, tensors = trained_model(single, settings)
    file = formatted(tensors, settings, single[1], "COMFY_LORA")
    assert all(key.startswith("diffusion_model.blocks.") for key in file)
    for name, module in model.transformer.named_modules():
        if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            base = module.get_base_layer().weight.clone()
            wanted = comfy_weight(base, f"diffusion_model.{original_name(name)}.", file, settings)
            module.merge()
            torch.testing.assert_close(module.get_base_layer().weight, wanted, rtol=1e-4, atol=1e-5)


def comfy_weight(base: torch.Tensor, name: str, file: dict[str, torch.Tensor], settings: Config) -> torch.Tensor:
    part = {key.removeprefix(name): value for key, value in file.items() if key.startswith(name)}
    scale = float(part["alpha"]) / settings.lora_rank
    if "hada_w1_a" in part:
        return base + scale * (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
    if "lokr_w1" in part or "lokr_w1_a" in part:
        first, second = (part[f"lokr_{w}"] if f"lokr_{w}" in part else part[f"lokr_{w}_a"] @ part[f"lokr_{w}_b"]
                         for w in ("w1", "w2"))  # fmt: skip
        full = "lokr_w1" in part and "lokr_w2" in part
        return base + (1.0 if full else scale) * torch.kron(first, second)
    delta = scale * part["lora_B.weight"] @ part["lora_A.weight"]
    if "dora_scale" not in part:
        return base + delta
    moved = base + delta
    return moved * part["dora_scale"] / moved.norm(dim=1, keepdim=True)


def test_original_names_are_complete_for_the_real_models() -> None:
    """Every tensor of A14B, I2V-A14B and TI2V-5B gets the name that Wan's own code has, none twice."""
    with torch.device("meta"):
        for name in ("t2v-a14b", "i2v-a14b", "ti2v-5b"):
            spec = SPECS[name]
            channels = {"in_channels": spec.in_channels, "out_channels": spec.vae.channels, "text_dim": 4096}
            sizes = {"ffn_dim": spec.ffn_dim, "num_layers": spec.num_layers, "freq_dim": 256}
            dit = WanTransformer3DModel(num_attention_heads=spec.heads, attention_head_dim=128, **channels, **sizes)
            names = [original_name(key) for key in dit.state_dict()]
            linears = {module: (part.out_features, part.in_features) for module, part in dit.named_modules()
                       if isinstance(part, torch.nn.Linear)}  # fmt: skip
            assert len(set(names)) == len(names)
            assert not [
                each for each in names if any(word in each for word in ("attn1", "attn2", "to_", "net.", "table"))
            ]
            theirs = """head.head.weight head.modulation blocks.0.modulation blocks.0.norm3.weight
                time_projection.1.bias
                text_embedding.2.weight patch_embedding.weight blocks.0.self_attn.norm_q.weight
                blocks.0.cross_attn.o.bias blocks.0.ffn.2.weight"""
            assert set(theirs.split()) <= set(names)
            for module, shape in block_linears(spec).items():
                assert linears[f"blocks.0.{module}"] == shape


def test_a_fine_tune_is_a_diffusers_folder_or_one_file_with_original_names(single: Made, tmp_path: Path) -> None:
    settings = config(single[0], training_method="FINE_TUNE", output_model_format="DIFFUSERS", output_dtype="FLOAT_32")
    model = load_model(single[1], "single", settings, CPU)
    tensors = {name: part.detach() + 0.1 for name, part in model.transformer.named_parameters()}
    model.transformer.load_state_dict(tensors)
    run: Run = make_run(tmp_path / "run", settings, single[2])
    (folder,) = write_result(tmp_path, "a", (run, "single", "DIFFUSERS"), tensors, {"format": "pt"})
    opened = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    torch.testing.assert_close(stock(opened), ours(model), rtol=1e-4, atol=1e-4)
    (path,) = write_result(tmp_path, "b", (run, "single", "SAFETENSORS"), tensors, {"format": "pt"})
    single_file = WanTransformer3DModel.from_single_file(str(path), config=str(single[0]), subfolder="transformer")
    assert all(torch.equal(value, tensors[name]) for name, value in single_file.state_dict().items())


def test_a_file_says_where_it_comes_from(single: Made, tmp_path: Path) -> None:
    settings = config(single[0], lora_alpha=2.0, caption_prefix="zorb, ")
    facts = describe(settings, single[1], "single", 123, "a store")
    path, _, tensors = exported(single, tmp_path, settings, facts)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["steps"] == metadata["ss_steps"] == "123" and metadata["store_fingerprint"] == "a store"
    assert metadata["modelspec.trigger_phrase"] == "zorb" and metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert len(metadata["base_model_hash"]) == 32 and metadata["ss_network_alpha"] == "2.0"
    assert Config.model_validate(json.loads(metadata["config"])) == settings
    weights = {name: value for name, value in load_file(path).items() if name.endswith("weight")}
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
    half = formatted(tensors, settings.model_copy(update={"output_dtype": "FLOAT_16"}), single[1], "COMFY_LORA")
    assert {str(value.dtype) for name, value in half.items() if name.endswith("weight")} == {"torch.float16"}


@pytest.mark.parametrize("form", ["COMFY_LORA", "DIFFUSERS_LORA", "KOHYA_LORA"])
def test_training_can_start_from_a_file_of_any_format(single: Made, tmp_path: Path, form: Any) -> None:
    """The model starts as it was exported, though this run's alpha is another one."""
    settings = config(single[0], lora_alpha=6.0, output_model_format=form)
    path, before, _ = exported(single, tmp_path, settings)
    other = config(single[0], lora_alpha=16.0)
    model = load_model(single[1], "single", other, CPU)
    trained = add_adapter(model.transformer, other, 7)
    start_from(path, trained, other)
    torch.testing.assert_close(ours(model), ours(before), rtol=1e-5, atol=1e-5)
    with pytest.raises(RunError, match="set lora_rank to the file's 4"):
        wider = config(single[0], lora_rank=8)
        start_from(path, add_adapter(load_model(single[1], "single", wider, CPU).transformer, wider, 0), wider)
    if form != "KOHYA_LORA":
        narrow = config(single[0], lora_targets=r".*\.to_q")
        with pytest.raises(RunError, match="fit nothing that is trained"):
            start_from(path, add_adapter(load_model(single[1], "single", narrow, CPU).transformer, narrow, 0), narrow)


def test_a_pair_starts_from_its_pair_of_files(single: Made, tmp_path: Path) -> None:
    pair = config(single[0], resume_from_adapter="old/cat_high_noise.safetensors")
    assert adapter_path(pair, "low_noise") == Path("old/cat_low_noise.safetensors")
    assert adapter_path(pair, "high_noise") == Path("old/cat_high_noise.safetensors")
    assert (
        adapter_path(config(single[0], resume_from_adapter="old/cat.safetensors"), "single").name == "cat.safetensors"
    )
    (tmp_path / "x.safetensors").write_bytes(b"no adapter")
    with pytest.raises(RunError, match="resume_from_adapter"):
        start_from(tmp_path / "x.safetensors", {}, pair)
    save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 24)}, tmp_path / "x.safetensors")
    with pytest.raises(RunError, match="lacks one of its two matrices"):
        start_from(tmp_path / "x.safetensors", {}, pair)


def test_a_whole_model_goes_out_and_comes_in_again_bit_for_bit(
    single: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAFETENSORS carries its config, so that MODEL=file trains on from it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = config(
        single[0], training_method="FINE_TUNE", output_model_format="SAFETENSORS", output_dtype="FLOAT_32"
    )
    model = load_model(single[1], "single", settings, CPU)
    tensors = {name: part.detach() + 0.1 for name, part in model.transformer.named_parameters()}
    run = make_run(tmp_path / "run", settings, single[2])
    (path,) = write_result(tmp_path, "tuned", (run, "single", "SAFETENSORS"), tensors, {"format": "pt"})
    again = load_transformer(model_spec(str(path)), "single", torch.float32)
    assert dict(again.config)["attention_head_dim"] == single[1].head_dim
    assert all(torch.equal(value, tensors[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("form", ["COMFY_LORA", "DIFFUSERS_LORA", "KOHYA_LORA"])
def test_a_round_trip_through_a_format_is_lossless(single: Made, tmp_path: Path, form: Any) -> None:
    """Exported in float32 and started from with the same rank and alpha: the very same bits, and so in every format."""
    settings = config(single[0], lora_alpha=8.0, output_model_format=form)
    path, _, tensors = exported(single, tmp_path, settings)
    fresh = add_adapter(load_model(single[1], "single", settings, CPU).transformer, settings, 7)
    start_from(path, fresh, settings)
    assert all(torch.equal(part.detach(), tensors[name]) for name, part in fresh.items())


@pytest.mark.parametrize("peft_type", ["DORA", "LOHA", "LOKR"])
def test_kohyas_form_of_the_other_kinds_holds_the_same_tensors(single: Made, peft_type: Any) -> None:
    """Flat names, lora_down and lora_up; the rest as in ComfyUI's form."""
    settings = config(single[0], lora_alpha=6.0, peft_type=peft_type)
    _, tensors = trained_model(single, settings)
    comfy, kohya = (formatted(tensors, settings, single[1], form) for form in ("COMFY_LORA", "KOHYA_LORA"))
    assert len(kohya) == len(comfy)
    for key, value in comfy.items():
        stem, _, part = key.removeprefix("diffusion_model.").removesuffix(".weight").rpartition(".")
        part = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}.get(part, part)
        assert torch.equal(kohya[f"lora_unet_{stem.replace('.', '_')}.{part}"], value)
    facts = describe(settings, single[1], "single", 1, "data")
    assert facts["ss_network_module"] == ("networks.lora" if peft_type == "DORA" else "lycoris.kohya")
    assert peft_type == "DORA" or json.loads(facts["ss_network_args"]) == {"algo": peft_type.lower()}


def test_a_pair_of_files_loads_into_both_experts_of_stock_diffusers(pair: Made, tmp_path: Path) -> None:
    """`load_into_transformer_2` takes the low-noise file; each expert then gives what it gave in training."""
    settings = config(pair[0], lora_alpha=6.0)
    run = make_run(tmp_path / "run", settings, pair[2])
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    experts = [WanTransformer3DModel.from_pretrained(pair[0] / part) for part in ("transformer", "transformer_2")]
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(),
                       transformer=experts[0], transformer_2=experts[1], boundary_ratio=0.875)  # fmt: skip
    wanted = []
    for number, expert in enumerate(("high_noise", "low_noise")):
        model = load_model(pair[1], expert, settings, CPU)
        tensors = add_adapter(model.transformer, settings, number)
        torch.manual_seed(number)
        for value in tensors.values():
            value.data += 0.2 * torch.randn_like(value)
        plain = {name: value.detach() for name, value in tensors.items()}
        (path,) = write_result(tmp_path, "a", (run, expert, "COMFY_LORA"), plain, {"format": "pt"})
        assert path.name == f"a_{expert}.safetensors"
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name=expert,
                               load_into_transformer_2=bool(number))  # fmt: skip
        wanted.append(ours(model))
    for transformer, output in zip(experts, wanted, strict=True):
        torch.testing.assert_close(stock(transformer), output, rtol=1e-5, atol=1e-5)
