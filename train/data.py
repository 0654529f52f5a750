"""From stores to the batches of a step. Input: stores, config. Output: per step a list of micro-batches on the CPU.

What a step holds is a pure function of (seed, step): epochs are fresh permutations cut into batches of one bucket, and
noise, sigma, caption and variant of a slot follow from (seed, step, slot in the global batch). So a run can stop
anywhere, and processes or threads change nothing. Cost: about 0.2 ms of CPU per 640 KiB sample.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.bucket import Bucket
from shared.config import Config
from shared.keys import EMPTY_CAPTION
from shared.store import ListedSample
from shared.store_read import StoreReader
from train.condition import Frames
from train.flow import SigmaLaw, sigma_at
from train.group import ALONE, Group
from train.updates import videos_at_once

# domains of randomness: one number each, so that no two draws share a seed
EPOCH, PRIOR, SLOT, STRATA, VALIDATION, PREVIEW, WEIGHTS, DROPOUT, FRAMES = range(9)


def random_of(seed: int, domain: int, *place: int) -> np.random.Generator:
    """The generator of one place; equal arguments give equal draws on any machine."""
    return np.random.default_rng([seed, domain, *place])


class Draw(NamedTuple):
    """A sample as one epoch uses it."""

    sample: ListedSample
    key: str  # of the variant


@dataclass(frozen=True)
class Slots:
    """A micro-batch: samples of one bucket with all that is random about them, on the CPU."""

    latent_BCthw: Tensor
    noise_BCthw: Tensor
    sigma_B: Tensor
    captions: list[str]  # caption keys
    weight_B: Tensor  # of each sample's loss in the sum over the global batch
    bucket: Bucket
    frames: Frames
    prior_B: Tensor  # bool
    cond_BCthw: Tensor | None  # condition latents of i2v
    dice: tuple[int, ...] = ()  # seeds of adapter dropout: of the step, then of each sample; empty without dropout

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor but the frames' own."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "Slots":
        """The same on a device; to a GPU from pinned memory, so that the copy needs no host to wait for it."""
        moved = {name: sent(value, device) for name, value in self.tensors().items()}
        clean_B = self.frames.clean_B
        frames = self.frames if clean_B is None else replace(self.frames, clean_B=sent(clean_B, device))
        return replace(self, frames=frames, **moved)  # type: ignore[arg-type]

    def on(self, device: torch.device) -> "Slots":
        """The same on a device, without the frames that are left out."""
        slots = self.to(device)
        names = ("latent_BCthw", "noise_BCthw", "cond_BCthw")
        picked = {name: self.frames.pick(value) for name, value in slots.tensors().items() if name in names}
        return replace(slots, **picked)  # type: ignore[arg-type]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on its way to a device; itself when it is there."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def epoch_batches(samples: list[ListedSample], config: Config, epoch: int, batch_size: int) -> list[list[Draw]]:
    """The batches of one epoch in order: every sample `repeats` times, prior ones at their ratio, one bucket each."""
    rng = random_of(config.seed, EPOCH, epoch)
    concept = [sample for sample in samples if not sample.prior for _ in range(sample.repeats)]
    prior = [sample for sample in samples if sample.prior for _ in range(sample.repeats)]
    if concept and prior:
        prior = prior_draws(prior, round(config.prior.ratio * len(concept)), epoch, config.seed)
    pool = concept + prior
    by_bucket: dict[Bucket, list[Draw]] = {bucket: [] for bucket in sorted({sample.bucket for sample in pool})}
    for index in rng.permutation(len(pool)):
        sample = pool[int(index)]
        by_bucket[sample.bucket].append(Draw(sample, pick_variant(sample, config, rng)))
    batches = [
        draws[start : start + batch_size] for draws in by_bucket.values() for start in range(0, len(draws), batch_size)
    ]
    return [batches[int(index)] for index in rng.permutation(len(batches))]


def prior_draws(prior: Sequence[ListedSample], count: int, epoch: int, seed: int) -> list[ListedSample]:
    """`count` prior samples for an epoch: consecutive pieces of an endless row of fresh permutations of all of them."""

    def at(place: int) -> ListedSample:
        turn, index = divmod(place, len(prior))
        if turn not in orders:
            orders[turn] = random_of(seed, PRIOR, turn).permutation(len(prior))
        return prior[int(orders[turn][index])]

    orders: dict[int, NDArray[np.int64]] = {}
    return [at(place) for place in range(epoch * count, (epoch + 1) * count)]


def pick_variant(sample: ListedSample, config: Config, rng: np.random.Generator) -> str:
    """One temporal variant per sample and epoch; the plain one when augmentation is off."""
    return sample.keys[rng.integers(len(sample.keys))] if config.video_config.temporal_augmentation else sample.keys[0]


@dataclass
class Plan:
    """Which samples each step trains; epochs are made on demand and forgotten."""

    samples: list[ListedSample]
    config: Config
    batch_size: int  # global
    starts: list[int] = field(default_factory=lambda: [0])  # first step of each epoch made so far
    epoch: tuple[int, list[list[Draw]]] = (-1, [])

    def _make(self, epoch: int) -> list[list[Draw]]:
        if self.epoch[0] != epoch:
            self.epoch = epoch, epoch_batches(self.samples, self.config, epoch, self.batch_size)
            if epoch == len(self.starts) - 1:
                self.starts.append(self.starts[-1] + len(self.epoch[1]))
        return self.epoch[1]

    def epoch_of(self, step: int) -> int:
        """Number of the epoch (from 0) that holds a step (from 0)."""
        while self.starts[-1] <= step:
            self._make(len(self.starts) - 1)
        return next(number for number in reversed(range(len(self.starts))) if self.starts[number] <= step)

    def batch(self, step: int) -> list[Draw]:
        """The global batch of a step (from 0)."""
        epoch = self.epoch_of(step)
        return self._make(epoch)[step - self.starts[epoch]]

    def total_steps(self) -> int:
        """max_steps, or the steps of all epochs."""
        if self.config.max_steps is not None:
            return self.config.max_steps
        while len(self.starts) <= self.config.epochs:
            self._make(len(self.starts) - 1)
        return self.starts[self.config.epochs]

    def buckets(self) -> Counter[Bucket]:
        """Draws per bucket in the first epoch."""
        return Counter(draw.sample.bucket for batch in epoch_batches(self.samples, self.config, 0, 1) for draw in batch)


def micro_batch_size(config: Config, bucket: Bucket) -> int:
    """Samples per forward pass: pictures use the whole batch_size."""
    return config.batch_size if bucket.num_frames == 1 else videos_at_once(config)


def adapter_dice(config: Config, step: int, part: list[int]) -> tuple[int, ...]:
    """Seeds of adapter dropout of the step, and of some slots of its global batch."""
    places = [0, *(slot + 1 for slot in part)] if config.lora_dropout else []
    return tuple(int(random_of(config.seed, DROPOUT, step, place).integers(2**62)) for place in places)


def slot_uniforms(config: Config, step: int, count: int) -> list[np.random.Generator]:
    """One generator per slot of a global batch."""
    return [random_of(config.seed, SLOT, step, slot) for slot in range(count)]


def load_step(
    reader: StoreReader, config: Config, law: SigmaLaw, step: int, draws: list[Draw], group: Group = ALONE
) -> list[Slots]:
    """Read and draw everything one step needs of this process's slots, cut into micro-batches."""
    rngs = slot_uniforms(config, step, len(draws))
    uniform_nk = np.stack([rng.random(4) for rng in rngs])  # sigma, caption dropout, choice of caption, first frame
    if config.timestep_stratified:
        order = random_of(config.seed, STRATA, step).permutation(len(draws))
        uniform_nk[:, 0] = (order + uniform_nk[:, 0]) / len(draws)
    sigma_n = sigma_at(law, torch.from_numpy(uniform_nk[:, 0].copy()))
    parts = []
    for part, counts in shares(len(draws), micro_batch_size(config, draws[0].sample.bucket), config, group):
        latents = [reader.latent(draws[slot].key) for slot in part]
        noises = [rngs[slot].standard_normal(latents[0].shape, np.float32) for slot in part]
        clean = [bool(uniform_nk[slot, 3] < config.first_frame_conditioning_probability) for slot in part]
        parts.append(
            Slots(
                latent_BCthw=torch.from_numpy(np.stack(latents)).float(),
                noise_BCthw=torch.from_numpy(np.stack(noises)),
                sigma_B=sigma_n[part],
                captions=[pick_caption(draws[slot].sample, config, uniform_nk[slot]) for slot in part],
                weight_B=torch.tensor([counts * loss_weight(draws[slot].sample, config) / len(draws) for slot in part]),
                bucket=draws[0].sample.bucket,
                frames=pick_frames(config, step, latents[0].shape[1], clean),
                prior_B=torch.tensor([draws[slot].sample.prior for slot in part]),
                cond_BCthw=conditions(reader, [draws[slot].key for slot in part]),
                dice=adapter_dice(config, step, part),
            )
        )
    return parts


