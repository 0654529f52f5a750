"""Error of each storage dtype against bfloat16 weights, for one full-size block and for the whole stack of a model.

    python -m tests.bench.dtype_errors [--model ti2v-5b] [--blocks 30]

Random weights (normal, deviation 0.02), one block in memory at a time: each dtype carries its own hidden states from
block to block. Prints the relative error of the hidden states after each block. Cost: 15 s per block of ti2v-5b.
"""

import click
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from shared.models import SPECS, ModelSpec
from train.lean import Modulation, Rope, Text, block_forward
from train.load import dit_config
from train.quantize import frozen_linears, quantized, replace_module

DTYPES = ("FLOAT_8", "INT_8", "NFLOAT_4")
TOKENS, ROWS = 64, 48


def random_block(spec: ModelSpec, number: int) -> nn.Module:
    """A model of one block of full size, in bfloat16 but for what Wan keeps in float32."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**dit_config(spec) | {"num_layers": 1}).requires_grad_(False)
    model.blocks.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(number)
    for name, part in model.blocks.named_parameters():
        wide = any(kept in name for kept in model._keep_in_fp32_modules)
        part.data = torch.empty(part.shape, dtype=torch.float32 if wide else torch.bfloat16)
        if name.endswith("weight") and part.ndim == 1:
            part.data.fill_(1.0)
        else:
            part.data.normal_(0, 0.02, generator=generator)
    return model


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((value.float() - reference.float()).norm() / reference.float().norm())


@torch.no_grad()
def measure(spec: ModelSpec, blocks: int) -> None:
    """Print a line per block."""
    torch.manual_seed(0)
    text = Text(torch.randn(1, ROWS, spec.dim).bfloat16(), None)
    table = torch.ones(TOKENS, 1, spec.head_dim // 2)
    time = Modulation(torch.randn(1, 1, 6, spec.dim).bfloat16(), None)
    start = torch.randn(1, TOKENS, spec.dim).bfloat16()
    hidden = dict.fromkeys(("BFLOAT_16", *DTYPES), start)
    for number in range(blocks):
        model = random_block(spec, number)
        linears = frozen_linears(model)
        for dtype in hidden:
            for name, linear in linears if dtype != "BFLOAT_16" else ():
                replace_module(model, name, quantized(linear, dtype, name))  # type: ignore[arg-type]
            block = model.blocks[0]  # type: ignore[index]
            hidden[dtype] = block_forward(
                block, hidden[dtype], text, time, Rope(torch.stack((table, table * 0), dim=-1), TOKENS)
            )
            for name, linear in linears:
                replace_module(model, name, linear)
        found = ", ".join(f"{dtype} {relative(hidden[dtype], hidden['BFLOAT_16']):.2%}" for dtype in DTYPES)
        click.echo(f"after {number + 1} of {blocks} blocks: {found}")


@click.command()
@click.option("--model", type=click.Choice(sorted(SPECS)), default="ti2v-5b", show_default=True)
@click.option("--blocks", type=int, default=None, help="[default: all of the model's]")
def main(model: str, blocks: int | None) -> None:
    """Measure storage dtypes at full size."""
    measure(SPECS[model], blocks or SPECS[model].num_layers)


if __name__ == "__main__":
    main()
