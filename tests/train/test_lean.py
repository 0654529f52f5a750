"""The lean forward equals stock diffusers and peft: output and gradients, every kind of model, every saving on or off.

Stock casts norms, residual sums and modulation to float32 even in a double model. The fixture `double_stock` makes
those casts leave float64 alone, so that the reference is exact and 1e-10 can be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor
from torch.testing import assert_close

from train.lean import (
    LeanOptions,
    Modulation,
    Places,
    Rope,
    Text,
    block_forward,
    collate_text,
    lean_forward,
    linears,
    project_text,
)

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
GRID = (3, 4, 6)  # latent frames, height, width: 18 tokens
TOKENS = 18
SAVINGS = pytest.mark.parametrize(
    ("collapse", "options"),
    [
        (True, LeanOptions()),
        (False, LeanOptions()),
        (True, LeanOptions(fuse_qkv=False)),
        (True, LeanOptions(checkpoint_blocks=1)),
        (True, LeanOptions(checkpoint_blocks=2)),
    ],
    ids=["all", "full-text", "unfused", "one-checkpointed", "checkpointed"],
)


class Case(NamedTuple):
    """A model kind: its inputs, and how its timesteps look to stock and to us."""

    model: WanTransformer3DModel
    latent_BCthw: Tensor
    stock_timestep: Tensor
    timestep_BK: Tensor
    places: Places
    embeddings: list[Tensor]


@pytest.fixture
def double_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    cast: Callable[[Tensor], Tensor] = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda self: self if self.dtype == torch.float64 else cast(self))


def make_case(kind: str, dtype: torch.dtype, lora: dict[str, Any] | None = None) -> Case:
    torch.manual_seed(0)
    channels = {"t2v": 16, "i2v": 36, "ti2v": 48}[kind]
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=64,
    ).to(dtype)
    if lora is not None:
        model.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=LORA_TARGETS, init_lora_weights=False, **lora))
    latent_BCthw = torch.randn(2, channels, *GRID, dtype=dtype)
    embeddings = [torch.randn(length, 32, dtype=dtype) for length in (5, 9)]
    time = torch.promote_types(dtype, torch.float32)
    if kind != "ti2v":
        timestep_B = torch.tensor([700.5, 311.0], dtype=time)
        return Case(model, latent_BCthw, timestep_B, timestep_B, Places(), embeddings)
    timestep_BK = torch.tensor([[0.0, 700.5], [0.0, 311.0]], dtype=time)
    token_timestep_N = (torch.arange(TOKENS) >= TOKENS // GRID[0]).long()  # the first latent frame is clean
    places = Places(token_timestep_N=token_timestep_N)
    return Case(model, latent_BCthw, timestep_BK[:, token_timestep_N], timestep_BK, places, embeddings)


def stock_output(case: Case) -> Tensor:
    padded = [torch.cat([text, text.new_zeros(512 - len(text), text.shape[1])]) for text in case.embeddings]
    output: Tensor = case.model(case.latent_BCthw, case.stock_timestep, torch.stack(padded)).sample
    return output


def lean_output(case: Case, options: LeanOptions, collapse: bool = True) -> Tensor:
    text = collate_text([project_text(case.model, text) for text in case.embeddings], collapse=collapse)
    return lean_forward(case.model, case.latent_BCthw, case.timestep_BK, text, case.places, options)


def trained(case: Case) -> Iterator[Tensor]:
    return (parameter for parameter in case.model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v"])
@SAVINGS
def test_output_equals_stock_in_float64(double_stock: None, kind: str, collapse: bool, options: LeanOptions) -> None:
    case = make_case(kind, torch.float64)
    assert_close(lean_output(case, options, collapse), stock_output(case), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v"])
@SAVINGS
@torch.no_grad()
def test_output_equals_stock_in_float32(kind: str, collapse: bool, options: LeanOptions) -> None:
    case = make_case(kind, torch.float32)
    assert_close(lean_output(case, options, collapse), stock_output(case), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v"])
@SAVINGS
def test_adapter_gradients_equal_stock(double_stock: None, kind: str, collapse: bool, options: LeanOptions) -> None:
    case = make_case(kind, torch.float64, lora={})
    stock = torch.autograd.grad(stock_output(case).square().mean(), list(trained(case)))
    ours = torch.autograd.grad(lean_output(case, options, collapse).square().mean(), list(trained(case)))
    assert len(ours) == 40
    for left, right in zip(ours, stock, strict=True):
        assert_close(left, right, rtol=1e-8, atol=1e-10)


def test_all_gradients_equal_stock_in_full_training(double_stock: None) -> None:
    case = make_case("ti2v", torch.float64)
    stock = torch.autograd.grad(stock_output(case).square().mean(), list(trained(case)))
    ours = torch.autograd.grad(lean_output(case, LeanOptions()).square().mean(), list(trained(case)))
    for left, right in zip(ours, stock, strict=True):
        assert_close(left, right, rtol=1e-8, atol=1e-10)


def test_float32_adapter_gradients_equal_stock() -> None:
    case = make_case("t2v", torch.float32, lora={})
    stock = torch.autograd.grad(stock_output(case).square().mean(), list(trained(case)))
    ours = torch.autograd.grad(lean_output(case, LeanOptions()).square().mean(), list(trained(case)))
    for left, right in zip(ours, stock, strict=True):
        assert_close(left, right, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_trimming_the_padding_instead_of_collapsing_it_is_wrong(double_stock: None) -> None:
    case = make_case("t2v", torch.float64)
    case = case._replace(embeddings=[text[:5] for text in case.embeddings])
    rows = torch.stack([project_text(case.model, text)[:-1] for text in case.embeddings])
    trimmed = lean_forward(case.model, case.latent_BCthw, case.timestep_BK, Text(rows, None))
    assert (trimmed - stock_output(case)).abs().max() > 1e-3


def test_adapter_dropout_draws_the_same_numbers_as_peft(double_stock: None) -> None:
    case = make_case("t2v", torch.float64, lora={"lora_dropout": 0.3})
    case.model.train()
    torch.manual_seed(1)
    expected = stock_output(case)
    torch.manual_seed(1)
    assert_close(lean_output(case, LeanOptions(), collapse=False), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_other_kinds_of_adapter_are_honoured(double_stock: None, lora: dict[str, Any]) -> None:
    case = make_case("t2v", torch.float64, lora=lora)
    assert_close(lean_output(case, LeanOptions()), stock_output(case), rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_merged_disabled_and_second_adapters_are_honoured(double_stock: None) -> None:
    case = make_case("t2v", torch.float64, lora={})
    case.model.disable_adapters()
    assert_close(lean_output(case, LeanOptions()), stock_output(case), rtol=0, atol=1e-10)
    case.model.enable_adapters()
    config = LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False)
    case.model.add_adapter(config, adapter_name="second")
    case.model.set_adapter(["default", "second"])
    assert_close(lean_output(case, LeanOptions()), stock_output(case), rtol=0, atol=1e-10)
    case.model.fuse_lora()
    assert_close(lean_output(case, LeanOptions()), stock_output(case), rtol=0, atol=1e-10)


def test_adapters_of_another_dtype_are_cast_down_and_trained_in_their_own() -> None:
    case = make_case("t2v", torch.float32, lora={})
    layer = case.model.blocks[0].attn1.to_q
    layer.base_layer.to(torch.bfloat16)
    (output,) = linears(torch.randn(1, 3, 24, dtype=torch.bfloat16), [layer])
    torch.autograd.backward(output.float().square().sum())
    assert output.dtype == torch.bfloat16
    assert layer.lora_A.default.weight.grad.dtype == torch.float32


@torch.no_grad()
def test_bfloat16_model_keeps_its_float32_parts_and_is_as_near_to_the_truth_as_stock() -> None:
    truth = stock_output(make_case("t2v", torch.float32))
    case = make_case("t2v", torch.float32)
    keep = tuple(case.model._keep_in_fp32_modules)
    for name, parameter in case.model.named_parameters():
        if not any(part in name for part in keep):
            parameter.data = parameter.data.bfloat16()
    case = case._replace(
        latent_BCthw=case.latent_BCthw.bfloat16(), embeddings=[text.bfloat16() for text in case.embeddings]
    )
    stock_error = (stock_output(case).float() - truth).abs().mean()
    ours = lean_output(case, LeanOptions())
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - truth).abs().mean() < 1.2 * stock_error


def test_half_precision_timesteps_are_refused() -> None:
    case = make_case("t2v", torch.float32)
    with pytest.raises(TypeError, match="999"):
        lean_output(case._replace(timestep_BK=case.timestep_BK.bfloat16()), LeanOptions())


def test_an_odd_latent_side_is_refused() -> None:
    case = make_case("t2v", torch.float32)
    with pytest.raises(ValueError, match="multiple of the patch"):
        lean_output(case._replace(latent_BCthw=case.latent_BCthw[..., :5]), LeanOptions())


@torch.no_grad()
def test_kept_frames_keep_their_rotary_positions() -> None:
    """Frame 0 alone is the same at its own position, and frames 0, 2 differ from frames 0, 1."""
    case = make_case("t2v", torch.float32)
    kept = case._replace(latent_BCthw=case.latent_BCthw[:, :, [0, 2]])
    plain = lean_output(kept, LeanOptions())
    same = lean_output(kept._replace(places=Places(frame_positions_t=[0, 1])), LeanOptions())
    apart = lean_output(kept._replace(places=Places(frame_positions_t=[0, 2])), LeanOptions())
    shifted = lean_output(kept._replace(places=Places(frame_positions_t=[3, 5])), LeanOptions())
    assert_close(same, plain, rtol=0, atol=0)
    assert (apart - plain).abs().max() > 1e-4
    assert_close(shifted, apart, rtol=0, atol=1e-5)  # rotary attention sees differences of positions only


@torch.no_grad()
def test_without_temporal_attention_frames_do_not_meet() -> None:
    case = make_case("t2v", torch.float32)
    options = LeanOptions(temporal_attention=False)
    whole = lean_output(case, options)
    alone = lean_output(case._replace(latent_BCthw=case.latent_BCthw[:, :, 1:2]), options)
    assert_close(whole[:, :, 1:2], alone, rtol=0, atol=1e-5)
    assert (whole - lean_output(case, LeanOptions())).abs().max() > 1e-4


def test_blocks_run_through_the_replacement() -> None:
    calls: list[Any] = []

    def run(block: Any, hidden: Tensor, text: Text, modulation: Modulation, rope: Rope, fuse: bool) -> Tensor:
        calls.append(block)
        return block_forward(block, hidden, text, modulation, rope, fuse)

    case = make_case("t2v", torch.float32)
    output = lean_output(case, LeanOptions(run_block=run))
    assert_close(output, lean_output(case, LeanOptions()), rtol=0, atol=0)
    assert calls == list(case.model.blocks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("real", [0, 1, 80, 511, 512])
def test_padding_bias_weighs_as_much_as_the_rows_it_stands_for(dtype: torch.dtype, real: int) -> None:
    text = collate_text([torch.zeros(real + 1, 8, dtype=dtype)])
    assert text.bias_B11S is not None
    weight = text.bias_B11S.double().exp()[..., real:].sum().item()
    assert math.isclose(weight, 512 - real, rel_tol=2e-4)


def test_padding_beyond_a_shorter_caption_is_shut_out() -> None:
    text = collate_text([torch.ones(3, 8), torch.ones(6, 8)])
    assert text.bias_B11S is not None
    assert text.rows_BSd.shape == (2, 6, 8)
    assert text.bias_B11S[0, 0, 0, 3:].isinf().all()
    assert text.rows_BSd[0, 3:].abs().sum() == 0
