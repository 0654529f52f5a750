"""Previews of a run: sample with the DiT at hand, decode in child processes, hand latents from expert to expert.

A decoder's contact sheet goes to TensorBoard. Previews that were not decoded when a run stopped are when it goes on.
"""

import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.models import expert_end
from train.group import Group
from train.log import RunLog, read_events
from train.model import TextBank, load_model, pick_device
from train.phases import Phase
from train.run import Run
from train.sample import (
    Advance,
    ensure_texts,
    read_latents,
    sample_range,
    scene_of,
    start_decode,
    start_of,
    steps_of,
    write_latents,
)

Row = dict[str, Any]  # of events.jsonl
DECODE_SECONDS = 1800.0  # how long the end of a run waits for a decoder
BESIDE_TRAINING = "cpu"  # where decoders run: memory of the GPU belongs to the step


class Previews:
    """All previews of one run; without sample_prompts it does nothing."""

    def __init__(self, run: Run, log: RunLog, group: Group) -> None:
        self.run, self.log, self.writes = run, log, group.first
        scene = scene_of(run.config, run.spec)
        joins = group.first or group.divides(run.config)  # divided weights are gathered by all, for every forward
        self.scene = scene if joins else replace(scene, prompts=())
        self.waiting: list[Row] = []  # to be decoded
        self.decoding: Row = {}
        self.child: subprocess.Popen[bytes] | None = None
        if self.scene.prompts:
            self.waiting = undecoded(run.folder) if group.first else []
            if group.divides(run.config):
                group.agree(lambda: len(ensure_texts(scene.texts, run).texts))  # one process encodes what is missing
            self.reader = ensure_texts(self.scene.texts, run)
            self.origin = start_of(self.scene, run)

    @property
    def folder(self) -> Path:
        """Where previews go."""
        return self.run.folder / "samples"

    def start(self, phase: Phase) -> None:
        """Before the phase's DiT is loaded: the low-noise expert needs latents that the high-noise one has left."""
        handed = self.folder / "boundary.safetensors"
        if self.scene.prompts and phase.expert == "low_noise" and not handed.is_file():
            self.log.say("previews: the base high-noise expert samples down to the boundary")
            model = load_model(self.run.spec, "high_noise", self.run.config, pick_device())
            bank = TextBank(model, self.reader)
            state, _ = sample_range(bank, self.run.spec, self.scene, "high_noise", self.origin, self.bar("high_noise"))
            self._write(handed, state)

    def take(self, bank: TextBank, phase: Phase, step: int) -> None:
        """Sample every prompt and start the decoder: 'before' and 'after' the phase, 'step000100' on the way."""
        if not self.scene.prompts:
            return
        handed = self.folder / "boundary.safetensors"
        name = {phase.first: "before", phase.stop: "after"}.get(step, f"step{step:06d}")
        low = phase.expert == "low_noise"
        start = self.origin._replace(latent_BCthw=read_latents(handed)) if low else self.origin
        bank = TextBank(bank.model, self.reader, bank.embed, bank.trained)
        state, clean = sample_range(bank, self.run.spec, self.scene, phase.expert, start, self.bar(phase.expert))
        if phase.expert == "high_noise":
            self._write(handed, state)
        path = self.folder / f"{name}{expert_end(phase.expert)}.safetensors"
        self._write(path, clean if phase.expert == "high_noise" else state)
        if not self.writes:
            return
        row = {"event": "preview", "step": step, "expert": phase.expert, "file": f"samples/{path.name}"}
        self.log.row(row)
        self.waiting.append(row)
        self.decode_next()

    def bar(self, expert: str) -> Advance:
        """Shows how many of the sampler's steps an expert has taken."""
        return self.log.between("preview", len(self.scene.prompts) * len(steps_of(self.scene, self.run.spec, expert)))

    def _write(self, path: Path, latents: Tensor) -> None:
        if self.writes:
            write_latents(path, latents, self.scene.prompts, self.run.spec, self.run.config)

    def decode_next(self, device: str = BESIDE_TRAINING) -> None:
        """Start the next decoder when none is at work: one at a time, so that training keeps its memory."""
        if self.child is not None and self.child.poll() is None:
            return
        self._collect()
        if self.waiting:
            self.decoding = self.waiting.pop(0)
            self.child = start_decode(self.latents, self.run, device)

    @property
    def latents(self) -> Path:
        """The file that is being decoded."""
        return self.run.folder / str(self.decoding["file"])

    def finish(self) -> None:
        """Wait for the decoders, which may have the GPU now; the latents of those that fail stay."""
        torch.cuda.empty_cache()
        while self.waiting or self.child is not None:
            if self.child is not None:
                self.log.say(f"waiting for the decoder of {self.latents.name}")
                with suppress(subprocess.TimeoutExpired):
                    self.child.wait(DECODE_SECONDS)
            self._collect()
            self.decode_next(device="")

    def _collect(self) -> None:
        """Take what the decoder made, when there was one."""
        if self.child is None:
            return
        if self.child.poll() is None:
            self.child.kill()
        if self.child.wait() == 0:
            sheet = self.latents.with_suffix("") / "sheet.png"
            self.log.picture(f"preview/{self.decoding['expert']}", self.decoding["step"], sheet.read_bytes())
        else:
            log = self.latents.with_suffix(".log")
            self.log.say(f"{self.latents} could not be decoded, see {log}; the latents are kept")
        self.child = None


def undecoded(folder: Path) -> list[Row]:
    """Event rows of the previews whose decoder did not come to its end."""
    files = [(row, folder / row["file"]) for row in read_events(folder) if row["event"] == "preview"]
    return [row for row, file in files if file.is_file() and not (file.with_suffix("") / "sheet.png").is_file()]
