"""Does it fit, and what is kept where: the memory of a step added up before any weight is loaded.

Input: config, model facts, a bucket, the memory that may be used. Output: a MemoryPlan: bytes on the device and in RAM
by purpose, and a Placement (which blocks stay, which are streamed, which are computed again). The bytes of one block
come from `dryrun.py`, those of trained parameters from `states.py`; what is added here is arithmetic over blocks.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from shared.bucket import Bucket, aspect_sizes
from shared.config import Config
from shared.errors import ConfigError
from shared.geometry import geometry
from shared.models import ModelSpec
from shared.resolve import value_at
from train.data import micro_batch_size
from train.dryrun import BlockCost, TextCost, WeightCost, block_cost, text_cost, weight_cost
from train.quantize import TORCH_DTYPES
from train.states import SLOTS, Bytes, state_of, trained_bytes, update_bytes
from train.text_encoder import needs_encoder
from train.updates import SEPARABLE, is_blockwise, parts_of_weights, processes_here

GIB = 1 << 30
CONTEXT = int(0.8 * GIB)  # of a card that the driver, CUDA's context and the display take (assumed)
SLACK = 1.1  # reserved / allocated bytes: what the caching allocator cannot hand out (assumed)
PROCESS = 3 * GIB  # RAM of Python, torch with CUDA and the readers (assumed)
PROCESS_CPU = int(0.6 * GIB)  # likewise without a GPU (measured with tiny, torch 2.13)
GATHERED = 3  # blocks that FSDP2 holds whole: the one that computes, the next one, and a copy it is made from
BATCH_COPIES = 5  # latent, noise, noisy, target and velocity of a micro-batch, in float32
PREVIEW = 26  # bytes per token and channel alive in a forward without gradients (dry runs of A14B, torch 2.13)
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Placement:
    """How blocks are treated. Streamed ones are always computed again, so they count in both."""

    streamed: int
    recomputed: int


@dataclass(frozen=True)
class Room:
    """Bytes that one process may use; None: unknown. Without a GPU everything is in RAM, and nothing is streamed."""

    device: int | None
    ram: int | None = None
    gpu: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, on the device and in RAM, and the Placement they belong to. Without a GPU all is in RAM."""

    placement: Placement
    blocks: int
    device: Bytes
    host: Bytes
    pinned: int  # bytes of the RAM that copies to the device need locked
    tokens: int  # of a micro-batch
    micro_batch: int
    step_flops: int  # of one optimizer update
    room: Room

    @property
    def need(self) -> int:
        """Bytes that the device must have, slack and context included."""
        return int(sum(self.device.values()) * SLACK) + CONTEXT if self.room.gpu else 0

    @property
    def ram(self) -> int:
        """Bytes of RAM."""
        return sum(self.host.values())

    @property
    def fits_device(self) -> bool:
        """Whether the device has enough memory, as far as is known."""
        return self.room.device is None or self.need <= self.room.device

    @property
    def fits_ram(self) -> bool:
        """Whether there is enough RAM, as far as is known."""
        return self.room.ram is None or self.ram <= self.room.ram

    @property
    def fits(self) -> bool:
        """Whether there is enough of both."""
        return self.fits_device and self.fits_ram


def plan_for_device(config: Config, spec: ModelSpec, device: torch.device) -> MemoryPlan:
    """The plan of a run's largest bucket on the device at hand."""
    return plan_memory(config, spec, largest_bucket(config, spec), room_of(device))


def room_of(device: torch.device) -> Room:
    """What this process may use: a card's free memory and its share of the RAM, each with what it holds already."""
    process = psutil.Process().memory_info()
    ram = (available_ram() + process.rss - process.shared) // processes_here()
    if device.type != "cuda":
        return Room(None, ram, gpu=False)
    free, _ = torch.cuda.mem_get_info(device)
    return Room(int(free) + torch.cuda.memory_reserved(device) + CONTEXT, ram)  # the context exists already


def available_ram(cgroup: Path = CGROUP) -> int:
    """Bytes of RAM that can be had: the computer's, within the limit of a container (cgroup v2)."""
    available, limit = int(psutil.virtual_memory().available), cgroup / "memory.max"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return available
    facts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    used = int((cgroup / "memory.current").read_text()) - int(facts["inactive_file"])  # which can be dropped
    return min(available, int(most) - used)


def plan_memory(config: Config, spec: ModelSpec, bucket: Bucket, room: Room) -> MemoryPlan:
    """The memory of the steps of one bucket, with the fastest placement that fits; without a GPU AUTO streams none.

    When none fits, the smallest; but when only the RAM beside a GPU is short, the fastest that fits the device.
    """
    weights, block = weight_cost_of(spec, config), block_cost_of(spec, config, bucket)
    best = None
    asked = config.layer_offload_fraction != "AUTO"
    for placement in (place for place in placements(config, weights.blocks) if asked or room.gpu or not place.streamed):
        plan = add_up(config, spec, (weights, block), (bucket, placement), room)
        if plan.fits:
            return plan
        if best is None or not best.fits_device or not room.gpu:
            best = plan
    assert best is not None
    return best


