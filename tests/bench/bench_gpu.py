"""`make bench-gpu`: presets at full size on a GPU, random weights and samples, under a hard cap of the preset's memory.

Each row is a process of its own, so that no row sees another's memory: 20 steps of one preset and model, of which the
last 15 are timed; then the same without streaming, where the card itself has room for it. Nothing is downloaded.
Output: a table in RESULTS.md with the card's name, JSON rows in rows_gpu.jsonl.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from shared.cli import Group
from shared.config import Config
from shared.errors import RunError
from shared.models import SPECS, ModelSpec
from shared.resolve import Choice, resolve
from tests.bench.harness import FOLDER, Pair, commit
from train.adapter import add_adapter
from train.blockwise import Blockwise, make_updates
from train.dryrun import TEXT_ROWS, empty_transformer
from train.flow import TIMESTEPS
from train.lean import LeanOptions, Text
from train.memory import CONTEXT, GIB, MemoryPlan, Room, largest_bucket, plan_memory
from train.model import Model, predict
from train.offload import place
from train.optim import clip
from train.plan import matmul_rate
from train.quantize import TORCH_DTYPES, QuantizedLinear

ITEMS: dict[str, Callable[[], Iterator[Pair]]] = {}  # no pair for `make bench`: this needs a GPU and minutes
STEPS, WARM = 20, 5
LORA, TUNED = ("ti2v-5b", "t2v-a14b", "i2v-a14b"), ("ti2v-5b",)
LONG = "frames=81 resolution=512x512 batch_size=1"  # the clip for which diffusion-pipe publishes 24 GiB
# name of a case: (preset, GiB of the card, SET, models)
CASES = {
    "8gb": ("8gb", 8, "", LORA),
    "16gb": ("16gb", 16, "", LORA),
    "24gb": ("24gb", 24, "", LORA),
    "embedding": ("embedding", 16, "", LORA),
    "24gb-finetune": ("24gb-finetune", 24, "", TUNED),
    "16gb-finetune": ("24gb-finetune", 16, "batch_size=1 optimizer.name=ADAMW_8BIT", TUNED),
    "48gb": ("48gb", 48, "", TUNED),
    "24gb-81-frames": ("16gb", 24, LONG, ("t2v-a14b",)),
    "16gb-81-frames": ("16gb", 16, LONG, ("t2v-a14b",)),
}
ROWS = [f"{case}:{model}" for case, (*_, models) in CASES.items() for model in models]


@dataclass(frozen=True)
class GpuRow:
    """One measured row; bytes and seconds."""

    commit: str
    card: str
    row: str
    cap: int
    predicted: int
    allocated: int
    reserved: int
    pinned: int
    streamed: int
    recomputed: int
    seconds_per_step: float
    tokens_per_second: float
    utilisation: float  # FLOPs of the step / (seconds x the card's own rate of a large matrix product)
    copied_per_step: int
    copy_rate: float  # bytes per second from pinned RAM, measured alone
    lost_to_streaming: float | None  # share of the step's time against fraction 0; None where that does not fit


def random_transformer(spec: ModelSpec, config: Config) -> Any:
    """A DiT of full size on the CPU with random stored weights; all blocks are copies of the first."""
    without = config.model_copy(update={"training_method": "EMBEDDING"}) if config.training_method == "LORA" else config
    with torch.device("meta"):
        transformer = empty_transformer(spec, without, num_layers=spec.num_layers)
    transformer.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    first = transformer.blocks[0]
    copies = {id(module) for block in transformer.blocks[1:] for module in block.modules()}
    for module in transformer.modules():
        if id(module) not in copies:
            fill(module, generator)
    for block in transformer.blocks[1:]:
        block.load_state_dict(first.state_dict())
    transformer.rope = type(transformer.rope)(spec.head_dim, transformer.config.patch_size, 1024)
    return transformer


def fill(module: nn.Module, generator: torch.Generator) -> None:
    """Small random weights; random codes with scales that make them small."""
    for parameter in module.parameters(recurse=False):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    if isinstance(module, QuantizedLinear):
        codes = module.codes.view(torch.uint8)
        codes.copy_(torch.randint(0, 60, codes.shape, generator=generator))  # below e4m3's NaN
        module.scale.fill_(0.001)


def train_steps(spec: ModelSpec, config: Config, plan: MemoryPlan, device: torch.device, steps: int) -> dict[str, Any]:
    """Take steps as the trainer does; seconds of each, and bytes copied by streaming in all."""
    transformer = random_transformer(spec, config)
    parked = config.gradient_checkpointing == "CPU_OFFLOADED"
    runner = place(transformer, plan.placement, parked, device, trained=config.training_method == "FINE_TUNE")
    dtype = TORCH_DTYPES[config.train_dtype]
    model = Model(transformer, device, dtype, LeanOptions(run_block=runner))
    rows = torch.randn(plan.micro_batch, TEXT_ROWS, spec.dim, device=device).to(dtype)
    bias = torch.zeros(plan.micro_batch, 1, 1, TEXT_ROWS, device=device, dtype=dtype)
    if config.training_method == "EMBEDDING":
        trained = {"embedding": nn.Parameter(rows.float())}
    elif config.training_method == "FINE_TUNE":
        trained = dict(transformer.named_parameters())
    else:
        trained = add_adapter(transformer, config, 0)
    optimizer = make_updates(config, trained, runner)
    blockwise = isinstance(optimizer, Blockwise)
    bucket = largest_bucket(config, spec)
    shape = spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    shape = (spec.in_channels, *shape[1:])
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        for _ in range(config.batch_size // plan.micro_batch):
            latent = torch.randn(plan.micro_batch, *shape, device=device)
            text = Text(trained["embedding"].to(dtype) if "embedding" in trained else rows, bias)
            sigma = torch.rand(plan.micro_batch, 1, device=device)
            loss = predict(model, latent, sigma * TIMESTEPS, text).square().mean()
            (optimizer.backward if blockwise else torch.autograd.backward)(loss)
        norm = optimizer.clip() if blockwise else clip(trained.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(norm):  # reading it waits for the device
            raise RunError(f"{spec.name}: the gradient is {norm.item()} on random weights")
        seconds.append(time.perf_counter() - began)
    hosts = runner.ring.hosts if runner.ring is not None else {}
    size = max((host.bytes.numel() for host in hosts.values()), default=0)
    copies = runner.ring.copies if runner.ring is not None else 0
    return {"seconds": seconds, "copied": copies * size, "pinned": sum(host.bytes.numel() for host in hosts.values())}


def median_of_last(seconds: list[float]) -> float:
    """Median of the steps after the warm-up."""
    return sorted(seconds[WARM:])[len(seconds[WARM:]) // 2]


def copy_rate(device: torch.device, size: int = GIB) -> float:
    """Bytes per second from pinned RAM to the device."""
    source, target = (
        torch.empty(size, dtype=torch.uint8).pin_memory(),
        torch.empty(size, dtype=torch.uint8, device=device),
    )
    target.copy_(source)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(5):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return 5 * size / (time.perf_counter() - began)


def measure_row(row: str) -> GpuRow:
    """One row, in this process; the cap is the preset's card less what driver and display take."""
    case, model = row.split(":")
    preset, card, settings, _ = CASES[case]
    config, spec, device = resolve(Choice(preset, None, model, settings)).config, SPECS[model], torch.device("cuda")
    cap, bucket = card * GIB, largest_bucket(config, spec)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - CONTEXT) / total))
    plan = plan_memory(config, spec, bucket, Room(cap))
    took = train_steps(spec, config, plan, device, STEPS)
    step = median_of_last(took["seconds"])
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    lost = None
    if plan.placement.streamed:
        kept = plan_memory(config.model_copy(update={"layer_offload_fraction": 0.0}), spec, bucket, Room(total))
        if kept.fits:
            lost = 1 - median_of_last(train_steps(spec, config, kept, device, STEPS)["seconds"]) / step
    return GpuRow(
        commit(), torch.cuda.get_device_name(), row, cap, plan.need, allocated, reserved, took["pinned"],
        plan.placement.streamed, plan.placement.recomputed, step,
        plan.tokens * config.batch_size / plan.micro_batch / step,
        plan.step_flops / step / matmul_rate(device, config), took["copied"] // STEPS, copy_rate(device), lost,
    )  # fmt: skip


