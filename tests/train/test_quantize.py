"""Laws of stored weights: exact codes, bounded errors, nothing kept by autograd, adapters untouched."""

import copy
from typing import get_args

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from shared.codes import NF4_TABLE, to_nf4
from shared.config import StorageDtype
from shared.errors import ModelError
from train.quantize import (
    QuantizedLinear,
    frozen_linears,
    quantize_blocks,
    quantized,
    restore,
    store,
    stored_bytes,
)

COMPRESSED = ("FLOAT_8", "INT_8", "NFLOAT_4")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
SIZES = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16, "out_channels": 16, "text_dim": 32,
         "freq_dim": 32, "ffn_dim": 160, "num_layers": 2}  # fmt: skip


def dit(dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**SIZES).requires_grad_(False).to(dtype)


def velocity(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = model.patch_embedding.weight.dtype
    latent = torch.randn(1, 16, 3, 8, 8, generator=generator).to(dtype)
    text = torch.randn(1, 20, 32, generator=generator).to(dtype)
    return model(latent, torch.tensor([500.0]), text).sample


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.float() - reference.float()).norm() / reference.float().norm())


def layer(dtype: str, outputs: int = 96, inputs: int = 128) -> tuple[nn.Linear, QuantizedLinear]:
    torch.manual_seed(2)
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    return linear, quantized(linear, dtype)


def test_nf4_is_the_nearest_table_value_of_each_blocks_largest_magnitude() -> None:
    torch.manual_seed(3)
    weight = torch.randn(64, 128)
    codes, scale = store(weight, "NFLOAT_4")
    blocks = weight.reshape(-1, 64)
    assert torch.equal(scale, blocks.abs().amax(1))
    nearest = (blocks / scale[:, None]).unsqueeze(-1).sub(torch.tensor(NF4_TABLE)).abs().argmin(-1).flatten()
    assert torch.equal(codes, (nearest[0::2] * 16 + nearest[1::2]).to(torch.uint8))


@pytest.mark.parametrize("shape", [(64, 128), (5, 64), (96, 192)])
def test_nf4_codes_scales_and_values_equal_bitsandbytes(shape: tuple[int, int]) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(4)
    weight = torch.randn(shape).bfloat16()
    weight[0, :64] = 0
    theirs, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    ours = quantized(linear, "NFLOAT_4")
    assert torch.equal(ours.codes, theirs.flatten())
    assert torch.equal(ours.scale, state.absmax)
    assert torch.equal(restore(ours, torch.bfloat16), dequantize_4bit(theirs, state))


def test_a_weight_between_two_nf4_values_gets_the_lower_one() -> None:
    from bitsandbytes.functional import quantize_4bit

    table, weight = torch.tensor(NF4_TABLE), torch.zeros(1, 64)
    weight[0, 0], weight[0, 1:16] = 1, (table[:-1] + table[1:]) / 2
    bytes_of = to_nf4(weight).codes
    assert torch.stack([bytes_of >> 4, bytes_of & 15], 1).flatten()[:16].tolist() == [15, *range(15)]
    assert torch.equal(bytes_of, quantize_4bit(weight, quant_type="nf4", blocksize=64)[0].flatten())


@pytest.mark.parametrize(("dtype", "largest"), [("FLOAT_8", 448.0), ("INT_8", 127.0)])
def test_the_largest_weight_of_each_row_has_the_largest_code(dtype: StorageDtype, largest: float) -> None:
    codes = store(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), dtype).codes
    assert codes.float().abs().amax(1).tolist() == [largest] * 5


@pytest.mark.parametrize(("dtype", "bound"), [("FLOAT_8", 2**-4), ("INT_8", 0.5 / 127)])
def test_scaled_codes_err_by_at_most_half_a_step(dtype: str, bound: float) -> None:
    linear, stored = layer(dtype)
    error = (restore(stored, torch.float32) - linear.weight).abs()
    largest = linear.weight.abs().amax(1, keepdim=True)
    # e4m3: half a step is 2^-4 of the value, and 2^-10 of the scale below its smallest normal number
    allowed = linear.weight.abs() * bound + largest * 2**-10 / 448 if dtype == "FLOAT_8" else largest * bound
    assert bool((error <= allowed * 1.001).all())


@pytest.mark.parametrize("dtype", get_args(StorageDtype))
def test_size_is_as_stated_also_when_blocks_do_not_divide_it(dtype: str) -> None:
    for shape in ((96, 128), (3, 20), (129, 36)):
        _, stored = layer(dtype, *shape)
        assert stored.codes.nbytes + stored.scale.nbytes == stored_bytes(shape, dtype)
        assert restore(stored, torch.float32).shape == shape


