"""The DiT in training: load one expert, project captions, predict velocities. Input: config, model facts.

Weights are stored in transformer.weight_dtype, arithmetic is train_dtype. Memory: one expert, frozen unless trained.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.config import Config
from shared.errors import ConfigError
from shared.models import ModelSpec
from shared.store_read import StoreReader
from shared.weights import torch_dtype
from train.lean import LeanOptions, Places, Text, collate_text, lean_forward, project_text
from train.load import load_quantized

CAPTIONS_KEPT = 4096  # projected captions in memory: 0.8 MB each at 80 tokens of A14B
OFFLOAD_CELLS = 1 << 20  # saved tensors below this stay on the GPU: all blocks share them


@dataclass(frozen=True)
class Model:
    """One expert and how to run it."""

    transformer: Any
    device: torch.device
    dtype: torch.dtype  # of activations
    options: LeanOptions
    offload_checkpoints: bool = False


def pick_device() -> torch.device:
    """The GPU when there is one (CUDA, or ROCm under the same name)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(spec: ModelSpec, expert: str, config: Config, device: torch.device) -> Model:
    """Load an expert's frozen weights in their storage dtype, ready for an adapter."""
    transformer = load_quantized(spec, expert, config.transformer.weight_dtype, config.train_dtype).to(device)
    blocks = len(transformer.blocks) if config.gradient_checkpointing != "NONE" else 0
    options = LeanOptions(checkpoint_blocks=blocks, temporal_attention=config.video_config.use_temporal_attention)
    offload = config.gradient_checkpointing == "CPU_OFFLOADED" and device.type != "cpu"
    return Model(transformer, device, torch_dtype(config.train_dtype), options, offload)


def park(saved: Tensor) -> Tensor:
    """A large tensor that autograd keeps (a block's input) goes to pinned RAM."""
    if saved.device.type == "cpu" or saved.numel() < OFFLOAD_CELLS or isinstance(saved, nn.Parameter):
        return saved
    host = torch.empty(saved.size(), dtype=saved.dtype, pin_memory=True)
    return host.copy_(saved)


def predict(model: Model, noisy_BCthw: Tensor, timestep_BK: Tensor, text: Text, places: Places | None = None) -> Tensor:
    """Velocity in float32, at timesteps in [0, 1000] given in float32."""
    device = model.device

    def fetch(saved: Tensor) -> Tensor:
        return saved.to(device, non_blocking=True)

    hooks = torch.autograd.graph.saved_tensors_hooks(park, fetch) if model.offload_checkpoints else nullcontext()
    with hooks:
        noisy = noisy_BCthw.to(model.dtype)
        velocity = lean_forward(model.transformer, noisy, timestep_BK, text, places or Places(), model.options)
    return velocity.float()


class TextBank:
    """Projected captions by key; each is projected once while the projection is frozen."""

    def __init__(self, model: Model, reader: StoreReader) -> None:
        self.model, self.reader = model, reader
        self.known: dict[str, Tensor] = {}

    def rows(self, key: str) -> Tensor:
        """(S + 1, d) of a caption key, on the model's device."""
        if key not in self.known:
            if len(self.known) >= CAPTIONS_KEPT:
                del self.known[next(iter(self.known))]
            embedding = torch.from_numpy(self.reader.text(key).embedding_Sd.copy())
            with torch.no_grad():
                moved = embedding.to(self.model.device, self.model.dtype)
                self.known[key] = project_text(self.model.transformer, moved)
        return self.known[key]

    def batch(self, keys: Iterable[str]) -> Text:
        """Text of a micro-batch."""
        return collate_text([self.rows(key) for key in keys])


def refuse_mismatch(config: Config, spec: ModelSpec) -> None:
    """Settings that contradict the model."""
    if config.expert != "both" and spec.boundary is None:
        raise ConfigError(f"expert={config.expert}: {spec.name} has one expert; leave expert at both")
    if config.expert_share is not None and (spec.boundary is None or config.expert != "both"):
        raise ConfigError(f"expert_share={config.expert_share}: there is one expert to train; leave it at null")
    if config.first_frame_conditioning_probability and spec.image_condition != "first_frame":
        raise ConfigError(
            f"first_frame_conditioning_probability={config.first_frame_conditioning_probability}: "
            f"{spec.name} takes no clean first frame; leave it at 0"
        )
