"""The loss of a micro-batch: noise in, velocity out, compared with the target in float32.

A prior sample's target may be what the model predicts without its adapter (`prior.prediction`), so that training pulls
it nowhere else; all other targets are noise - latent.
"""

import torch
from torch import Tensor

from shared.config import Config
from train.adapter import adapter_off
from train.condition import neighbours, noisy_input, places_of, timesteps_of
from train.data import Slots
from train.dropout import seed_dropout
from train.flow import difference_loss, flow_loss, velocity
from train.lean import Places, Text
from train.model import Model, TextBank, predict


def micro_loss(model: Model, bank: TextBank, slots: Slots, config: Config) -> Tensor:
    """This micro-batch's part of the global batch's mean loss."""
    slots = slots.on(model.device)
    if slots.dice:
        seed_dropout(model.transformer, slots.dice, model.device)
    noisy = noisy_input(slots.latent_BCthw, slots.noise_BCthw, slots.sigma_B, slots.frames)
    timestep = timesteps_of(slots.sigma_B, slots.frames.clean_B)
    places = places_of(slots.frames, model.tokens_per_frame(noisy), model.device)
    text = bank.batch(slots.captions)
    predicted = predict(model, noisy, timestep, text, places, slots.cond_BCthw)
    target = velocity(slots.latent_BCthw, slots.noise_BCthw)
    if config.prior.prediction and bool(slots.prior_B.any()):
        own = base_prediction(model, (noisy, timestep, text, places), slots.cond_BCthw)
        target = torch.where(slots.prior_B.view(-1, 1, 1, 1, 1), own, target)
    return (sample_losses(predicted - target, slots, config) * slots.weight_B).sum()


@torch.no_grad()
def base_prediction(model: Model, inputs: tuple[Tensor, Tensor, Text, Places], cond_BCthw: Tensor | None) -> Tensor:
    """Velocity of the model with its adapter off."""
    with adapter_off(model.transformer):
        return predict(model, *inputs, cond_BCthw)


def sample_losses(error_BCthw: Tensor, slots: Slots, config: Config) -> Tensor:
    """Loss of each sample, with the temporal term when it has a weight."""
    counted = slots.frames.counted_Bt(len(error_BCthw), error_BCthw.device)
    loss_B = flow_loss(error_BCthw, config.loss, None if slots.frames.clean_B is None else counted)
    weight = config.video_config.temporal_consistency_weight
    if weight:
        loss_B = loss_B + weight * difference_loss(error_BCthw, neighbours(slots.frames.positions), counted)
    return loss_B
