"""Does it fit, and what is kept where: the memory of a step added up before any weight is loaded.

Input: config, model facts, a bucket, the memory of the card. Output: a MemoryPlan: bytes on the device and in RAM by
purpose, and a Placement (which blocks stay, which are streamed, which are computed again). The bytes of one block come
from `dryrun.py`; what is added here is arithmetic over blocks.
"""

import math
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psutil
import torch

from shared.bucket import Bucket, aspect_sizes
from shared.config import Config
from shared.errors import ConfigError, RunError
from shared.geometry import geometry
from shared.models import ModelSpec
from shared.resolve import merge, nest, to_json, value_at
from train.data import micro_batch_size
from train.dryrun import BlockCost, TextCost, WeightCost, block_cost, text_cost, weight_cost
from train.quantize import TORCH_DTYPES
from train.text_encoder import needs_encoder
from train.updates import SEPARABLE, is_blockwise, is_fused

GIB = 1 << 30
CONTEXT = int(0.8 * GIB)  # of a card that the driver, CUDA's context and the display take (assumed)
SLACK = 1.1  # reserved / allocated bytes: what the caching allocator cannot hand out (assumed)
PROCESS = 3 * GIB  # RAM of Python, torch with CUDA and the readers (assumed)
SLOTS = 2  # device buffers of streamed blocks
BATCH_COPIES = 5  # latent, noise, noisy, target and velocity of a micro-batch, in float32
PREVIEW = 26  # bytes per token and channel alive in a forward without gradients (dry runs of A14B, torch 2.13)
# bytes of optimizer state per trained element, in units of the element's size; torch keeps states in its dtype
MOMENTS = {"ADAMW": 2, "MUON": 1, "LION": 1, "PRODIGY": 4, "CAME": 1, "SCHEDULE_FREE_ADAMW": 2}


@dataclass(frozen=True)
class Placement:
    """How blocks are treated. Streamed ones are always computed again, so they count in both."""

    streamed: int
    recomputed: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, on the device and in RAM, and the Placement they belong to."""

    placement: Placement
    blocks: int
    device: dict[str, int]
    host: dict[str, int]
    tokens: int  # of a micro-batch
    micro_batch: int
    step_flops: int  # of one optimizer update
    budget: int | None  # bytes of the device; None: unknown

    @property
    def need(self) -> int:
        """Bytes that the device must have, slack and context included."""
        return int(sum(self.device.values()) * SLACK) + CONTEXT

    @property
    def ram(self) -> int:
        """Bytes of RAM."""
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory, as far as is known."""
        return self.budget is None or self.need <= self.budget


def plan_for_device(config: Config, spec: ModelSpec, device: torch.device) -> MemoryPlan:
    """The plan of a run's largest bucket on the device at hand. On a CPU nothing is gained by streaming from RAM."""
    return plan_memory(config, spec, largest_bucket(config, spec), device_budget(device), device.type != "cpu")


