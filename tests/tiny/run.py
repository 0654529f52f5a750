"""A resumable training run: saved states, and a log line every fifty steps.

A state file is written beside its name and renamed, so it is whole or absent. A resumed run takes the same steps, as
every step draws from its own seed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from tests.tiny.muon import MuonAdam

LOG_EVERY, SAVE_EVERY = 50, 200  # steps


class Run:
    """Steps of one stage; `cpu_seconds` adds up over restarts."""

    def __init__(
        self,
        file: Path,
        steps: int,
        model: nn.Module,
        optimizer: MuonAdam,
        average: dict[str, Tensor] | None = None,
        save_every: int = SAVE_EVERY,
    ) -> None:
        self.file, self.total, self.save_every = file, steps, save_every
        self.model, self.optimizer, self.average = model, optimizer, average or {}
        self.done, self.before = 0, 0.0
        self.figures: dict[str, float] = {}
        self.started = time.process_time()
        if file.is_file():
            self._load()

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all threads spent on this stage so far."""
        return self.before + time.process_time() - self.started

    def steps(self) -> Iterator[int]:
        """The steps still to do; between them the state is logged and saved."""
        while self.done < self.total:
            yield self.done
            self.done += 1
            last = self.done == self.total
            if last or self.done % LOG_EVERY == 0:
                text = " ".join(f"{name} {value:.4f}" for name, value in self.figures.items())
                click.echo(f"{self.file.stem} {self.done}/{self.total} {text} cpu {self.cpu_seconds:.0f} s")
            if last or self.done % self.save_every == 0:
                self._save()

    def note(self, **figures: float) -> None:
        """Take in one step's figures, smoothed over about thirty steps."""
        for name, value in figures.items():
            self.figures[name] = 0.97 * self.figures.get(name, value) + 0.03 * value

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "figures": self.figures,
            "done": self.done,
            "cpu_seconds": self.cpu_seconds,
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.rename(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.figures, self.done, self.before = state["figures"], state["done"], state["cpu_seconds"]
