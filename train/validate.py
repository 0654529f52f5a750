"""Validation: held-out clips at fixed timesteps and fixed noise, so that two numbers differ by the weights alone."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from shared.bucket import Bucket
from shared.config import Config
from shared.store import ListedSample
from train.data import VALIDATION, conditions, micro_batch_size, random_of
from train.flow import TIMESTEPS, SigmaLaw, flow_loss, interpolate, sigma_at, velocity
from train.lean import Text
from train.model import Model, TextBank, predict
from train.stores import Dataset


def quantiles(law: SigmaLaw, count: int) -> list[float]:
    """Sigmas in the middle of `count` equally probable parts of the distribution."""
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return [float(value) for value in sigma_at(law, middles)]


def names_of(sigmas: list[float]) -> list[str]:
    """'t0875' for 0.875, with the quantile's number behind it where several round alike: each has a name of its own."""
    names = [f"t{round(sigma * TIMESTEPS):04d}" for sigma in sigmas]
    return [name if names.count(name) == 1 else f"{name}.{place:02d}" for place, name in enumerate(names)]


def batches(samples: list[ListedSample], config: Config) -> Iterator[tuple[Bucket, list[tuple[int, ListedSample]]]]:
    """Numbered samples, each batch of one bucket and at most a micro-batch."""
    numbered = sorted(enumerate(samples), key=lambda pair: (pair[1].bucket, pair[0]))
    for bucket, group in groupby(numbered, key=lambda pair: pair[1].bucket):
        members, size = list(group), micro_batch_size(config, bucket)
        yield from ((bucket, members[start : start + size]) for start in range(0, len(members), size))


@torch.no_grad()
def validate(bank: TextBank, data: Dataset, law: SigmaLaw, config: Config) -> dict[str, float]:
    """Mean loss: overall ('loss'), per timestep ('t0875') and per bucket ('bucket 64x64x9')."""
    model, sums = bank.model, defaultdict[str, list[float]](list)
    sigmas = quantiles(law, config.validation.timesteps)
    places = list(zip(sigmas, names_of(sigmas), strict=True))
    training = model.transformer.training
    model.transformer.eval()
    for bucket, batch in batches(data.validation, config):
        latent = torch.from_numpy(np.stack([data.reader.latent(sample.keys[0]) for _, sample in batch])).float()
        cond = conditions(data.reader, [sample.keys[0] for _, sample in batch])
        text = bank.batch(sample.captions[0] for _, sample in batch)
        for place, (sigma, name) in enumerate(places):
            shape = latent.shape[1:]
            noise = np.stack(
                [
                    random_of(config.seed, VALIDATION, number, place).standard_normal(shape, np.float32)
                    for number, _ in batch
                ]
            )
            losses = loss_at(model, text, (latent, torch.from_numpy(noise), cond), sigma)
            for tag in ("loss", name, f"bucket {bucket}"):
                sums[tag] += losses
    model.transformer.train(training)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def loss_at(model: Model, text: Text, rows: tuple[Tensor, Tensor, Tensor | None], sigma: float) -> list[float]:
    """Squared error of each sample's velocity at one sigma, plain whatever the training loss is."""
    latent, noise, cond = (None if part is None else part.to(model.device) for part in rows)
    assert latent is not None and noise is not None
    sigma_B = torch.full((len(latent),), sigma, device=model.device)
    noisy = interpolate(latent, noise, sigma_B)
    predicted = predict(model, noisy, sigma_B[:, None] * TIMESTEPS, text, None, cond)
    return [float(value) for value in flow_loss(predicted - velocity(latent, noise))]
