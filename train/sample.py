"""Previews: latents from noise with the DiT at hand. Decoding happens in another process that cannot endanger the run.

Euler steps along the velocity on a shifted grid of sigmas, with classifier-free guidance (Ho and Salimans 2022,
arXiv 2207.12598). Two experts work one after the other: the high-noise one hands its latents over at the boundary.
Output: samples/<name>.safetensors, one latent per prompt, and what decode needs in the metadata.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from shared.bucket import Bucket
from shared.concept import concept_of, text_key
from shared.config import Config, EmbeddingConfig
from shared.errors import RunError
from shared.files import atomic_write
from shared.geometry import geometry
from shared.models import ModelSpec
from shared.store_read import StoreReader
from train.data import PREVIEW, random_of
from train.flow import TIMESTEPS, expert_range, shifted
from train.model import TextBank, predict
from train.run import Run
from train.stores import open_texts


@dataclass(frozen=True)
class Scene:
    """What to sample: prompts, size, and the numbers of the sampler."""

    prompts: tuple[str, ...]
    negative: str
    bucket: Bucket
    seed: int
    steps: int
    guidance: tuple[float, float]  # (high, low)
    concept: EmbeddingConfig | None = None

    @property
    def texts(self) -> list[str]:
        """Every text that needs an embedding."""
        return [*self.prompts, self.negative]

    def key(self, text: str) -> str:
        """Name of a text's embedding."""
        return text_key(text, self.concept)


class Start(NamedTuple):
    """Where sampling starts, one row per prompt."""

    latent_BCthw: Tensor
    cond_BCthw: Tensor | None  # condition latents of i2v


def scene_of(config: Config, spec: ModelSpec, bucket: Bucket | None = None) -> Scene:
    """The config's previews; the size is that of its clips, square when its resolution is an area."""
    wanted = geometry(config, spec)
    scale = config.sample_guidance_scale
    guidance = spec.guidance if scale is None else (scale, scale)
    size = bucket or wanted.bucket(1, 1, wanted.resolutions[0])
    texts = (config.sample_prompts, config.sample_negative_prompt)
    steps = config.sample_steps or spec.sample_steps
    return Scene(*texts, size, config.sample_seed, steps, guidance, concept_of(config))


def sigma_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 sigmas from 1 to 0, evenly spaced before the shift."""
    return [float(value) for value in shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)]


def first_noise(scene: Scene, spec: ModelSpec) -> Tensor:
    """Noise of each prompt; prompt i of a seed starts from the same noise whatever the other prompts are."""
    shape = spec.latent_shape(scene.bucket.num_frames, scene.bucket.height, scene.bucket.width)
    return torch.stack(
        [
            torch.from_numpy(random_of(scene.seed, PREVIEW, number).standard_normal(shape, "f"))
            for number in range(len(scene.prompts))
        ]
    )


def scene_conditions(scene: Scene, run: Run) -> Tensor | None:
    """Condition latents of i2v for each prompt: the first frames of the store's clips of this size, in turn."""
    if run.spec.image_condition != "concat":
        return None
    shape = run.spec.latent_shape(scene.bucket.num_frames, scene.bucket.height, scene.bucket.width)
    reader = StoreReader(run.stores)
    keys = sorted(key for key, (_, marker) in reader.cond.items() if tuple(marker.shape[1:]) == shape)
    if not keys:
        raise RunError(f"{run.spec.name} starts from a picture, and no clip in the store has size {scene.bucket}")
    rows = [reader.latent(keys[number % len(keys)], "cond") for number in range(len(scene.prompts))]
    return torch.stack([torch.from_numpy(row.copy()).float() for row in rows])