def device_budget(device: torch.device) -> int:
    """Bytes this process may use: a card's free memory with what this process holds, or a computer's available RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) + CONTEXT  # the context exists already
    return int(psutil.virtual_memory().available) + CONTEXT


def plan_memory(config: Config, spec: ModelSpec, bucket: Bucket, budget: int | None, stream: bool = True) -> MemoryPlan:
    """The memory of the steps of one bucket, with the fastest placement that fits; AUTO streams if `stream` allows."""
    weights, block = weight_cost_of(spec, config), block_cost_of(spec, config, bucket)
    best = None
    asked = config.layer_offload_fraction != "AUTO"
    for placement in (place for place in placements(config, weights.blocks) if asked or stream or not place.streamed):
        best = add_up(config, spec, (weights, block), (bucket, placement), budget)
        if best.fits:
            break
    assert best is not None
    return best


def placements(config: Config, blocks: int) -> Iterable[Placement]:
    """What the config allows, the fastest first: keep all, compute more blocks again, then stream more of them."""
    recompute = config.gradient_checkpointing != "NONE"
    fraction = config.layer_offload_fraction
    if not isinstance(fraction, str):
        streamed = round(fraction * blocks)
        refuse_streaming(config, streamed)
        return [Placement(streamed, blocks if recompute else streamed)]
    again = [Placement(0, count) for count in range(blocks + 1)] if recompute else [Placement(0, 0)]
    if config.trains_dit and not is_blockwise(config):
        return again
    return [*again, *(Placement(count, blocks if recompute else count) for count in range(1, blocks + 1))]


def refuse_streaming(config: Config, streamed: int) -> None:
    """Raise ConfigError when weights are to stream that the optimizer must see all at once."""
    if streamed and config.trains_dit and not is_blockwise(config):
        raise ConfigError(
            f"layer_offload_fraction={config.layer_offload_fraction}: a full fine-tune streams in one process, not in "
            f"FLOAT_16, with optimizer.name {', '.join(SEPARABLE)}; change that, or use AUTO"
        )


def add_up(config: Config, spec: ModelSpec, costs: tuple[WeightCost, BlockCost], case: tuple[Bucket, Placement],
           budget: int | None) -> MemoryPlan:  # fmt: skip
    """Sum the bytes of a placement: in the backward of the last block all that is kept is alive, and its own peak.

    When blocks are kept and computed again, the last one is kept (lean.py computes leading blocks again).
    """
    (weights, block), (bucket, placement) = costs, case
    count, streamed, again = weights.blocks, placement.streamed, placement.recomputed
    parked = config.gradient_checkpointing == "CPU_OFFLOADED"
    micro = micro_batch_size(config, bucket)
    channels, frames, height, width = spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    resident = weights.outside + count * weights.block_rest + (count - streamed) * weights.block_matrices
    inputs = min(again, SLOTS) if parked else again
    trained, trained_in_ram = trained_bytes(config, weights, streamed)
    device = {
        "weights": resident + (SLOTS * weights.block_matrices if streamed else 0),
        **trained,
        "activations": inputs * block.input_bytes + max(count - again - 1, 0) * block.saved_bytes + block.shared_bytes,
        "workspace of a block": max(block.recompute_bytes if again == count else block.peak_bytes,
                                    update_bytes(config, weights)),
        "latents of a batch": BATCH_COPIES * 4 * micro * channels * frames * height * width,
    }  # fmt: skip
    host = {
        "process": PROCESS,
        "weights, while loading or streamed": resident + streamed * weights.block_matrices,
        **trained_in_ram,
        "checkpoints": again * block.input_bytes if parked else 0,
    }
    flops = count * (block.forward_flops + block.backward_flops) + again * block.forward_flops
    if needs_encoder(config):
        text = text_cost_of(spec, config)
        add_text(config, text, micro, device, host)
        again = config.gradient_checkpointing != "NONE"
        flops += micro * (text.forward_flops * (1 + again) + text.backward_flops)
    return MemoryPlan(placement, count, device, host, block.tokens, micro, flops * config.batch_size // micro, budget)


def add_text(config: Config, text: TextCost, micro: int, device: dict[str, int], host: dict[str, int]) -> None:
    """Add UMT5 in the trainer: captions of a micro-batch pass one by one, all kept unless they are computed again."""
    kept = 0 if config.gradient_checkpointing != "NONE" else (micro - 1) * text.saved_bytes
    device["text encoder"] = text.weights
    device["text encoder, activations"] = kept + text.peak_bytes
    host["text encoder, while loading, and its token vectors"] = text.weights + text.table
    size = TORCH_DTYPES[config.text_encoder.weight_dtype].itemsize if text.trained else 0
    for name, value in state_of(config, list(text.trained), size).items():
        device[name] += value


def state_of(config: Config, shapes: list[torch.Size], size: int) -> dict[str, int]:
    """Bytes beside trained parameters of so many bytes per element."""
    elements = sum(shape.numel() for shape in shapes)
    lost = elements * size if config.optimizer.rounding == "KAHAN" else 0
    return {
        "gradients": elements * size,
        "optimizer": sum(state_bytes(config, shape, size) for shape in shapes) + lost,
        "averages": elements * 4 if config.ema is not None else 0,
    }


def trained_bytes(config: Config, weights: WeightCost, streamed: int) -> tuple[dict[str, int], dict[str, int]]:
    """Adapter, gradients, optimizer states, averages: (on the device, in RAM).

    Adapters are float32; a full fine-tune has the weights' dtype, and what belongs to streamed blocks in RAM.
    """
    if config.trains_dit:
        return tuned_bytes(config, weights, streamed)
    shapes = [*weights.trained_per_block * weights.blocks, *weights.trained_outside]
    if config.training_method == "EMBEDDING":
        shapes = [torch.Size((config.embedding.token_count, 4096))]
    return {"adapter": 4 * sum(map(torch.Size.numel, shapes)), **state_of(config, shapes, 4)}, {}


def tuned_bytes(config: Config, weights: WeightCost, streamed: int) -> tuple[dict[str, int], dict[str, int]]:
    """Likewise of a full fine-tune. Fused, one block's gradients are alive; else all, of streamed blocks in RAM."""
    size = TORCH_DTYPES[config.transformer.weight_dtype].itemsize
    block, outside = (
        sum(map(torch.Size.numel, shapes)) for shapes in (weights.trained_per_block, weights.trained_outside)
    )
    matrices = sum(shape.numel() for shape in weights.trained_per_block if len(shape) == 2)
    kahan = size if config.optimizer.rounding == "KAHAN" else 0
    state, state_outside = (sum(state_bytes(config, shape, size) + kahan * shape.numel() for shape in shapes)
                            for shapes in (weights.trained_per_block, weights.trained_outside))  # fmt: skip
    slots, kept = SLOTS if streamed else 0, weights.blocks - streamed
    gradients = block if is_fused(config) else kept * block + streamed * (block - matrices) + (slots + 1) * matrices
    waiting = 0 if is_fused(config) else streamed * matrices
    mean = 4 if config.ema is not None else 0
    device = {
        "gradients": (gradients + outside) * size,
        "optimizer": (kept + slots) * state + state_outside,
        "averages": mean * (kept * block + streamed * (block - matrices) + outside),
    }
    host = {
        "gradients of streamed blocks": waiting * size,
        "optimizer of streamed blocks": streamed * state,
        "averages of streamed blocks": mean * streamed * matrices,
    }
    return device, host


