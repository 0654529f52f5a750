"""Encode against what stock diffusers and common formats take: the VAE, the text encoder, the whole stage, reading.

Random weights of the full-size encoders: speed and equality do not depend on what the weights have learned.
"""

import io
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from encode.__main__ import encode as run_encode
from encode.budget import Effort, choose_effort, encode_within_memory
from encode.pixels import read_samples
from encode.plan import Part
from encode.text import TextEncoder, token_ids
from encode.worker import device, encode_batch
from shared.models import TEXT_LENGTH
from shared.resolve import Choice, resolve
from shared.shards import Index, read_index, shard_folder
from shared.store import create_store
from shared.store_read import StoreReader
from shared.store_write import UnitDraft, write_latents
from shared.weights import load_vae
from tests.bench.harness import Pair

VAE_22: dict[str, Any] = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
                          "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
                          "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}  # fmt: skip
CASES = [("2.1", {}, torch.float32, (9, 128, 128)), ("2.2", VAE_22, torch.float32, (9, 128, 128)),
         ("2.1", {}, torch.bfloat16, (9, 128, 128))]  # fmt: skip
GPU_CASES = [(kind, config, torch.bfloat16, (17, 512, 512)) for kind, config in (("2.1", {}), ("2.2", VAE_22))]


@torch.no_grad()
def vae_pairs() -> Iterator[Pair]:
    """encode-vae: one clip, ours over `AutoencoderKLWan.encode`."""
    from diffusers import AutoencoderKLWan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for kind, config, dtype, size in GPU_CASES if device == "cuda" else CASES:
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**config).to(device, dtype).eval().requires_grad_(False)
        vae.decoder = None
        video_BCTHW = torch.rand(1, 3, *size, generator=torch.manual_seed(1)).mul(2).sub(1).to(device, dtype)
        name = f"encode-vae {kind} {str(dtype)[6:]} {'x'.join(map(str, size))} {device}"
        limit = 5e-5 if dtype == torch.float32 else 5e-2
        yield Pair(name, ours_of(vae, video_BCTHW), stock_of(vae, video_BCTHW), "AutoencoderKLWan.encode",
                   close_to(limit), clock="wall" if device == "cuda" else "cpu", unit="clip")  # fmt: skip


def ours_of(vae: Any, video_BCTHW: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: encode_within_memory(vae, video_BCTHW, Effort(1, None))[0].float().cpu()


def stock_of(vae: Any, video_BCTHW: torch.Tensor) -> Callable[[], torch.Tensor]:
    mean, std = (
        video_BCTHW.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )

    @torch.no_grad()
    def stock() -> torch.Tensor:
        return ((vae.encode(video_BCTHW).latent_dist.mode() - mean) / std).float().cpu()

    return stock


def close_to(limit: float) -> Callable[[Any, Any], None]:
    def equal(ours: torch.Tensor, stock: torch.Tensor) -> None:
        error = ((ours - stock).norm() / stock.norm()).item()
        assert error <= limit, f"relative difference {error:.1e}"

    return equal


def text_pairs() -> Iterator[Pair]:
    """encode-text: 32 captions through UMT5 of four wide layers; stock pads each to 512 tokens."""
    from transformers import UMT5Config, UMT5EncoderModel

    from tests.encode.make import train_tokenizer

    folder = Path(tempfile.mkdtemp())
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(tokenizer), d_model=512, d_kv=64, d_ff=1280, num_layers=4, num_heads=8)
    encoder: Any = UMT5EncoderModel(config).eval().requires_grad_(False)
    encoder.save_pretrained(folder / "text_encoder")
    words, draw = (
        ["a", "red", "ball", "rolls", "left", "on", "grass", "at", "night", "slowly"],
        np.random.default_rng(0),
    )
    captions = [" ".join(draw.choice(words, draw.integers(5, 60))) for _ in range(32)]
    streamed = TextEncoder(folder, torch.float32, torch.device("cpu"))
    ids = token_ids(streamed.tokenizer, captions)

    @torch.no_grad()
    def stock() -> list[NDArray[np.float32]]:
        rows = []
        for row in ids:
            padded = torch.tensor([row + [0] * (TEXT_LENGTH - len(row))])
            rows.append(encoder(padded, (padded > 0).long()).last_hidden_state[0, : len(row)].numpy())
        return rows

    def equal(ours: Any, baseline: Any) -> None:
        for one, other in zip(ours, baseline, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)

    yield Pair("encode-text", lambda: streamed.embed(ids, lambda count: None), stock, "UMT5EncoderModel, padded to 512",
               equal, clock="cpu", work=len(ids), unit="caption")  # fmt: skip
    shutil.rmtree(folder)


