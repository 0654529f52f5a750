"""The recipe from nothing to a scored pipeline folder, told top to bottom.

Input: a `Recipe`, a seed, and a folder for training states. Output: the diffusers folder with its model card, and a
contact sheet of the test prompts beside the states. Cost of `FULL`: most of an hour on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import click

from tests.tiny.card import write_card
from tests.tiny.dit import DitSchedule, make_examples, train_dit
from tests.tiny.draw import caption, contact_sheet
from tests.tiny.pipeline import Sampling, asked_combinations, measure, save_pipeline
from tests.tiny.text import new_text_encoder, new_tokenizer
from tests.tiny.vae import VaeSchedule, train_vae


@dataclass(frozen=True)
class Recipe:
    """All that determines the result, besides the seed."""

    vae: VaeSchedule = field(default_factory=VaeSchedule)
    dit: DitSchedule = field(default_factory=DitSchedule)
    sampling: Sampling = field(default_factory=Sampling)


FULL = Recipe()
SMOKE = Recipe(
    VaeSchedule(steps=3, whole_steps=1, batch_size=2, whole_batch_size=1, statistics_clips=4),
    DitSchedule(steps=3, clips_per_combination=1, batch_size=4),
    Sampling(steps=2, prompts=2, batch_size=2, measured_clips=2),
)


def make_tiny(recipe: Recipe, out: Path, work: Path, seed: int) -> None:
    """Both stages, the folder, the figures and the card."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = new_tokenizer()
    encoder = new_text_encoder(len(tokenizer))
    vae, vae_seconds = train_vae(recipe.vae, seed, work)
    click.echo("drawing and encoding the clips of the DiT")
    examples = make_examples(vae, tokenizer, encoder, recipe.dit.clips_per_combination, seed)
    dit, dit_seconds = train_dit(examples, recipe.dit, seed, work)
    save_pipeline(out, vae, dit, (tokenizer, encoder), recipe.sampling.shift)
    click.echo("sampling the test prompts")
    measured, videos = measure(out, recipe.sampling, seed)
    labels = [caption(attributes) for attributes in asked_combinations(recipe.sampling.prompts, seed)]
    contact_sheet(videos, labels, work / "samples.png")
    write_card(out, recipe, measured, {"VAE": vae_seconds, "DiT": dit_seconds})
    click.echo(f"wrote {out}: PSNR {measured.psnr:.1f} dB, followed {measured.followed} of {measured.prompts}")
