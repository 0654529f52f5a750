"""Laws of loading into a storage dtype: the result, its memory, and what is saved beside the model."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from shared.errors import ModelError
from shared.models import SPECS, ModelSpec, model_spec
from shared.names import original_name
from shared.weights import load_transformer
from tests.shared.originals import fp8_scaled, save, save_dit
from train.load import PIECE, SAVED, load_quantized
from train.quantize import frozen_linears, store

SIZES = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16, "text_dim": 32,
         "freq_dim": 32, "ffn_dim": 160, "num_layers": 2}  # fmt: skip


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    torch.manual_seed(0)
    WanTransformer3DModel(**SIZES).save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    return replace(SPECS["ti2v-5b"], repo=str(tmp_path))


@pytest.mark.parametrize("dtype", ["FLOAT_32", "BFLOAT_16", "FLOAT_8", "INT_8", "NFLOAT_4"])
def test_the_result_is_that_of_loading_then_quantising(spec: ModelSpec, dtype: str) -> None:
    loaded = load_quantized(spec, "single", dtype)
    exact = load_transformer(spec, "single", torch.float32)
    rounded = load_transformer(spec, "single", torch.bfloat16).state_dict()
    linears = {name for name, _ in frozen_linears(exact)} if dtype != "BFLOAT_16" else set()
    expected = {name: part for name, part in rounded.items() if name.removesuffix(".weight") not in linears}
    for name in linears:
        codes, scale = store(exact.get_submodule(name).weight, dtype)
        expected |= {f"{name}.codes": codes, f"{name}.scale": scale}
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == part.dtype and torch.equal(found[name], part) for name, part in expected.items())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())


def test_the_second_start_maps_what_the_first_saved(spec: ModelSpec) -> None:
    first = load_quantized(spec, "single", "NFLOAT_4", save_above=0)
    (saved,) = Path(spec.repo, SAVED).glob("*.safetensors")
    written = saved.stat().st_mtime_ns
    weights = list(Path(spec.repo, "transformer").glob("*.safetensors"))
    stats = {path: path.stat() for path in weights}
    for path in weights:  # the second start does not read them: same size and time, other bytes
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(stats[path].st_atime_ns, stats[path].st_mtime_ns))
    second = load_quantized(spec, "single", "NFLOAT_4", save_above=0)
    assert saved.stat().st_mtime_ns == written
    ours, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_weights_take_the_place_of_saved_ones(spec: ModelSpec) -> None:
    load_quantized(spec, "single", "FLOAT_8", save_above=0)
    torch.manual_seed(1)
    shutil.rmtree(Path(spec.repo, "transformer"))
    WanTransformer3DModel(**SIZES).save_pretrained(Path(spec.repo, "transformer"))
    changed = load_quantized(spec, "single", "FLOAT_8", save_above=0)
    fresh = load_quantized(spec, "single", "FLOAT_8")
    assert torch.equal(
        changed.blocks[0].ffn.net[2].codes.view(torch.uint8), fresh.blocks[0].ffn.net[2].codes.view(torch.uint8)
    )
    assert len(list(Path(spec.repo, SAVED).glob("*.safetensors"))) == 1


def test_saved_weights_cut_short_are_made_again(spec: ModelSpec) -> None:
    load_quantized(spec, "single", "INT_8", save_above=0)
    (saved,) = Path(spec.repo, SAVED).glob("*.safetensors")
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-100])
    load_quantized(spec, "single", "INT_8", save_above=0)
    assert saved.read_bytes() == whole


def test_damaged_and_incomplete_models_are_refused(spec: ModelSpec) -> None:
    first, *rest = sorted(Path(spec.repo, "transformer").glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-8])
    with pytest.raises(ModelError, match="damaged"):
        load_quantized(spec, "single", "FLOAT_8")
    first.unlink()
    with pytest.raises(ModelError, match="does not hold the weights"):
        load_quantized(spec, "single", "FLOAT_8")
    for path in rest:
        path.unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        load_quantized(spec, "single", "FLOAT_8")


MEASURE = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from shared.models import SPECS
from train.load import load_quantized

def memory(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)

torch.nn.Linear(8, 8)(torch.ones(1, 8))
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load_quantized(replace(SPECS["ti2v-5b"], repo=sys.argv[1]), "single", "INT_8", save_above=0)
stored = sum(part.nbytes for part in model.state_dict().values())
print(memory("VmHWM") * 1024 - before * 1024, stored)
"""


def test_peak_beyond_the_stored_bytes_is_that_of_the_rows_read_at_a_time(tmp_path: Path) -> None:
    sizes = SIZES | {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 6}
    with torch.device("meta"):
        shapes = {name: part.shape for name, part in WanTransformer3DModel(**sizes).state_dict().items()}
        WanTransformer3DModel(**sizes).save_config(tmp_path / "transformer")
    total = sum(shape.numel() * 4 for shape in shapes.values())
    save_file({name: torch.full(shape, 0.5) for name, shape in shapes.items()}, tmp_path / "transformer/a.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    peak, stored = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    # rows of PIECE float32 weights are mapped at a time, whatever the size of the model: 64 MiB here (37 measured), of
    # a full-size ti2v-5b 80 MiB were measured; the A14B's largest matrix alone has 283 MB
    assert peak - stored < 4 * PIECE < total / 3


def test_weights_of_another_shape_are_refused_before_any_is_read(spec: ModelSpec) -> None:
    folder = Path(spec.repo, "transformer")
    shutil.rmtree(folder)
    WanTransformer3DModel(**SIZES | {"ffn_dim": 96}).save_pretrained(folder)
    WanTransformer3DModel(**SIZES).save_config(folder)
    with pytest.raises(ModelError, match=r"config\.json: 6 differ, such as blocks\.0\.ffn\.net\.0\.proj\.bias"):
        load_quantized(spec, "single", "FLOAT_8")


@pytest.mark.parametrize("dtype", ["BFLOAT_16", "FLOAT_8", "NFLOAT_4"])
def test_a_single_file_is_stored_as_the_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Original names, bf16 or scaled fp8: what is stored is the folder's weight, or codes times scale."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES | {"num_attention_heads": 1, "attention_head_dim": 128}).bfloat16()
    file = save_dit(tmp_path / "dit.safetensors", model)
    model.save_pretrained(tmp_path / "folder" / "transformer")
    wanted = load_quantized(replace(SPECS["ti2v-5b"], repo=str(tmp_path / "folder")), "single", dtype).state_dict()
    found = load_quantized(model_spec(str(file)), "single", dtype, save_above=0).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(plain(found[name]), plain(wanted[name])) for name in wanted)
    scaled = fp8_scaled({original_name(name): part for name, part in model.state_dict().items()})
    save(scaled, tmp_path / "scaled.safetensors")
    product = scaled["blocks.1.ffn.0.weight"].float() * scaled["blocks.1.ffn.0.scale_weight"]
    found = load_quantized(model_spec(str(tmp_path / "scaled.safetensors")), "single", dtype).state_dict()
    name = "blocks.1.ffn.net.0.proj"
    if dtype == "BFLOAT_16":
        assert torch.equal(found[f"{name}.weight"], product.bfloat16())
    else:
        assert torch.equal(plain(found[f"{name}.codes"]), plain(store(product, dtype).codes))


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