def line(row: GpuRow) -> str:
    """The row in the table."""
    lost = "-" if row.lost_to_streaming is None else f"{row.lost_to_streaming:.0%}"
    cells = [row.row, f"{row.cap / GIB:.0f}", f"{row.predicted / GIB:.1f}", f"{row.allocated / GIB:.1f}",
             f"{row.reserved / GIB:.1f}", f"{row.pinned / GIB:.1f}", f"{row.streamed}", f"{row.recomputed}",
             f"{row.seconds_per_step:.2f}", f"{row.tokens_per_second:.0f}", f"{row.utilisation:.0%}",
             f"{row.copied_per_step / GIB:.1f}", f"{row.copy_rate / 1e9:.1f}", lost]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEAD = ("| preset:model | cap GiB | predicted | allocated | reserved | pinned | streamed | recomputed | s/step "
        "| tokens/s | of matmul rate | copied GiB/step | copy GB/s | lost to streaming |\n|" + "---|" * 14)  # fmt: skip


@click.group(cls=Group, invoke_without_command=True)
@click.option("--rows", default="", help=f"Comma-separated, of: {', '.join(ROWS)}; default: all.")
@click.option("--child", default="", hidden=True)
def main(rows: str, child: str) -> None:
    """Measure presets at full size under their cards' memory."""
    if not torch.cuda.is_available():
        raise RunError("bench-gpu needs a CUDA or ROCm GPU and none is visible; examine with: make doctor")
    if child:
        click.echo(json.dumps(asdict(measure_row(child))))
        return
    wanted = [name.strip() for name in rows.split(",") if name.strip()] or ROWS
    if unknown := sorted(set(wanted) - set(ROWS)):
        raise RunError(f"ROWS={rows}: no row {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    lines = [HEAD]
    for name in wanted:
        command = [sys.executable, "-m", "tests.bench.bench_gpu", "--child", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            lines.append(f"| {name} | failed: exit code {done.returncode} |")
        else:
            lines.append(line(GpuRow(**json.loads(done.stdout.splitlines()[-1]))))
            with (FOLDER / "rows_gpu.jsonl").open("a") as file:
                file.write(done.stdout.splitlines()[-1] + "\n")
        click.echo(lines[-1])
    report = (
        f"\n## {torch.cuda.get_device_name()}, {commit()}, {time.strftime('%Y-%m-%d')}\n\n" + "\n".join(lines) + "\n"
    )
    with Path(FOLDER / "RESULTS.md").open("a") as file:
        file.write(report)


if __name__ == "__main__":
    main(prog_name="make bench-gpu")