def stage_pairs() -> Iterator[Pair]:
    """encode-stage: shards to committed units, over the VAE alone on frames that are already in memory."""
    from tests.encode.make import add_shard, index_of

    work = Path(tempfile.mkdtemp())
    index: Index = index_of(
        work, [add_shard(work, f"{n}.tar", range(8 * n, 8 * n + 8), size=(17, 64, 64)) for n in range(4)]
    )
    resolved = resolve(Choice(preset="demo"))
    vae = load_vae(resolved.spec, torch.float32)
    clips = []
    for shard in index.shards:
        of_shard = [sample for sample in index.samples if sample.shard == shard.name]
        clips += list(read_samples(shard_folder(work) / shard.name, of_shard))

    def ours() -> int:
        shutil.rmtree(work / "latents.zarr", ignore_errors=True)
        run_encode(work, work / "latents.zarr", Part(), resolved)
        return len(StoreReader([work / "latents.zarr"]).latents)

    effort = choose_effort(vae, index.samples[0].bucket, device())

    def alone() -> int:
        for first in range(0, len(clips), min(effort.batch, 8)):
            encode_batch(vae, clips[first : first + min(effort.batch, 8)], "latents", effort)
        return len(read_index(work).samples)

    def equal(one: int, other: int) -> None:
        assert one == other

    yield Pair("encode-stage", ours, alone, "the VAE alone (goal 0.9)", equal, work=len(clips), unit="clip")
    shutil.rmtree(work)


COUNT, SHAPE = 256, (16, 5, 64, 64)
TIMES = 10  # so that a call is long against the clock's 10 ms


def read_pairs() -> Iterator[Pair]:
    """read: 256 latents of 640 KiB in random order, warm page cache, one thread."""
    folder = Path(tempfile.mkdtemp())
    values = np.random.default_rng(0).standard_normal((COUNT, *SHAPE), np.float32).astype(np.float16)
    keys = [f"key{number}" for number in range(COUNT)]
    store = create_store(folder / "latents.zarr")
    marker = write_latents(UnitDraft(store, "latents", {}, {}), keys, values, "kind")
    values.tofile(folder / "flat")
    for number, value in enumerate(values):
        save_file({"latent": value}, folder / f"{number}.safetensors")
    tar_of(folder / "all.tar", values)
    order = np.random.default_rng(1).permutation(COUNT).tolist() * TIMES
    reader, flat = StoreReader([store]), np.memmap(folder / "flat", np.float16, "r", shape=values.shape)
    array: Any = zarr.open_array(store / "latents" / marker.id, mode="r")
    ways: dict[str, Callable[[int], Any]] = {
        "numpy memmap, unchecked (goal 0.5)": lambda number: np.array(flat[number]),
        "safetensors, a file per sample": lambda number: load_file(folder / f"{number}.safetensors")["latent"],
        "zarr-python (goal 5)": lambda number: array[number],
    }
    ours = each(order, lambda number: reader.latent(keys[number]))
    for name, way in ways.items():
        yield Pair("read", ours, each(order, way), name, same, clock="cpu", work=len(order), unit="sample")
    in_order = each(list(range(COUNT)) * TIMES, lambda number: reader.latent(keys[number]))
    yield Pair("read", in_order, lambda: webdataset_corners(folder / "all.tar"), "webdataset, sequential", same,
               clock="cpu", work=COUNT * TIMES, unit="sample")  # fmt: skip
    shutil.rmtree(folder)


def each(order: list[int], read: Callable[[int], NDArray[np.float16]]) -> Callable[[], list[float]]:
    """Read every sample, keep one value of each: memory is reused as in training."""
    return lambda: [float(read(number)[0, 0, 0, 0]) for number in order]


def same(ours: Any, baseline: Any) -> None:
    assert ours == baseline


def tar_of(path: Path, values: NDArray[np.float16]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, value in enumerate(values):
            buffer = io.BytesIO()
            np.save(buffer, value)
            member = tarfile.TarInfo(f"{number:04}.npy")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))


def webdataset_corners(path: Path) -> list[float]:
    import webdataset

    passes = [webdataset.WebDataset(str(path), shardshuffle=False).decode() for _ in range(TIMES)]
    return [float(sample["npy"][0, 0, 0, 0]) for samples in passes for sample in samples]


ITEMS = {"encode-vae": vae_pairs, "encode-text": text_pairs, "encode-stage": stage_pairs, "read": read_pairs}
