"""Single files of original keys are the model they were made from: weights bit for bit, facts, and clear refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from shared.errors import ModelError
from shared.models import SPECS, TINY_FOLDER, WAN21_VAE, ModelSpec, model_spec
from shared.names import diffusers_name, original_name, vae_renamer
from shared.resolve import Choice, resolve
from shared.single_file import dit_config, dit_files, vae_config
from shared.tensors import places_of, read
from shared.tiny_variants import VAE_21, VAE_22
from shared.weights import (
    TEXT_HOME,
    VAE_HOMES,
    home_of,
    load_text_encoder,
    load_transformer,
    load_vae,
    model_folder,
    weights_fingerprint,
    with_parts,
)
from tests.shared.originals import fp8_scaled, names_of_vae, save, save_dit, save_text, save_vae

# one head of 128, as only real Wans have heads whose size no shape tells
DIT = {"num_attention_heads": 1, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 64,
       "freq_dim": 32, "ffn_dim": 64, "num_layers": 2}  # fmt: skip
# the sizes of the published VAEs (scripts/convert_wan_to_diffusers.py)
REAL_21: dict[str, Any] = {}
REAL_22 = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
           "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}  # fmt: skip


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links go to a store of their own, and nothing is downloaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def dit(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**DIT | changes)


def folder_spec(folder: Path, model: WanTransformer3DModel) -> ModelSpec:
    model.save_pretrained(folder / "transformer")
    return replace(SPECS["t2v-1.3b"], repo=str(folder))


def same(ours: Any, theirs: Any) -> bool:
    left, right = ours.state_dict(), theirs.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_file_loads_as_the_folder_does(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    model = dit()
    file = save_dit(tmp_path / "a" / "dit.safetensors", model, prefix)
    spec = model_spec(str(file))
    ours = load_transformer(spec, "single", dtype)
    theirs = WanTransformer3DModel.from_pretrained(folder_spec(tmp_path / "b", model).repo, subfolder="transformer",
                                                   torch_dtype=dtype)  # fmt: skip
    assert same(ours, theirs)
    left, right = json.loads(ours.to_json_string()), json.loads(theirs.to_json_string())
    assert {key: right[key] for key in left} == left


def test_names_are_those_of_diffusers_own_converter() -> None:
    for name in ("t2v-a14b", "i2v-a14b", "ti2v-5b"):
        spec = SPECS[name]
        with torch.device("meta"):
            model = dit(num_attention_heads=spec.heads, ffn_dim=spec.ffn_dim, num_layers=spec.num_layers,
                        in_channels=spec.in_channels, out_channels=spec.vae.channels)  # fmt: skip
        names = list(model.state_dict())
        original = {original_name(key): key for key in names}
        assert len(original) == len(names)
        assert convert_wan_transformer_to_diffusers(dict(original)) == {key: key for key in names}
        assert [diffusers_name(key) for key in original] == names == [diffusers_name(key) for key in names]


def test_every_weight_of_the_published_vaes_has_its_name() -> None:
    for sizes in (REAL_21, REAL_22, VAE_21, VAE_22):
        with torch.device("meta"):
            vae = AutoencoderKLWan(**sizes)
        names = names_of_vae(vae)
        rename = vae_renamer(set(names))
        assert sorted(map(rename, names)) == sorted(vae.state_dict())
        if sizes == REAL_21:
            assert convert_wan_vae_to_diffusers({name: rename(name) for name in names}) == {
                rename(name): rename(name) for name in names
            }


@pytest.mark.parametrize("sizes", [VAE_21, VAE_22], ids=["2.1", "2.2"])
def test_a_vae_file_loads_as_the_folder_does(tmp_path: Path, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**sizes)
    file = save_vae(tmp_path / "vae.safetensors", vae)
    config = vae_config(file)
    wanted = dict(vae.config)
    told = {key: value for key, value in config.items() if key in wanted and key != "decoder_base_dim"}
    assert told == {key: wanted[key] for key in told} and {"dim_mult", "num_res_blocks", "patch_size"} <= told.keys()
    spec = SPECS["ti2v-5b"] if sizes["z_dim"] == 48 else SPECS["t2v-a14b"]
    loaded = load_vae(with_parts(spec, str(file), None), torch.float32)
    assert same(loaded, vae)
    assert (tuple(loaded.config.latents_mean), tuple(loaded.config.latents_std)) == (spec.vae.mean, spec.vae.std)
    with pytest.raises(ModelError, match="channels"):
        with_parts(SPECS["t2v-a14b"] if sizes["z_dim"] == 48 else SPECS["ti2v-5b"], str(file), None)


def test_scaled_fp8_is_the_product_of_codes_and_scale(tmp_path: Path) -> None:
    """Both spellings of ComfyUI's files; unscaled fp8 is its own value."""
    state = {original_name(name): part for name, part in dit().state_dict().items()}
    for ends in (("scale_weight", "scaled_fp8"), ("weight_scale", "x.input_scale")):
        file, codes = tmp_path / f"{ends[0]}.safetensors", fp8_scaled(state, ends)
        save(codes, file)
        loaded = load_transformer(model_spec(str(file)), "single", torch.float32).state_dict()
        for name, part in codes.items():
            if (scale := codes.get(f"{name.removesuffix('weight')}{ends[0]}")) is not None:
                assert torch.equal(loaded[diffusers_name(name)], part.float() * scale)
            elif name in state:
                assert torch.equal(loaded[diffusers_name(name)], part)
    save_dit(tmp_path / "plain.safetensors", dit(), dtype=torch.float8_e4m3fn)
    plain = load_transformer(model_spec(str(tmp_path / "plain.safetensors")), "single", torch.float32)
    name = "blocks.0.ffn.net.2.weight"
    assert torch.equal(plain.state_dict()[name], dit().state_dict()[name].to(torch.float8_e4m3fn).float())


