"""Compiled blocks: the numbers of uncompiled ones, with LoRA, checkpoints, streaming; a failure changes nothing."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from train.compiled import CompiledBlock
from train.lean import LeanOptions, Text, block_forward, lean_forward
from train.memory import Placement
from train.offload import BlockRunner, place
from train.quantize import quantize_blocks

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": 16,
         "freq_dim": 16, "ffn_dim": 32, "num_layers": 3}  # fmt: skip


def gradients(compiled: Any, dtype: str, placement: Placement, rows: tuple[int, ...] = (6,)) -> list[Tensor]:
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SIZES).requires_grad_(False)
    quantize_blocks(model, dtype)
    runner: BlockRunner = place(model, placement, parked=False, device=torch.device("cpu"))
    runner.forward = compiled or runner.forward
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), model)
    for count in rows:
        latent, text = torch.randn(1, 16, 2, 4, 4), Text(torch.randn(1, count, 24), torch.zeros(1, 1, 1, count))
        options = LeanOptions(run_block=runner)
        lean_forward(model, latent, torch.tensor([300.0]), text, options=options).square().mean().backward()
    return [part.grad for part in model.parameters() if part.grad is not None]


@pytest.mark.filterwarnings("ignore")  # errors, as they are in the tests, would stop the compiler
@pytest.mark.parametrize(("dtype", "placement"), [("FLOAT_8", Placement(2, 3))], ids=str)
def test_compiled_streamed_and_checkpointed_blocks_give_the_same_gradients(dtype: str, placement: Placement) -> None:
    compiled = CompiledBlock("aot_eager")  # traced and differentiated as a whole; kernels are the usual ones
    ours = gradients(compiled, dtype, placement)
    assert compiled.run is not block_forward, "it fell back to uncompiled blocks"
    for left, right in zip(ours, gradients(None, dtype, placement), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_where_compiling_fails_the_run_goes_on_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def no_compiler(*_: Any) -> Any:
        raise OSError("no C++ compiler")

    compiled = CompiledBlock(no_compiler)
    ours = gradients(compiled, "FLOAT_32", Placement(0, 0))
    assert capsys.readouterr().err.count("goes on uncompiled") == 1
    expected = gradients(None, "FLOAT_32", Placement(0, 0))
    assert all(torch.equal(left, right) for left, right in zip(ours, expected, strict=True))


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("placement", [Placement(0, 0), Placement(2, 3)], ids=str)
def test_kernels_made_by_the_compiler_give_the_same_gradients(placement: Placement) -> None:
    compiled = CompiledBlock()
    ours = gradients(compiled, "FLOAT_32", placement, rows=(6, 9, 7))
    assert compiled.run is not block_forward
    for left, right in zip(ours, gradients(None, "FLOAT_32", placement, rows=(6, 9, 7)), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