@pytest.mark.parametrize("dtype", get_args(StorageDtype))
def test_forward_and_backward_are_those_of_the_decoded_weight(dtype: str) -> None:
    linear, stored = layer(dtype)
    linear.weight.copy_(restore(stored, torch.float32))
    grads = []
    for module in (linear, stored):
        x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(5), requires_grad=True)
        output = module(x)
        output.square().sum().backward()
        grads.append((output, x.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", COMPRESSED)
def test_autograd_keeps_no_decoded_weight(dtype: str) -> None:
    _, stored = layer(dtype)
    kept: list[Tensor] = []
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        stored(x)
    own = {stored.codes.data_ptr(), stored.scale.data_ptr()}
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= own


@pytest.mark.parametrize("dtype", get_args(StorageDtype))
def test_only_the_weights_of_block_linears_change(dtype: str) -> None:
    model = dit()
    before = copy.deepcopy(model.state_dict())
    linears = {f"{name}.weight" for name, _ in frozen_linears(model)}
    assert len(linears) == 20
    quantize_blocks(model, dtype)
    after = model.state_dict()
    expected = set(before) - linears if dtype != "FLOAT_32" else set(before)
    assert expected == {name for name in after if not name.endswith((".codes", ".scale"))}
    assert all(torch.equal(after[name], before[name]) for name in expected)


def test_moving_the_model_to_another_dtype_does_not_touch_what_is_stored() -> None:
    for dtype in get_args(StorageDtype):
        _, stored = layer(dtype)
        before = restore(stored, torch.float32)
        stored.to(torch.bfloat16)
        assert stored.bias.dtype == torch.bfloat16
        assert torch.equal(restore(stored, torch.float32), before)


@pytest.mark.parametrize("dtype", get_args(StorageDtype))
@pytest.mark.parametrize("first", ["adapter", "storage"])
def test_adapters_are_float32_peft_layers_whichever_comes_first(dtype: str, first: str) -> None:
    models = [dit(torch.bfloat16), dit(torch.bfloat16)]
    for model, order in zip(models, (first, "reference"), strict=True):
        if order == "storage":
            quantize_blocks(model, dtype)
        torch.manual_seed(6)
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        if order == "adapter":
            quantize_blocks(model, dtype)
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    assert len(trained[0]) == 40
    # peft rounds the start of an adapter to the dtype of a plain linear layer; beside a stored weight it stays float32
    assert all(torch.equal(trained[0][name].bfloat16(), trained[1][name].bfloat16()) for name in trained[1])
    assert {p.dtype for p in trained[0].values()} == {torch.float32}
    assert type(models[0].blocks[0].attn1.to_q) is LoraLinear
    assert dtype == "BFLOAT_16" or isinstance(models[0].blocks[0].attn1.to_q.base_layer, QuantizedLinear)
    with torch.autocast("cpu", torch.bfloat16):
        loss = velocity(models[0]).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained[0].values())
    assert all(bool(p.grad.any()) for n, p in trained[0].items() if "lora_B" in n)


def test_dora_reads_the_decoded_weight_and_merging_into_it_is_refused() -> None:
    model = dit()
    quantize_blocks(model, "NFLOAT_4")
    model.add_adapter(LoraConfig(r=4, target_modules=["attn1.to_q"], use_dora=True))
    wrapped = model.blocks[0].attn1.to_q
    norms = restore(wrapped.base_layer, torch.float32).norm(dim=1)
    torch.testing.assert_close(wrapped.lora_magnitude_vector["default"].weight, norms)
    plain = dit()
    quantize_blocks(plain, "FLOAT_8")
    plain.add_adapter(LoraConfig(r=4, target_modules=["attn1.to_q"]))
    with pytest.raises(ModelError, match="merge adapters"):
        plain.blocks[0].attn1.to_q.merge()


# Relative error of one forward against the same weights unquantised: random weights of this small DiT, bfloat16
BOUNDS = {"FLOAT_32": 0.0, "BFLOAT_16": 0.0, "FLOAT_16": 1e-4, "FLOAT_8": 0.011, "INT_8": 0.006, "NFLOAT_4": 0.028}


@pytest.mark.parametrize("dtype", get_args(StorageDtype))
def test_error_of_the_whole_model_is_bounded(dtype: str) -> None:
    model = dit(torch.bfloat16)
    with torch.no_grad():
        reference = velocity(model)
        quantize_blocks(model, dtype)
        error = relative(velocity(model), reference)
    assert error <= BOUNDS[dtype]


def test_a_damaged_weight_is_refused_by_name() -> None:
    for dtype in COMPRESSED:
        model = dit()
        model.blocks[1].ffn.net[2].weight[3, 4] = torch.nan
        with pytest.raises(ModelError, match=r"blocks\.1\.ffn\.net\.2"):
            quantize_blocks(model, dtype)