def update_bytes(config: Config, weights: WeightCost) -> int:
    """Bytes alive while the optimizer updates one tensor, or one block of them (dry runs, torch 2.13)."""
    if not config.trains_dit:
        return 0
    name, rounding = config.optimizer.name, config.optimizer.rounding
    sizes = [shape.numel() for shape in (*weights.trained_per_block, *weights.trained_outside)]
    if name == "CAME":
        return 24 * max(sizes)
    if rounding != "NEAREST":  # a float32 copy of weight and gradient, of one tensor at a time
        return (12 if name == "ADAFACTOR" or rounding == "KAHAN" else 8) * max(sizes)
    together = sum(shape.numel() for shape in weights.trained_per_block)
    return 2 * TORCH_DTYPES[config.transformer.weight_dtype].itemsize * together if name == "ADAFACTOR" else 0


def state_bytes(config: Config, shape: torch.Size, size: int) -> int:
    """Optimizer state of one parameter. Adafactor keeps a row and a column; 8-bit states begin at 4096 elements."""
    name, elements = config.optimizer.name, shape.numel()
    size = size if config.optimizer.rounding == "NEAREST" else 4  # rounding.py keeps states in float32
    if name == "ADAFACTOR":
        factored = sum(shape[-2:]) * math.prod(shape[:-2]) if len(shape) > 1 else elements
        return factored * size
    if name == "ADAMW_8BIT":
        return 2 * elements if elements >= 4096 else 8 * elements
    return MOMENTS[name] * elements * size


def preview_bytes(config: Config, spec: ModelSpec, bucket: Bucket) -> int:
    """Bytes of a forward of two samples, with and without the prompt; weights are there already."""
    block = block_cost_of(spec, config, bucket)
    return PREVIEW * 2 * block.tokens // micro_batch_size(config, bucket) * spec.dim


@lru_cache
def _weight_cost(spec: ModelSpec, config_text: str) -> WeightCost:
    return weight_cost(spec, Config.model_validate_json(config_text))


@lru_cache
def _block_cost(spec: ModelSpec, config_text: str, bucket: Bucket, micro_batch: int) -> BlockCost:
    return block_cost(spec, Config.model_validate_json(config_text), bucket, micro_batch)


COST_KEYS = ("training_method", "transformer", "train_dtype", "lora_rank", "lora_targets", "peft_type", "batch_size",
             "video_config", "embedding", "text_encoder", "first_frame_conditioning_probability")  # fmt: skip


def _relevant(config: Config) -> str:
    """The settings that a dry run depends on, so that it is made once for configs that differ in others."""
    return Config(**{key: value_at(config, key) for key in COST_KEYS}).model_dump_json()


@lru_cache
def _text_cost(spec: ModelSpec, config_text: str) -> TextCost:
    return text_cost(spec, Config.model_validate_json(config_text))


def text_cost_of(spec: ModelSpec, config: Config) -> TextCost:
    """Cost of UMT5 in the trainer, remembered."""
    return _text_cost(spec, _relevant(config))


def weight_cost_of(spec: ModelSpec, config: Config) -> WeightCost:
    """Bytes of the weights of an expert, remembered."""
    return _weight_cost(spec, _relevant(config))


def block_cost_of(spec: ModelSpec, config: Config, bucket: Bucket) -> BlockCost:
    """Cost of one block for a micro-batch of a bucket, remembered."""
    return _block_cost(spec, _relevant(config), bucket, micro_batch_size(config, bucket))