def test_rows_of_a_weight_are_rows_of_the_whole(tmp_path: Path) -> None:
    scale = torch.rand(6) + 0.5
    codes = torch.randn(6, 4).to(torch.float8_e4m3fn)
    save({"a.weight": codes, "a.weight_scale": scale, "b.weight": codes.float()}, tmp_path / "x.safetensors")
    places = places_of(tmp_path / "x.safetensors", lambda _: str)
    for place in places.values():
        assert torch.equal(read(place)[2:5], read(place, slice(2, 5)))
    assert torch.equal(read(places["a.weight"]), codes.float() * scale[:, None])


def test_a_pair_of_files_is_a_model_of_two_experts(tmp_path: Path) -> None:
    high, low = (save_dit(tmp_path / f"wan_{name}_noise.safetensors", dit(seed))
                 for seed, name in enumerate(("high", "low")))  # fmt: skip
    spec = model_spec(f"{high},{low}")
    assert (spec.experts, spec.boundary, spec.vae) == (("high_noise", "low_noise"), 0.875, WAN21_VAE)
    assert same(load_transformer(spec, "high_noise", torch.float32), dit(0))
    assert same(load_transformer(spec, "low_noise", torch.float32), dit(1))
    assert model_spec(str(low)) == spec, "one of a pair, by its name, stands for both"
    with pytest.raises(ModelError, match="high-noise file comes first"):
        model_spec(f"{low},{high}")
    low.unlink()
    with pytest.raises(ModelError, match=r"low_noise\.safetensors is missing"):
        model_spec(str(high))


def test_the_facts_of_the_real_files_are_read_off_their_shapes(tmp_path: Path) -> None:
    """A14B's and 5B's widths, in a file of one block, with in_channels 36 and 48."""
    for name in ("i2v-a14b", "ti2v-5b"):
        known = SPECS[name]
        with torch.device("meta"):
            model = dit(num_attention_heads=known.heads, in_channels=known.in_channels, ffn_dim=known.ffn_dim,
                        out_channels=known.vae.channels, text_dim=4096, num_layers=1)  # fmt: skip
        shapes = {original_name(key): part.shape for key, part in model.state_dict().items()}
        files = [tmp_path / f"{name}_{expert}.safetensors" for expert in ("high_noise", "low_noise")]
        for file in files:
            sparse(file, shapes)
        spec = model_spec(str(files[0])) if known.boundary else model_spec(str(files[0]).replace("_high_noise", ""))
        for key in ("name", "heads", "in_channels", "vae", "boundary", "image_condition", "fps", "guidance"):
            assert getattr(spec, key) == getattr(known, key), key


