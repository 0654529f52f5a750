"""Peers that need an environment of their own: DiffSynth-Studio's training step, mosaicml-streaming's reader.

`make bench-peers` makes the environments under .venv-peers/ and runs these items. A peer works in a child process that
waits while ours works; both are timed by the processor time of this process and its children.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from shared.bucket import Bucket
from shared.keys import caption_key
from shared.names import original_name
from shared.store import create_store
from shared.store_read import StoreReader
from shared.store_write import UnitDraft, write_latents
from tests.bench.bench_encode import COUNT, SHAPE
from tests.bench.bench_train import CAPTION, CLIP, WIDE, made, our_step
from tests.bench.harness import FOLDER, Pair
from train.condition import Frames
from train.data import Slots

ENVIRONMENTS = FOLDER.parents[1] / ".venv-peers"
TIMESTEP, SEED, RANK = 500, 7, 16  # the number of the timestep in DiffSynth's table of 1000


class Peer:
    """A worker in another environment."""

    def __init__(self, name: str, folder: Path) -> None:
        command = [
            str(ENVIRONMENTS / name / "bin" / "python"),
            str(FOLDER / "peers" / f"{name}_worker.py"),
            str(folder),
        ]
        with (folder / "peer.log").open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.facts = self._answer(folder)
        self.folder = folder

    def _answer(self, folder: Path) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError((folder / "peer.log").read_text()[-2000:])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer(self.folder)


@contextmanager
def peer(name: str, folder: Path) -> Iterator[Peer]:
    """A worker that ends with the block."""
    worker = Peer(name, folder)
    try:
        yield worker
    finally:
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        worker.process.wait()


def step_pairs() -> Iterator[Pair]:
    """step-peer: the model of `step` with heads of 128 (DiffSynth's RoPE asks for that), same weights, noise, text.

    One thread on both sides.
    """
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine burn processor time
    folder = Path(tempfile.mkdtemp())
    heads = {"num_attention_heads": 4, "attention_head_dim": 128, "freq_dim": 256}
    run, spec, reader = made(folder, **heads)
    generator = torch.manual_seed(SEED)
    torch.randint(TIMESTEP, TIMESTEP + 1, (1,))  # what DiffSynth draws before the noise
    latent = torch.from_numpy(reader.latent("sample0").copy()).float()[None]
    noise = torch.randn(latent.shape, generator=generator)
    shift = 5 * (1 - TIMESTEP / 1000)
    sigma = shift / (1 + shift - (1 - TIMESTEP / 1000))
    slots = Slots(latent, noise, torch.tensor([sigma]), [caption_key(CAPTION)], torch.ones(1), Bucket(*CLIP),
                  Frames(tuple(range(latent.shape[2])), latent.shape[2]), torch.tensor([False]), None)  # fmt: skip
    ours = our_step(run, spec, reader, slots)
    write_for_diffsynth(folder, ours.tensors, latent, reader)  # type: ignore[attr-defined]
    with peer("diffsynth", folder) as diffsynth:
        assert abs(diffsynth.facts["sigma"] - sigma) < 1e-6

        def theirs() -> float:
            return float(diffsynth.ask(seed=SEED)["loss"]) / float(diffsynth.facts["weight"])

        yield Pair("step-peer", ours, theirs, "DiffSynth-Studio 2.1.12, its step", near, "cpu", 7, unit="step")
    shutil.rmtree(folder)


def near(ours: float, theirs: float) -> None:
    """Losses of the first update agree."""
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)


def write_for_diffsynth(folder: Path, lora: dict[str, torch.Tensor], latent: torch.Tensor, reader: StoreReader) -> None:
    """Weights, adapter and batch under the names of Wan's own code, and the model's config."""
    weights = load_file(folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({original_name(name): value for name, value in weights.items()}, folder / "weights.safetensors")
    named = {}
    for name, value in lora.items():
        module, _, part = name.partition(".lora_")
        named[f"{original_name(module)}.lora_{part}"] = value.contiguous()
    save_file(named, folder / "lora.safetensors")
    rows = torch.from_numpy(reader.text(caption_key(CAPTION)).embedding_Sd.copy()).float()
    context = torch.cat([rows, rows.new_zeros(512 - len(rows), rows.shape[1])])[None]
    save_file({"input_latents": latent, "context": context}, folder / "batch.safetensors")
    model = {"dim": 512, "in_dim": 16, "ffn_dim": WIDE["ffn_dim"], "out_dim": 16, "text_dim": WIDE["text_dim"],
             "freq_dim": 256, "eps": 1e-6, "patch_size": [1, 2, 2], "num_heads": 4, "num_layers": WIDE["num_layers"],
             "has_image_input": False}  # fmt: skip
    facts = {"model": model, "targets": ["q", "k", "v", "o", "ffn.0", "ffn.2"], "rank": RANK, "rate": 1e-4,
             "timestep": TIMESTEP, "threads": torch.get_num_threads()}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(facts))


def read_pairs() -> Iterator[Pair]:
    """read-mosaicml: 256 latents of 640 KiB as stacked batches in random order, warm page cache, one thread."""
    folder = Path(tempfile.mkdtemp())
    values = np.random.default_rng(0).standard_normal((COUNT, *SHAPE), np.float32).astype(np.float16)
    keys = [f"key{number}" for number in range(COUNT)]
    store = create_store(folder / "latents.zarr")
    write_latents(UnitDraft(store, "latents", {}, {}), keys, values, "kind")
    np.save(folder / "latents.npy", values)
    order = np.random.default_rng(1).permutation(COUNT).tolist() * 10  # so that a call is long against the clock
    reader = StoreReader([store])

    def ours(size: int) -> list[float]:
        corners: list[float] = []
        for first in range(0, len(order), size):
            batch = np.stack([reader.latent(keys[number]) for number in order[first : first + size]])
            corners += batch[:, 0, 0, 0, 0].astype(float).tolist()
        return corners

    def equal(one: Any, other: Any) -> None:
        assert one == other

    with peer("mosaicml", folder) as mosaicml:
        for size in (1, 2, 4, 8):
            yield Pair(f"read-mosaicml batch {size}", lambda size=size: ours(size),  # type: ignore[misc]
                       lambda size=size: mosaicml.ask(order=order, batch=size)["corners"],  # type: ignore[misc]
                       "mosaicml-streaming 0.13.0", equal, "cpu", work=len(order), unit="sample")  # fmt: skip
    shutil.rmtree(folder)


ITEMS = {"step-peer": step_pairs, "read-mosaicml": read_pairs}