def largest_bucket(config: Config, spec: ModelSpec) -> Bucket:
    """The bucket of the config's geometry with the most tokens."""
    wanted = geometry(config, spec)
    sizes = [
        size
        for resolution in wanted.resolutions
        for size in ([resolution[::-1]] if isinstance(resolution, tuple) else aspect_sizes(resolution, wanted.grid))
    ]
    height, width = max(sizes, key=math.prod)
    return wanted.bucket(height, width, (width, height))


def with_setting(config: Config, key: str, value: Any) -> Config:
    """A config with one setting changed."""
    values = to_json(config)
    merge(values, nest(key, value))
    return Config.model_validate(values)


def changes(config: Config) -> list[tuple[str, Any]]:
    """Settings that save memory, the cheapest for speed and quality first."""
    fine_tune = config.trains_dit
    stored = config.transformer.weight_dtype
    smaller = {"FLOAT_32": "BFLOAT_16", "BFLOAT_16": "FLOAT_8", "FLOAT_16": "FLOAT_8", "FLOAT_8": "NFLOAT_4",
               "INT_8": "NFLOAT_4"}.get(stored)  # fmt: skip
    wishes: list[tuple[str, Any]] = [("gradient_checkpointing", "CPU_OFFLOADED"), ("layer_offload_fraction", "AUTO")]
    if smaller and (not fine_tune or stored == "FLOAT_32"):
        wishes.append(("transformer.weight_dtype", smaller))
    if fine_tune:
        wishes += [("clip", "BLOCK"), ("optimizer.name", "ADAFACTOR")]
    wishes += [("video_config.video_batch_size_multiplier", 1 / config.batch_size), ("batch_size", 1)]
    if config.training_method == "LORA":
        wishes.append(("lora_rank", max(4, config.lora_rank // 2)))
    wishes += [("training_method", "LORA")] if fine_tune else []
    wishes += [("frames", 9), ("resolution", "384"), ("resolution", "256")]
    return [(key, value) for key, value in wishes if value_at(config, key) != value]


def ways_to_fit(config: Config, spec: ModelSpec, budget: int, stream: bool = True) -> list[str]:
    """The two cheapest changes that fit, each as SET text; or one that adds up changes until it fits.

    `stream`: whether blocks in RAM are off the device, which is not so on a CPU.
    """

    def fits(wish: Config) -> bool:
        return plan_memory(wish, spec, largest_bucket(wish, spec), budget, stream).fits

    found: list[str] = []
    together, said = config, list[str]()
    for key, value in changes(config):
        alone = with_setting(config, key, value)
        if fits(alone):
            found.append(f"{key}={value}")
        if len(found) == 2:
            return found
        if not found:
            together, said = with_setting(together, key, value), [*said, f"{key}={value}"]
            if len(said) > 1 and fits(together):
                return [" ".join(said)]
    return found


def measured_peaks(plan: MemoryPlan, device: torch.device) -> dict[str, Any]:
    """What a run took, beside what was predicted, in bytes: for memory.json."""
    measured = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        measured["allocated"] = torch.cuda.max_memory_allocated(device)
        measured["reserved"] = torch.cuda.max_memory_reserved(device)
    return {"predicted": {"device": plan.device, "device_need": plan.need, "ram": plan.host, "budget": plan.budget,
                          "streamed": plan.placement.streamed, "recomputed": plan.placement.recomputed},
            "measured": measured}  # fmt: skip


def out_of_memory(plan: MemoryPlan, config: Config, spec: ModelSpec, device: torch.device) -> RunError:
    """The error of a run that ran out of device memory: numbers, and the change to make."""
    took = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    ways = ways_to_fit(config, spec, int(0.9 * (plan.budget or plan.need)))
    return RunError(
        f"out of device memory: {took / GIB:.1f} GiB allocated at most, {plan.need / GIB:.1f} GiB predicted; "
        f'the newest checkpoint is kept, go on from it with SET="{ways[0] if ways else "batch_size=1"}"'
    )


def refuse_if_too_large(plan: MemoryPlan, config: Config, spec: ModelSpec, stream: bool = True) -> None:
    """Raise RunError, before anything is loaded, when the steps do not fit the device."""
    if plan.fits or plan.budget is None:
        return
    ways = ways_to_fit(config, spec, plan.budget, stream)
    mend = " or ".join(f'SET="{way}"' for way in ways) if ways else "a smaller model with MODEL="
    raise RunError(f"{spec.name} with this config needs {plan.need / GIB:.1f} GiB, the device has "
                   f"{plan.budget / GIB:.1f} GiB; it fits with {mend} (make plan shows the table)")  # fmt: skip