def placements(config: Config, blocks: int) -> list[Placement]:
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
           room: Room) -> MemoryPlan:  # fmt: skip
    """Sum the bytes of a placement: in the backward of the last block all that is kept is alive, and its own peak."""
    (weights, block), (bucket, placement) = costs, case
    micro, again = micro_batch_size(config, bucket), placement.recomputed
    channels, frames, height, width = spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    held, streamed = weights_bytes(config, weights, placement)
    trained, trained_in_ram = trained_bytes(config, weights, placement.streamed)
    kept, parked = inputs_bytes(config, block, (weights.blocks, again), room)
    device = {
        "weights": held,
        **trained,
        "activations": kept + block.shared_bytes,
        "workspace of a block": max(block.peak_bytes, update_bytes(config, weights)),
        "latents of a batch": BATCH_COPIES * 4 * micro * channels * frames * height * width,
    }  # fmt: skip
    beside = {"streamed blocks": streamed, **trained_in_ram, "inputs of blocks": parked}
    pinned = sum(beside.values())
    flops = weights.blocks * (block.forward_flops + block.backward_flops) + again * block.forward_flops
    if needs_encoder(config):
        text = text_cost_of(spec, config)
        add_text(config, text, micro, device, beside)
        flops += micro * (text.forward_flops * (1 + (config.gradient_checkpointing != "NONE")) + text.backward_flops)
    whole = weights.outside + weights.blocks * (weights.block_rest + weights.block_matrices)
    if room.gpu:
        loading = max(whole - streamed, device.get("text encoder", 0),
                      saving_bytes(config, whole - streamed, device, beside))  # fmt: skip
        host = {"process": PROCESS, **beside, "weights while loading, or a checkpoint while saving": loading}
    else:
        host = {"process": PROCESS_CPU, **device, **beside,
                "a checkpoint while saving": saving_bytes(config, 0, device, beside)}  # fmt: skip
        device, pinned = {}, 0
    return MemoryPlan(placement, weights.blocks, device, host, pinned, block.tokens, micro,
                      flops * config.batch_size // micro, room)  # fmt: skip


def weights_bytes(config: Config, weights: WeightCost, placement: Placement) -> tuple[int, int]:
    """Bytes of a process's weights (on the device with the buffers of what passes through, streamed from RAM)."""
    parts, matrices = parts_of_weights(config), weights.block_matrices
    kept = weights.outside + weights.blocks * weights.block_rest
    kept += (weights.blocks - placement.streamed) * matrices // parts
    passing = (SLOTS if placement.streamed else 0) + (GATHERED if parts > 1 else 0)
    return kept + passing * matrices, placement.streamed * matrices


def inputs_bytes(config: Config, block: BlockCost, counts: tuple[int, int], room: Room) -> tuple[int, int]:
    """Bytes that blocks keep for the backward (on the device, in RAM). `counts`: all blocks, those computed again.

    Those keep their inputs, the others all they need. The last one is kept, its share is in its peak (lean.py computes
    leading blocks again).
    """
    count, again = counts
    parked = config.gradient_checkpointing == "CPU_OFFLOADED" and room.gpu
    inputs = min(again, SLOTS) if parked else again
    kept = inputs * block.input_bytes + max(count - again - 1, 0) * block.saved_bytes
    return kept, again * block.input_bytes if parked else 0


def saving_bytes(config: Config, weights: int, device: Bytes, host: Bytes) -> int:
    """RAM that a checkpoint takes while it is written, one file after the other (checkpoint.py); `weights`: what is not
    in RAM of them. Divided weights and averages are gathered first, whole, by every process (shard.py).
    """
    optimizer = device["optimizer"] + host.get("optimizer of streamed blocks", 0)
    if (parts := parts_of_weights(config)) > 1:
        return weights + device["averages"] * parts + optimizer
    return max(weights if config.trains_dit else 0, optimizer, device["averages"])


def add_text(config: Config, text: TextCost, micro: int, device: Bytes, host: Bytes) -> None:
    """Add UMT5 in the trainer: captions of a micro-batch pass one by one, all kept unless they are computed again."""
    kept = 0 if config.gradient_checkpointing != "NONE" else (micro - 1) * text.saved_bytes
    device["text encoder"] = text.weights
    device["text encoder, activations"] = kept + text.peak_bytes
    host["token vectors of the text encoder"] = text.table
    size = TORCH_DTYPES[config.text_encoder.weight_dtype].itemsize if text.trained else 0
    for name, value in state_of(config, list(text.trained), size).items():
        device[name] += value


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
