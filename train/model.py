"""The DiT in training: load one expert, project captions, predict velocities. Input: config, model facts.

Weights are stored in transformer.weight_dtype, arithmetic is train_dtype. Memory: one expert, frozen unless trained.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.config import Config, Dtype
from shared.models import ModelSpec
from shared.store_read import StoreReader
from shared.store_read import Text as StoredText
from shared.weights import torch_dtype
from train.adapter_file import base_adapters, refuse_missing
from train.attention import choose
from train.compiled import CompiledBlock
from train.condition import concat_mask
from train.contradictions import refuse_contradictions
from train.flow import wide
from train.lean import LeanOptions, Places, Text, collate_text, lean_forward, project_text
from train.load import load_quantized
from train.memory import Placement, plan_for_device
from train.offload import place
from train.updates import is_blockwise, is_fused, parts_of_weights

Embed = Callable[[StoredText], Tensor | None]  # (S, text_dim) of a text with its gradient, None: as stored
CAPTIONS_KEPT = 4096  # projected captions in memory: 0.8 MB each at 80 tokens of A14B


@dataclass(frozen=True)
class Model:
    """One expert and how to run it."""

    transformer: Any
    device: torch.device
    dtype: torch.dtype  # of activations
    options: LeanOptions
    autocast: bool = False  # trained weights are kept wider than the arithmetic
    forward: Callable[..., Tensor] = lean_forward

    def context(self) -> AbstractContextManager[Any]:
        """What a forward runs in."""
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)  # each weight is used once

    def tokens_per_frame(self, latent_BCthw: Tensor) -> int:
        """Tokens the DiT makes of one latent frame."""
        _, rows, columns = self.transformer.config.patch_size
        return latent_BCthw.shape[3] // int(rows) * (latent_BCthw.shape[4] // int(columns))


def pick_device() -> torch.device:
    """The GPU when there is one (CUDA, or ROCm under the same name)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(spec: ModelSpec, expert: str, config: Config, device: torch.device) -> Model:
    """Load an expert's frozen weights in their storage dtype, ready for an adapter; FINE_TUNE gets plain ones."""
    placement = plan_for_device(config, spec, device).placement  # while the memory is still free
    if config.trains_dit:
        return load_trainable(spec, expert, config, device, placement)
    merged = base_adapters(config, expert)
    transformer = load_quantized(spec, expert, config.transformer.weight_dtype, config.train_dtype, merged)
    options = placed(transformer, config, device, placement)
    return Model(transformer, device, torch_dtype(config.train_dtype), options)


def placed(transformer: Any, config: Config, device: torch.device, placement: Placement) -> LeanOptions:
    """Move a loaded expert to the device as the memory plan says; how to run it from there."""
    parked = config.gradient_checkpointing == "CPU_OFFLOADED" and device.type != "cpu"
    tuned = config.trains_dit
    runner = place(transformer, placement, parked, device, trained=tuned, moved=parts_of_weights(config) == 1)
    # an update that has begun inside the backward cannot be made again
    may = is_blockwise(config) and not is_fused(config) if tuned else True
    if config.compile:
        runner.forward = CompiledBlock()
    runner.may_stream_more = may and config.layer_offload_fraction == "AUTO"
    temporal, attention = config.video_config.use_temporal_attention, choose(config, device).name
    return LeanOptions(temporal_attention=temporal, attention=attention, run_block=runner)


def load_trainable(spec: ModelSpec, expert: str, config: Config, device: torch.device, placement: Placement) -> Model:
    """Load an expert whose own weights are trained."""
    storage: Dtype = "FLOAT_32" if config.transformer.weight_dtype == "FLOAT_32" else config.train_dtype
    transformer = load_quantized(spec, expert, storage, storage, base_adapters(config, expert))
    options = placed(transformer, config, device, placement)
    return Model(transformer, device, torch_dtype(config.train_dtype), options, storage != config.train_dtype)


def predict(
    model: Model,
    noisy_BCthw: Tensor,
    timestep_BK: Tensor,
    text: Text,
    places: Places | None = None,
    cond_BCthw: Tensor | None = None,
) -> Tensor:
    """Velocity in float32 or wider, at timesteps in [0, 1000] given in float32; `cond`: condition latents of i2v."""
    if cond_BCthw is not None:
        noisy_BCthw = torch.cat([noisy_BCthw, concat_mask(cond_BCthw), cond_BCthw], dim=1)
    noisy = noisy_BCthw.to(model.dtype)
    with model.context():
        velocity = model.forward(model.transformer, noisy, timestep_BK, text, places or Places(), model.options)
    return wide(velocity)


class TextBank:
    """Projected captions by key; each is projected once, unless the projection or the caption is in training."""

    def __init__(self, model: Model, reader: StoreReader, embed: Embed | None = None, trained: bool = False) -> None:
        """`embed`: what is learned of a text's embedding, if anything; `trained`: the projection is."""
        self.model, self.reader, self.embed, self.trained = model, reader, embed, trained
        self.known: dict[str, Tensor] = {}

    def rows(self, key: str) -> Tensor:
        """(S + 1, d) of a text key, on the model's device."""
        if key in self.known:
            return self.known[key]
        text = self.reader.text(key)
        learned = None if self.embed is None else self.embed(text)
        if learned is not None:
            return self.project(learned)
        embedding = torch.from_numpy(text.embedding_Sd.copy())
        if self.trained:
            return self.project(embedding)
        if len(self.known) >= CAPTIONS_KEPT:
            del self.known[next(iter(self.known))]
        with torch.no_grad():
            self.known[key] = self.project(embedding)
        return self.known[key]

    def project(self, embedding_Sd: Tensor) -> Tensor:
        """Through the DiT's text projection."""
        with self.model.context():
            return project_text(self.model.transformer, embedding_Sd.to(self.model.device, self.model.dtype))

    def batch(self, keys: Iterable[str]) -> Text:
        """Text of a micro-batch."""
        keys = list(keys)
        rows = {key: self.rows(key) for key in dict.fromkeys(keys)}
        return collate_text([rows[key] for key in keys])


def refuse_mismatch(config: Config, spec: ModelSpec) -> None:
    """Settings that contradict the model, and adapters that are not there."""
    refuse_missing(config, spec.experts)
    refuse_contradictions(config, spec)