def sparse(path: Path, shapes: dict[str, Any]) -> None:
    """A safetensors file of zeros that takes no room on the disk."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * 2
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    for target in (path, path.with_name(path.name.replace("_high_noise", "").replace("_low_noise", ""))):
        with target.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)


def test_a_text_encoder_file_is_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = UMT5Config(vocab_size=50, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
                       feed_forward_proj="gated-gelu", tie_word_embeddings=False)  # fmt: skip
    encoder = UMT5EncoderModel(sizes).eval()
    tokens = torch.tensor([[3, 7, 9, 1]])
    wanted = encoder(tokens).last_hidden_state
    for scaled in (False, True):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        for path in (TINY_FOLDER / "tokenizer").iterdir():
            (tmp_path / "tokenizer" / path.name).write_bytes(path.read_bytes())
        file = save_text(tmp_path / f"umt5{scaled}.safetensors", encoder, scaled)
        spec = with_parts(model_spec("tiny"), None, str(file))
        tokenizer, loaded = load_text_encoder(spec, torch.float32)
        found = loaded(tokens).last_hidden_state
        assert same(loaded, encoder) is not scaled
        limit = 0.2 if scaled else 1e-5
        torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
        assert tokenizer("a").input_ids[-1] == 1
    codes, name = load_file(file), "encoder.block.1.layer.0.SelfAttention.q"
    product = codes[f"{name}.weight"].float() * codes[f"{name}.scale_weight"]
    assert torch.equal(loaded.state_dict()[f"{name}.weight"], product)


def test_a_text_encoder_with_wans_own_names_is_the_same(tmp_path: Path) -> None:
    """Names as wan/modules/t5.py has them: gate is the half with the activation."""
    own = {"SelfAttention.relative_attention_bias": "pos_embedding.embedding", "layer.0.layer_norm": "norm1",
           "layer.1.layer_norm": "norm2", "DenseReluDense.wi_0": "ffn.gate.0", "DenseReluDense.wi_1": "ffn.fc1",
           "DenseReluDense.wo": "ffn.fc2", **{f"SelfAttention.{name}": f"attn.{name}" for name in "qkvo"}}  # fmt: skip
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=60, d_model=64, d_kv=8, d_ff=8, num_layers=2, num_heads=2,
                                          feed_forward_proj="gated-gelu")).eval()  # fmt: skip
    state = {"token_embedding.weight": encoder.shared.weight, "norm.weight": encoder.encoder.final_layer_norm.weight}
    for number, block in enumerate(encoder.encoder.block):
        for name, part in block.state_dict().items():
            theirs = next(new for old, new in own.items() if old in name)
            state[f"blocks.{number}.{theirs}.weight"] = part
    save(state, tmp_path / "umt5-xxl-enc-bf16.safetensors")
    (tmp_path / "tokenizer").symlink_to(TINY_FOLDER / "tokenizer")
    spec = with_parts(model_spec("tiny"), None, str(tmp_path / "umt5-xxl-enc-bf16.safetensors"))
    assert same(load_text_encoder(spec, torch.float32)[1], encoder)


def test_the_tokenizer_inside_a_text_encoder_file_gives_sentencepieces_ids(tmp_path: Path) -> None:
    corpus = "a red ball rolls over the green grass\na dog runs after a ball\nthe zorb turns slowly in the rain\n" * 5
    (tmp_path / "corpus.txt").write_text(corpus)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=31, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, model_type="unigram", minloglevel=2)  # fmt: skip
    model = (tmp_path / "spm.model").read_bytes()
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=31, d_model=64, d_kv=8, d_ff=8, num_layers=2, num_heads=2,
                                          feed_forward_proj="gated-gelu"))  # fmt: skip
    file = save_text(tmp_path / "files" / "umt5.safetensors", encoder, spiece=model)
    tokenizer, _ = load_text_encoder(with_parts(model_spec("tiny"), None, str(file)), torch.float32)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in ("a red ball", "the  zorb rolls", "grass in the rain, slowly"):
        assert tokenizer(text).input_ids == [*theirs.encode(text), 1]


def test_vae_and_text_encoder_are_found_where_comfyui_keeps_them(tmp_path: Path) -> None:
    """models/diffusion_models, models/vae, models/text_encoders; several that fit are refused by name."""
    file = save_dit(tmp_path / "diffusion_models" / "dit.safetensors", dit())
    spec = model_spec(str(file))
    assert (home_of(spec, "vae"), home_of(spec, "text_encoder")) == (VAE_HOMES[16], TEXT_HOME)
    vae = AutoencoderKLWan(**VAE_21)
    save_vae(tmp_path / "vae" / "one.safetensors", vae)
    save_vae(tmp_path / "vae" / "wan2.2.safetensors", AutoencoderKLWan(**VAE_22))
    assert same(load_vae(spec, torch.float32), vae)
    first = weights_fingerprint(model_folder(spec, ("vae",)) / "vae")
    (tmp_path / "vae" / "one.safetensors").rename(tmp_path / "vae" / "renamed.safetensors")
    assert weights_fingerprint(model_folder(spec, ("vae",)) / "vae") == first, "a file's name is not in its content"
    save_vae(tmp_path / "vae" / "two.safetensors", vae)
    with pytest.raises(ModelError, match=r"choose with vae\.model_name"):
        load_vae(spec, torch.float32)
    chosen = with_parts(spec, str(tmp_path / "vae" / "two.safetensors"), str(TINY_FOLDER))
    assert same(load_vae(chosen, torch.float32), vae)
    assert home_of(chosen, "tokenizer") == str(TINY_FOLDER)


def test_models_of_the_table_share_their_vae_and_text_encoder() -> None:
    for spec in SPECS.values():
        assert home_of(spec, "transformer") == spec.repo
        assert home_of(spec, "vae") == VAE_HOMES[spec.vae.channels] and home_of(spec, "tokenizer") == TEXT_HOME
    local = replace(SPECS["t2v-a14b"], repo="a/folder")
    assert {home_of(local, part) for part in ("vae", "text_encoder", "transformer")} == {"a/folder"}


def test_settings_name_files(tmp_path: Path) -> None:
    """The whole way: MODEL and SET to a spec; geometry needs nothing else."""
    file = save_dit(tmp_path / "dit.safetensors", dit())
    vae = save_vae(tmp_path / "elsewhere" / "vae.safetensors", AutoencoderKLWan(**VAE_21))
    resolved = resolve(Choice(preset="cpu", model=str(file), set=f"vae.model_name={vae}"), tmp_path / "none")
    assert resolved.spec.source == str(file) and resolved.spec.vae == WAN21_VAE
    assert (Path(resolved.spec.vae_repo) / "vae" / "config.json").is_file()


def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    def refused(match: str, tensors: dict[str, torch.Tensor], name: str = "x.safetensors") -> None:
        (tmp_path / name).unlink(missing_ok=True)
        save_file(tensors, tmp_path / name)
        with pytest.raises(ModelError, match=match):
            model_spec(str(tmp_path / name))

    state = {original_name(name): part.clone() for name, part in dit().state_dict().items()}
    refused("no Wan DiT", {"a.weight": torch.zeros(2)})
    refused("is an adapter", {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(2)})
    refused("VACE cannot be trained", state | {"vace_blocks.0.ffn.0.weight": torch.zeros(2)})
    refused("Wan 2.1 I2V", state | {"img_emb.proj.0.weight": torch.zeros(2)})
    refused("stored as U8", state | {"blocks.0.ffn.0.weight": torch.zeros(2, dtype=torch.uint8)})
    mark = torch.frombuffer(bytearray(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    refused("quantised as mxfp8", state | {"blocks.0.ffn.0.comfy_quant": mark})
    wide = state | {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}
    refused("one expert of I2V-A14B", wide)
    less = {name: part for name, part in state.items() if name != "blocks.1.cross_attn.q.bias"}
    save_file(less, tmp_path / "less.safetensors")
    with pytest.raises(ModelError, match=r"1 differ, such as blocks\.1\.attn2\.to_q\.bias"):
        load_transformer(model_spec(str(tmp_path / "less.safetensors")), "single", torch.float32)
    for name, match in (("wan.gguf", "GGUF"), ("vae.pth", "pickle"), ("no.safetensors", "no such file")):
        with pytest.raises(ModelError, match=match):
            model_spec(name)
    whole = (tmp_path / "less.safetensors").read_bytes()
    for cut in (whole[:-8], whole[:5], b"x" * 100):
        (tmp_path / "less.safetensors").write_bytes(cut)
        with pytest.raises(ModelError, match="damaged"):
            dit_config(tmp_path / "less.safetensors")
    with pytest.raises(ModelError, match="one file, or two"):
        dit_files(",".join([str(tmp_path / "x.safetensors")] * 3))
    with pytest.raises(ModelError, match=r"neither a \.safetensors file"):
        with_parts(SPECS["ti2v-5b"], "nowhere", None)


def test_a_file_says_its_config_where_shapes_do_not(tmp_path: Path) -> None:
    """Head size 12 is in no shape; files written here carry it in their metadata."""
    model = dit(num_attention_heads=2, attention_head_dim=12)
    named = {original_name(name): part.clone() for name, part in model.state_dict().items()}
    save_file(named, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="no multiple of 128"):
        model_spec(str(tmp_path / "a.safetensors"))
    save_file(
        named,
        tmp_path / "b.safetensors",
        {"transformer_config": '{"attention_head_dim": 12, "num_attention_heads": 2}'},
    )
    assert same(load_transformer(model_spec(str(tmp_path / "b.safetensors")), "single", torch.float32), model)


def test_a_hub_id_outside_the_table_is_known_by_its_config_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found in the Hub's cache on this disk; a name that is nowhere is told both ways out."""
    folder, commit = tmp_path / "hub" / "models--someone--Wan-bf16", "0" * 40
    snapshot = folder / "snapshots" / commit
    dit(num_attention_heads=24, in_channels=48, out_channels=48, num_layers=1).save_config(snapshot / "transformer")
    (snapshot / "vae").mkdir()
    (snapshot / "vae" / "config.json").write_text('{"z_dim": 48, "scale_factor_spatial": 16}')
    (snapshot / "model_index.json").write_text('{"expand_timesteps": true}')
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    spec = model_spec("someone/Wan-bf16")
    assert (spec.name, spec.repo, spec.image_condition) == ("ti2v-5b", "someone/Wan-bf16", "first_frame")
    with pytest.raises(ModelError, match=r"no such folder here, and it cannot be downloaded"):
        model_spec("someone/Other")
