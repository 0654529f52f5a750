"""Encode against what stock diffusers and common formats take: the VAE, the text encoder, the whole stage, reading.

Random weights of the full-size encoders: speed and equality do not depend on what the weights have learned.
"""

import copy
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from encode.budget import Effort, choose_effort, decode_within_memory, encode_within_memory
from encode.pixels import read_samples
from encode.plan import Part, make_plan
from encode.recipe import recipes
from encode.text import TextEncoder, token_ids
from encode.vae import denormalise
from encode.worker import Job, device, encode_batch, encode_shards
from shared.bucket import Bucket
from shared.models import TEXT_LENGTH
from shared.resolve import Choice, resolve
from shared.shards import Index, shard_folder
from shared.store import create_store, read_markers
from shared.store_read import StoreReader
from shared.store_write import UnitDraft, write_latents
from shared.tiny_variants import VAE_22
from shared.weights import channels_last, load_vae, torch_dtype
from tests.bench.harness import Pair
from tests.e2e.commands import ROOT
from tests.encode.test_status import large_store

FULL_21: dict[str, Any] = {}  # the defaults of diffusers are Wan 2.1's
FULL_22 = VAE_22 | {"base_dim": 160, "decoder_base_dim": 256, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
F32, BF16 = torch.float32, torch.bfloat16
CASES = [("2.1", FULL_21, F32, (9, 128, 128)), ("2.2", FULL_22, F32, (9, 128, 128)),
         ("2.1", FULL_21, BF16, (9, 96, 96)), ("2.2", FULL_22, BF16, (9, 128, 128))]  # fmt: skip
GPU_CASES = [(kind, config, BF16, (17, 512, 512)) for kind, config in (("2.1", FULL_21), ("2.2", FULL_22))]
DECODE_CASES = [("2.1", FULL_21, F32, (5, 64, 64)), ("2.2", FULL_22, F32, (5, 64, 64))]


def random_half(config: dict[str, Any], dropped: str) -> Any:
    """A full-size VAE with random weights, without its encoder or its decoder."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(**config)
    setattr(vae, dropped, None)
    vae.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.manual_seed(0)
    for name, weight in vae.named_parameters():
        bound = weight[0].numel() ** -0.5
        weight.fill_(1.0) if name.endswith("gamma") else weight.uniform_(-bound, bound, generator=generator)
    return vae


def vae_cases() -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Name, VAE and clip of each case on this machine's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for kind, config, dtype, size in GPU_CASES if device == "cuda" else CASES:
        vae = random_half(config, "decoder").to(device, dtype)
        video_BCTHW = torch.rand(1, 3, *size, generator=torch.manual_seed(1)).mul(2).sub(1).to(device, dtype)
        yield f"{kind} {str(dtype)[6:]} {'x'.join(map(str, size))} {device}", vae, video_BCTHW


@torch.no_grad()
def vae_pairs() -> Iterator[Pair]:
    """encode-vae: one clip, ours over `AutoencoderKLWan.encode`."""
    torch.set_num_threads(1)
    for name, vae, video_BCTHW in vae_cases():
        limit = 5e-5 if vae.dtype == F32 else 5e-2
        yield Pair(f"encode-vae {name}", ours_of(arranged(vae), video_BCTHW), stock_of(vae, video_BCTHW),
                   "AutoencoderKLWan.encode", close_to(limit), clock="wall" if video_BCTHW.is_cuda else "cpu",
                   unit="clip", warm_up=video_BCTHW.is_cuda)  # fmt: skip


@torch.no_grad()
def decode_pairs() -> Iterator[Pair]:
    """decode-vae: one clip, as previews and verify decode it, over `AutoencoderKLWan.decode`."""
    torch.set_num_threads(1)
    for kind, config, dtype, (frames, height, width) in DECODE_CASES:
        vae = random_half(config, "encoder").to(dtype=dtype)
        side = 8 * (vae.config.patch_size or 1)
        shape = (1, vae.config.z_dim, 1 + (frames - 1) // 4, height // side, width // side)
        latent_BCthw = torch.randn(shape, generator=torch.manual_seed(1)).to(dtype)

        @torch.no_grad()
        def stock(vae: Any = vae, latent_BCthw: torch.Tensor = latent_BCthw) -> torch.Tensor:
            sample: torch.Tensor = vae.decode(denormalise(vae, latent_BCthw)).sample
            return sample

        ours = partial(decode_within_memory, arranged(vae), latent_BCthw)
        yield Pair(f"decode-vae {kind} {str(dtype)[6:]} {frames}x{height}x{width} cpu", ours, stock,
                   "AutoencoderKLWan.decode", close_to(5e-5), clock="cpu", unit="clip", warm_up=False)  # fmt: skip


def arranged(vae: Any) -> Any:
    """A copy as `load_vae` gives it, beside stock's own."""
    return channels_last(copy.deepcopy(vae))


def ours_of(vae: Any, video_BCTHW: torch.Tensor) -> Callable[[], torch.Tensor]:
    effort = Effort(1, choose_effort(vae, Bucket(*video_BCTHW.shape[2:]), video_BCTHW.device).chunk)
    return lambda: encode_within_memory(vae, video_BCTHW, effort)[0].float().cpu()


def stock_of(vae: Any, video_BCTHW: torch.Tensor) -> Callable[[], Any]:
    mean, std = (
        video_BCTHW.new_tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )

    @torch.no_grad()
    def stock() -> Any:
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
    """encode-stage: shards to committed units, process start excluded, over the VAE alone on frames in memory."""
    from tests.encode.make import add_shard, index_of

    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp())
    index: Index = index_of(
        work, [add_shard(work, f"{n}.tar", range(8 * n, 8 * n + 8), size=(17, 128, 128)) for n in range(2)]
    )
    resolved = resolve(Choice(preset="demo"))
    vae = load_vae(resolved.spec, torch_dtype(resolved.config.vae.weight_dtype))
    clips = []
    for shard in index.shards:
        of_shard = [sample for sample in index.samples if sample.shard == shard.name]
        clips += list(read_samples(shard_folder(work) / shard.name, of_shard))
    wanted = recipes(resolved.config, resolved.spec)
    job = Job(work, work / "latents.zarr", resolved.config, resolved.spec, wanted)

    def ours() -> list[NDArray[np.float16]]:
        shutil.rmtree(job.store, ignore_errors=True)
        create_store(job.store)
        encode_shards(job, make_plan(index, {}, wanted, read_markers(job.store), Part()).shards, lambda count: None)
        reader = StoreReader([job.store])
        return [reader.latent(sample.key) for sample in index.samples]

    effort = choose_effort(vae, index.samples[0].bucket, device())

    def alone() -> list[NDArray[np.float16]]:
        starts = range(0, len(clips), effort.batch)
        batches = [encode_batch(vae, clips[start : start + effort.batch], "latents", effort)[0] for start in starts]
        return list(np.concatenate(batches).astype(np.float16))

    def equal(one: Any, other: Any) -> None:
        np.testing.assert_allclose(np.stack(one).astype(np.float32), np.stack(other), rtol=2e-3, atol=2e-3)

    yield Pair("encode-stage 17x128x128, tiny VAE", ours, alone, "the VAE alone (goal 0.9)", equal, work=len(clips),
               unit="clip")  # fmt: skip
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


def status_pairs() -> Iterator[Pair]:
    """status: `encode status` on a store of 10,000 samples, processor seconds with its start (goal: under 1 s)."""
    folder = Path(tempfile.mkdtemp())
    large_store(folder)

    def run(*words: str) -> Callable[[], str]:
        python = (sys.executable, "-m", "encode", *words)
        return lambda: subprocess.run(python, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    def counted(ours: str, helped: str) -> None:
        assert "10000 rows in 100 units" in ours and helped

    ours = run("status", "--work", str(folder), "--model", "tiny", "--preset", "demo")
    yield Pair("status", ours, run("--help"), "encode --help", counted, clock="cpu", work=10_000, unit="sample",
               warm_up=False)  # fmt: skip
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


ITEMS = {
    "encode-vae": vae_pairs,
    "decode-vae": decode_pairs,
    "encode-text": text_pairs,
    "encode-stage": stage_pairs,
    "read": read_pairs,
    "status": status_pairs,
}
