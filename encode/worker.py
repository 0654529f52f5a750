"""One device: make the rows that a plan asks for. Input: tasks. Output: committed units.

While the VAE works, one thread decodes the next videos and one writes the last unit, so memory holds a few clips of
pixels and two units of latents, however many clips there are. The text encoder is gone before the VAE is loaded.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from encode.budget import Effort, choose_effort, encode_within_memory
from encode.pixels import Frames, check_shard, read_samples
from encode.plan import Plan, Recipe, ShardTask, TextTask
from encode.text import TOKENS_IN_FLIGHT, TextEncoder, Tokens, tokenized
from shared.codes import SCHEMES
from shared.concept import concept_of
from shared.config import Config
from shared.keys import fingerprint
from shared.models import ModelSpec
from shared.progress import progress
from shared.shards import SampleRecord, shard_folder
from shared.store import Kind
from shared.store_write import UnitDraft, as_float16, text_origin, write_latents, write_texts
from shared.weights import load_vae, model_folder, torch_dtype

Item = TypeVar("Item")
Advance = Callable[[float], None]  # called with the number of rows just made
DECODE_AHEAD = 4  # clips of pixels in memory beside the batch: 4 x 97 MB at 81x832x480


@dataclass(frozen=True)
class Job:
    """Where to read and write, and how rows are made."""

    work: Path
    store: Path
    config: Config
    spec: ModelSpec
    recipes: dict[Kind, Recipe]


def device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(job: Job, plan: Plan) -> None:
    """Make everything the plan asks for; texts and clips take different times, so each has its bar."""
    if plan.texts:
        with progress("texts", sum(len(task.captions) for task in plan.texts)) as advance:
            encode_texts(job, plan.texts, advance)
    if plan.shards:
        with progress("clips", sum(len(task.samples) for task in plan.shards)) as advance:
            encode_shards(job, plan.shards, advance)


def encode_texts(job: Job, tasks: Sequence[TextTask], advance: Advance) -> None:
    """Embed the captions of each task and commit them as one unit each; nothing of the encoder stays in memory."""
    folder = model_folder(job.spec, ("text_encoder", "tokenizer"))
    stored = job.config.text_encoder.weight_dtype
    fewer = stored if stored in SCHEMES else ""
    encoder = TextEncoder(folder, torch_dtype("BFLOAT_16" if fewer else stored), device(), fewer)
    every = [text for task in tasks for text in task.captions.values()]
    tokens = dict(zip(every, tokenized(encoder.tokenizer, every, concept_of(job.config)), strict=True))
    for group in groups(tasks, tokens):
        texts = [text for task in group for text in task.captions.values()]
        embedded = encoder.embed([tokens[text].ids for text in texts], advance)
        rows = dict(zip(texts, embedded, strict=True))
        for task in group:
            own = task.captions.values()
            origin = text_origin({key: tokens[text].spans for key, text in task.captions.items()})
            draft = UnitDraft(job.store, "text", origin, job.recipes["text"])
            write_texts(draft, task.captions, [rows[text] for text in own], [tokens[text].ids for text in own])


def groups(tasks: Sequence[TextTask], tokens: dict[str, Tokens]) -> Iterator[list[TextTask]]:
    """Tasks that pass through the encoder together: as many as their hidden states fit into host memory."""
    group: list[TextTask] = []
    held = 0
    for task in tasks:
        own = sum(len(tokens[text].ids) for text in task.captions.values())
        if group and held + own > TOKENS_IN_FLIGHT:
            yield group
            group, held = [], 0
        group.append(task)
        held += own
    yield group


def encode_shards(job: Job, tasks: Iterable[ShardTask], advance: Advance) -> None:
    """Encode the samples of each task and commit them as one unit each."""
    vae = load_vae(job.spec, torch_dtype(job.config.vae.weight_dtype))
    vae.decoder = None  # never needed here, and most of the weights
    vae.to(device())
    if job.config.vae.tiling:
        vae.enable_tiling()
    with ThreadPoolExecutor(1, "write") as writer:
        pending: Future[Any] | None = None
        for task in tasks:
            latents_nCThw = encode_task(job, vae, task, advance)
            if pending is not None:
                pending.result()
            pending = writer.submit(commit_task, job, task, latents_nCThw)
        if pending is not None:
            pending.result()


def encode_task(job: Job, vae: Any, task: ShardTask, advance: Advance) -> NDArray[np.float16]:
    """Latents (n, C, T, h, w) of a task's samples, in order."""
    path = shard_folder(job.work) / task.shard.name
    check_shard(path, task.shard)
    bucket = task.samples[0].bucket
    shape = job.spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
    latents_nCThw = np.empty((len(task.samples), *shape), np.float16)
    effort, row = choose_effort(vae, bucket, device()), 0
    clips = ahead(read_samples(path, task.samples), DECODE_AHEAD)
    while batch := list(islice(clips, effort.batch)):
        values, effort = encode_batch(vae, batch, task.kind, effort)
        names = [f"{sample.source} at {sample.start:g} s (sample {sample.key})" for sample, _ in batch]
        latents_nCThw[row : row + len(batch)] = as_float16(values, names)
        row += len(batch)
        advance(len(batch))
    return latents_nCThw


def encode_batch(vae: Any, batch: list[tuple[SampleRecord, Frames]], kind: Kind,
                 effort: Effort) -> tuple[NDArray[np.float32], Effort]:  # fmt: skip
    """Normalised latents of clips of one size, and the effort that fitted into memory."""
    frames_BTHWC = torch.from_numpy(np.stack([frames for _, frames in batch]))
    video_BCTHW = to_video(frames_BTHWC, vae.dtype, vae.device)
    if kind == "cond":
        video_BCTHW[:, :, 1:] = 0.0
    latents_BCthw, effort = encode_within_memory(vae, video_BCTHW, effort)
    return latents_BCthw.float().cpu().numpy(), effort


def to_video(frames_BTHWC: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """uint8 frames to pixels in [-1, 1], (B, C, T, H, W)."""
    return (frames_BTHWC.to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0).to(dtype)


def commit_task(job: Job, task: ShardTask, latents_nCThw: NDArray[np.float16]) -> None:
    """Write a task's unit."""
    keys = [sample.key for sample in task.samples]
    draft = UnitDraft(job.store, task.kind, {"shard": task.shard.sha256, "keys": fingerprint(keys=keys)},
                      job.recipes[task.kind])  # fmt: skip
    write_latents(draft, keys, latents_nCThw, job.spec.vae.fingerprint)


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Run an iterator in a thread, at most `depth` items ahead of the consumer; its error is raised here."""
    end: Any = object()
    pool = ThreadPoolExecutor(1, "decode")
    try:
        pending = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