def shares(count: int, size: int, config: Config, group: Group) -> list[tuple[list[int], float]]:
    """(slots, 1) of each micro-batch of this process; every `world`-th slot of a batch of `count` is its own.

    Processes that divide weights need each other for every forward, so one with fewer micro-batches than the first gets
    some that do not count: (slot 0, 0).
    """
    own = list(range(group.rank, count, group.world))
    parts = [(own[start : start + size], 1.0) for start in range(0, len(own), size)]
    most = -(-len(range(0, count, group.world)) // size)
    return parts + [([0], 0.0)] * (most - len(parts) if group.divides(config) else 0)


def pick_frames(config: Config, step: int, total: int, clean: list[bool]) -> Frames:
    """Latent frames of a step: the first one, and each other with 1 - frame_dropout_probability."""
    chance = config.video_config.frame_dropout_probability
    kept = random_of(config.seed, FRAMES, step).random(total) >= chance if chance else [True] * total
    positions = tuple(place for place in range(total) if place == 0 or kept[place])
    conditioned = any(clean) and len(positions) > 1  # an image has nothing to continue
    return Frames(positions, total, torch.tensor(clean) if conditioned else None)


def conditions(reader: StoreReader, keys: list[str]) -> Tensor | None:
    """Stored condition latents of i2v, when the store has them."""
    if not reader.cond:
        return None
    return torch.from_numpy(np.stack([reader.latent(key, "cond") for key in keys])).float()


def pick_caption(sample: ListedSample, config: Config, uniform_k: NDArray[np.float64]) -> str:
    """The empty caption with the dropout probability, else one of the sample's, all alike."""
    if uniform_k[1] < config.caption_dropout_probability:
        return EMPTY_CAPTION
    return sample.captions[int(uniform_k[2] * len(sample.captions))]


def loss_weight(sample: ListedSample, config: Config) -> float:
    """prior.weight of prior samples, else the sample's own."""
    return config.prior.weight if sample.prior else sample.weight
