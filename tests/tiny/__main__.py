"""`python -m tests.tiny`: train the tiny Wan from nothing and write it as a diffusers folder with its model card."""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch

from tests.tiny.recipe import FULL, SMOKE, make_tiny


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("shared/tiny"), show_default=True,
              help="Folder for the diffusers pipeline and its README.md.")  # fmt: skip
@click.option("--work", type=click.Path(path_type=Path), default=Path("work/tiny"), show_default=True,
              help="Folder for training states; a run that was stopped goes on from them.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed of weights, clips and noise.")
@click.option("--threads", default=os.cpu_count() or 1, show_default="all cores", help="CPU threads to compute with.")
@click.option("--smoke", is_flag=True, help="A few steps of everything, in seconds: shows that the recipe runs.")
def main(out: Path, work: Path, seed: int, threads: int, smoke: bool) -> None:
    """Train the tiny Wan from nothing: first its VAE, then its DiT, then score it and write the model card.

    Takes most of an hour on two cores. Nothing is downloaded: all clips are drawn.
    """
    torch.set_num_threads(threads)
    make_tiny(SMOKE if smoke else FULL, out, work, seed)


if __name__ == "__main__":
    main()
