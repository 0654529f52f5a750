"""Previews of a run: sample with the DiT at hand, decode in child processes, hand latents from expert to expert."""

import subprocess
from pathlib import Path

from torch import Tensor

from train.log import RunLog
from train.model import Model, TextBank, load_model, pick_device
from train.phases import Phase
from train.run import Run
from train.sample import ensure_prompts, first_noise, read_latents, sample_range, scene_of, start_decode, write_latents

DECODE_SECONDS = 1800.0  # how long the end of a run waits for a decoder


class Previews:
    """All previews of one run; without sample_prompts it does nothing."""

    def __init__(self, run: Run, log: RunLog) -> None:
        self.run, self.log = run, log
        self.scene = scene_of(run.config, run.spec)
        self.children: list[tuple[Path, subprocess.Popen[bytes]]] = []
        if self.scene.prompts:
            self.reader = ensure_prompts(self.scene, run)

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
            noise = first_noise(self.scene, self.run.spec)
            state, _ = sample_range(model, bank, self.run.spec, self.scene, "high_noise", noise)
            self._write(handed, state)

    def take(self, model: Model, phase: Phase, step: int) -> None:
        """Sample every prompt and start the decoder: 'before' and 'after' the phase, 'step000100' on the way."""
        if not self.scene.prompts:
            return
        handed = self.folder / "boundary.safetensors"
        name = {phase.first: "before", phase.stop: "after"}.get(step, f"step{step:06d}")
        low = phase.expert == "low_noise"
        start = read_latents(handed) if low else first_noise(self.scene, self.run.spec)
        bank = TextBank(model, self.reader)
        state, clean = sample_range(model, bank, self.run.spec, self.scene, phase.expert, start)
        if phase.expert == "high_noise":
            self._write(handed, state)
        path = self.folder / f"{name}{'' if phase.expert == 'single' else '_' + phase.expert}.safetensors"
        self._write(path, clean if phase.expert == "high_noise" else state)
        self.children.append((path, start_decode(path, self.run)))
        self.log.row({"event": "preview", "step": step, "expert": phase.expert, "file": f"samples/{path.name}"})

    def _write(self, path: Path, latents: Tensor) -> None:
        write_latents(path, latents, self.scene.prompts, self.run.spec, self.run.config)

    def finish(self) -> None:
        """Wait for the decoders and say which failed; the latents stay."""
        for path, child in self.children:
            if child.poll() is None:
                self.log.say(f"waiting for the decoder of {path.name}")
            try:
                failed = child.wait(DECODE_SECONDS) != 0
            except subprocess.TimeoutExpired:
                child.kill()
                failed = True
            if failed:
                self.log.say(f"{path} could not be decoded, see {path.with_suffix('.log')}; the latents are kept")
        self.children.clear()
