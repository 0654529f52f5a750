"""Previews: latents from noise with the DiT at hand. Decoding happens in another process that cannot endanger the run.

Euler steps along the velocity on a shifted grid of sigmas, with classifier-free guidance (Ho and Salimans 2022,
arXiv 2207.12598). Two experts work one after the other: the high-noise one hands its latents over at the boundary.
Output: samples/<name>.safetensors, one latent per prompt, and what decode needs in the metadata.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from shared.bucket import Bucket, parse_bucket
from shared.concept import concept_of, text_key
from shared.config import Config, EmbeddingConfig
from shared.errors import RunError
from shared.files import atomic_write
from shared.geometry import geometry
from shared.models import ModelSpec
from shared.store_read import StoreReader
from train.condition import Frames, places_of, timesteps_of
from train.data import PREVIEW, random_of
from train.flow import expert_range, shifted
from train.model import TextBank, predict
from train.run import Run
from train.stores import open_texts

Advance = Callable[[float], None]  # is told how many more steps were taken


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
    cond_BCthw: Tensor | None = None  # condition latents of i2v
    first_BCthw: Tensor | None = None  # clean first latent frames of ti2v

    def row(self, number: int, device: torch.device) -> "Start":
        """One prompt's, on a device."""
        return Start(*(None if part is None else part[number : number + 1].to(device) for part in self))  # type: ignore[arg-type]


class Pictures(NamedTuple):
    """Pictures that videos start from, as condition latents, and the size of those videos."""

    latent_BCthw: Tensor
    bucket: Bucket


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


def start_of(scene: Scene, run: Run, pictures: Pictures | None = None) -> Start:
    """Noise, and what is known beside it: pictures, or, for i2v without any, first frames of the store's clips."""
    noise, kind = first_noise(scene, run.spec), run.spec.image_condition
    if pictures is None:
        return Start(noise, stored_conditions(scene, run) if kind == "concat" else None)
    turns = [number % len(pictures.latent_BCthw) for number in range(len(scene.prompts))]
    rows = pictures.latent_BCthw[turns]
    return Start(noise, cond_BCthw=rows) if kind == "concat" else Start(noise, first_BCthw=rows)


def stored_conditions(scene: Scene, run: Run) -> Tensor:
    """Condition latents of i2v for each prompt: the first frames of the store's clips of this size, in turn."""
    shape = run.spec.latent_shape(scene.bucket.num_frames, scene.bucket.height, scene.bucket.width)
    reader = StoreReader(run.stores)
    keys = sorted(key for key, (_, marker) in reader.cond.items() if tuple(marker.shape[1:]) == shape)
    if not keys:
        raise RunError(
            f"{run.spec.name} starts from a picture, and no clip in the store has size {scene.bucket}; give IMAGE=file"
        )
    rows = [reader.latent(keys[number % len(keys)], "cond") for number in range(len(scene.prompts))]
    return torch.stack([torch.from_numpy(row.copy()).float() for row in rows])


def steps_of(scene: Scene, spec: ModelSpec, expert: str) -> list[tuple[float, float]]:
    """The (sigma, following sigma) of an expert's share of the sampler's steps."""
    low, high = expert_range(expert, spec.boundary)
    pairs = pairwise(sigma_grid(scene.steps, spec.sample_shift))
    return [pair for pair in pairs if low <= pair[0] < high or (pair[0] == high == 1.0)]


@torch.no_grad()
def sample_range(
    bank: TextBank, spec: ModelSpec, scene: Scene, expert: str, start: Start, advance: Advance = lambda steps: None
) -> tuple[Tensor, Tensor]:
    """Take the steps of one expert from `start`; returns the latents there and the clean latents predicted last."""
    model = bank.model
    guidance = scene.guidance[0] if expert == "high_noise" else scene.guidance[1]
    training = model.transformer.training
    model.transformer.eval()
    results = []
    for number, prompt in enumerate(scene.prompts):
        here = start.row(number, model.device)
        state = clean = with_first(here.latent_BCthw, here.first_BCthw)
        for sigma, following in steps_of(scene, spec, expert):
            wish = (scene.key(prompt), scene.key(scene.negative), guidance)
            velocity = guided(bank, here._replace(latent_BCthw=state), sigma, wish)
            clean = with_first(state - sigma * velocity, here.first_BCthw)
            state = with_first(state + (following - sigma) * velocity, here.first_BCthw)
            advance(1)
        results.append((state.cpu(), clean.cpu()))
    model.transformer.train(training)
    return torch.cat([state for state, _ in results]), torch.cat([clean for _, clean in results])


def with_first(latent_BCthw: Tensor, first_BCthw: Tensor | None) -> Tensor:
    """Latents whose first frame is the picture's (diffusers pipeline_wan_i2v.py `first_frame_mask`)."""
    return latent_BCthw if first_BCthw is None else torch.cat([first_BCthw, latent_BCthw[:, :, 1:]], 2)


def guided(bank: TextBank, here: Start, sigma: float, wish: tuple[str, str, float]) -> Tensor:
    """Velocity pushed from the negative prompt's towards the prompt's (by key); one forward when guidance is 1."""
    prompt, negative, guidance = wish
    model, keys = bank.model, [prompt] if guidance == 1 else [prompt, negative]
    state, cond, first = (None if part is None else part.expand(len(keys), -1, -1, -1, -1) for part in here)
    assert state is not None
    clean_B = None if first is None else torch.ones(len(keys), dtype=torch.bool, device=model.device)
    timestep = timesteps_of(torch.full((len(keys),), sigma, device=model.device), clean_B)
    total = state.shape[2]
    places = places_of(Frames(tuple(range(total)), total, clean_B), model.tokens_per_frame(state), model.device)
    velocities = predict(model, state, timestep, bank.batch(keys), places, cond)
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


def encode_pictures(files: Sequence[Path], size: str | None, run: Run) -> Pictures:
    """Condition latents of picture files, made by a child process; one size for all, the first picture's or `size`."""
    if run.spec.image_condition == "none":
        raise RunError(f"{run.spec.name} starts from no picture; leave IMAGE out, or train ti2v-5b or i2v-a14b")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.safetensors"
        command = [*encode_command(run, "picture"), "--out", str(path), *(["--size", size] if size else [])]
        command += [part for file in files for part in ("--image", str(file))]
        finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if finished.returncode:
            raise RunError(last_line(finished.stderr).removeprefix("error: "))
        with safe_open(path, "pt") as file:
            bucket = parse_bucket(file.metadata()["size"], run.spec.grid)
        return Pictures(read_latents(path), bucket)


def last_line(output: bytes) -> str:
    """What a child process said last."""
    return (output.decode(errors="replace").strip().splitlines() or ["no message"])[-1]


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
        raise RunError(
            f"prompt {missing[0]!r} has no stored embedding and could not be encoded ({last_line(finished.stderr)}); "
            "add it to sample_prompts and run: make encode"
        )
    reader = open_texts(stores, run.spec)
    if any(text_key(text, concept) not in reader.texts for text in missing):
        raise RunError(
            f"prompt {missing[0]!r} was embedded, but not as the store's captions were (other weights, or another "
            "text_encoder.weight_dtype), which does not mix; run make encode with this run's PRESET, CONFIG and SET"
        )
    return reader