@torch.no_grad()
def sample_range(bank: TextBank, spec: ModelSpec, scene: Scene, expert: str, start: Start) -> tuple[Tensor, Tensor]:
    """Take the steps of one expert from `start`; returns the latents there and the clean latents predicted last."""
    model = bank.model
    low, high = expert_range(expert, spec.boundary)
    grid = sigma_grid(scene.steps, spec.sample_shift)
    guidance = scene.guidance[0] if expert == "high_noise" else scene.guidance[1]
    training = model.transformer.training
    model.transformer.eval()
    results = []
    for number, prompt in enumerate(scene.prompts):
        state = clean = start.latent_BCthw[number : number + 1].to(model.device)
        cond = None if start.cond_BCthw is None else start.cond_BCthw[number : number + 1].to(model.device)
        for sigma, following in pairwise(grid):
            if low <= sigma < high or (sigma == high == 1.0):
                velocity = guided(bank, (state, cond), sigma, (scene.key(prompt), scene.key(scene.negative), guidance))
                clean = state - sigma * velocity
                state = state + (following - sigma) * velocity
        results.append((state.cpu(), clean.cpu()))
    model.transformer.train(training)
    return torch.cat([state for state, _ in results]), torch.cat([clean for _, clean in results])


def guided(bank: TextBank, inputs: tuple[Tensor, Tensor | None], sigma: float, wish: tuple[str, str, float]) -> Tensor:
    """Velocity pushed from the negative prompt's towards the prompt's (by key); one forward when guidance is 1."""
    prompt, negative, guidance = wish
    model, keys = bank.model, [prompt] if guidance == 1 else [prompt, negative]
    timestep = torch.full((len(keys), 1), sigma * TIMESTEPS, device=model.device)
    state, cond = (None if part is None else part.expand(len(keys), -1, -1, -1, -1) for part in inputs)
    assert state is not None
    velocities = predict(model, state, timestep, bank.batch(keys), None, cond)
    if guidance == 1:
        return velocities
    wanted, unwanted = torch.split(velocities, 1)
    return torch.lerp(unwanted, wanted, guidance)


def write_latents(path: Path, latents: Tensor, prompts: Sequence[str], spec: ModelSpec, config: Config) -> None:
    """Latents (normalised, float32) by number of the prompt; metadata: prompts, model, fps."""
    named = {str(number): latent.contiguous() for number, latent in enumerate(latents.float())}
    fps = config.video_config.target_fps or spec.fps
    metadata = {"labels": json.dumps(list(prompts)), "fps": str(fps)}
    with atomic_write(path) as file:
        file.write(save(named, metadata))


def read_latents(path: Path) -> Tensor:
    """Latents of a preview file, in order of the prompts."""
    with safe_open(path, "pt") as file:
        return torch.stack([file.get_tensor(name) for name in sorted(file.keys(), key=int)])


def start_decode(latents: Path, run: Run, device: str = "") -> "subprocess.Popen[bytes]":
    """Decode a preview file to MP4 and a contact sheet in its own folder, in a child process; output goes to a log.

    `device`: 'cpu', or empty for the GPU where there is one.
    """
    command = [*encode_command(run, "decode"), "--latents", str(latents), "--out", str(latents.with_suffix(""))]
    command += ["--device", device] if device else []
    fps = run.config.video_config.target_fps
    command += ["--fps", str(fps)] if fps else []
    # two processes that spin on the same cores crawl; beside a GPU most cores are idle
    threads = max(1, (os.cpu_count() or 2) // 2) if torch.cuda.is_available() else 1
    with latents.with_suffix(".log").open("wb") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def encode_command(run: Run, name: str) -> list[str]:
    """Start of an encode command with the run's settings."""
    config = str(run.folder / "config.json")
    return [sys.executable, "-m", "encode", name, "--work", str(run.work), "--config", config]


def ensure_texts(texts: Sequence[str], run: Run) -> StoreReader:
    """A reader that has every text; missing ones are encoded by a child process into the first store."""
    stores, concept = list(run.stores), concept_of(run.config)
    reader = open_texts(stores, run.spec)
    missing = [text for text in dict.fromkeys(texts) if text_key(text, concept) not in reader.texts]
    if not missing:
        return reader
    with NamedTemporaryFile("w", suffix=".json") as file:  # they may be more than a command line holds
        json.dump(missing, file)
        file.flush()
        command = [*encode_command(run, "prompts"), "--store", str(stores[0]), "--file", file.name]
        finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if finished.returncode:
        lines = finished.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise RunError(
            f"prompt {missing[0]!r} has no stored embedding and could not be encoded ({lines[-1]}); add it to "
            "sample_prompts and run: make encode"
        )
    return open_texts(stores, run.spec)
