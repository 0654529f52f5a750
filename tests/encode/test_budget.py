"""Batch and chunk follow free memory, change no latent, and shrink when memory runs out all the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan

import encode.budget as subject
from encode.budget import Effort, choose_effort, decode_within_memory, encode_within_memory
from shared.bucket import Bucket
from shared.errors import ModelError
from shared.tiny_variants import VAE_21, VAE_22
from shared.weights import load_vae
from tests.encode.test_encode import settings
from train.dryrun import Alive

CPU = torch.device("cpu")


def vae_of(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_vae(settings(model).spec, dtype)


def test_efforts_halve_down_to_one_clip_and_one_frame() -> None:
    efforts, effort = [], Effort(8, None)
    while smaller := effort.halved():
        efforts.append(effort := smaller)
    assert [effort.batch for effort in efforts[:3]] == [4, 2, 1]
    assert efforts[-1] == Effort(1, 1)
    assert all(effort.batch == 1 for effort in efforts if effort.chunk is not None)


@pytest.mark.parametrize(
    "effort", [Effort(3, None), Effort(2, None), Effort(1, None), Effort(1, 2), Effort(1, 1)], ids=str
)
def test_no_effort_changes_the_latents(model: Path, effort: Effort) -> None:
    vae = vae_of(model, torch.float64)
    video_BCTHW = torch.rand(3, 3, 13, 32, 48, dtype=torch.float64, generator=torch.manual_seed(0)) * 2 - 1
    with torch.no_grad():
        stock = torch.cat([vae.encode(clip[None]).latent_dist.mode() for clip in video_BCTHW])
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1, 1)
                 for v in (vae.config.latents_mean, vae.config.latents_std))  # fmt: skip
    latents, worked = encode_within_memory(vae, video_BCTHW, effort)
    assert worked == effort
    torch.testing.assert_close(latents, (stock - mean) / std, rtol=1e-10, atol=1e-10)


def peak_bytes(call: Callable[[], object], known: list[torch.Tensor]) -> int:
    """The most bytes of tensors that were alive at once, beside the known ones."""
    alive = Alive()
    alive.ignore(known)
    with alive:
        call()
    return alive.peak


@pytest.mark.parametrize("kind", [VAE_21, VAE_22], ids=["2.1", "2.2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frames", [5, 9])
@torch.no_grad()
def test_no_more_memory_is_taken_than_stock_takes(kind: dict[str, Any], dtype: torch.dtype, frames: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**kind | {"base_dim": 48}).to(dtype).eval().requires_grad_(False)
    vae.decoder = None
    side = 96 * (vae.config.patch_size or 1)
    video_BCTHW = torch.rand(1, 3, frames, side, side).mul(2).sub(1).to(dtype)
    effort = Effort(1, choose_effort(vae, Bucket(frames, side, side), CPU).chunk)
    encode_within_memory(vae, video_BCTHW[:, :, :1], effort)  # Winograd's weights are made once, and are extra
    known = [*vae.parameters(), video_BCTHW]
    stock = peak_bytes(lambda: vae.encode(video_BCTHW), known)
    assert peak_bytes(lambda: encode_within_memory(vae, video_BCTHW, effort), known) <= stock


def test_decoding_takes_less_at_once_when_memory_runs_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latent_BCthw = vae_of(model), torch.randn(1, 16, 5, 4, 4, generator=torch.manual_seed(0))
    whole = decode_within_memory(vae, latent_BCthw)
    monkeypatch.setattr(subject, "ONE_PASS", 17)
    small_device(monkeypatch, 2, "decode_latents")
    torch.testing.assert_close(decode_within_memory(vae, latent_BCthw), whole, rtol=1e-4, atol=1e-5)
    small_device(monkeypatch, 0, "decode_latents")
    with pytest.raises(ModelError, match=r"17x32x32.*does not fit into memory"):
        decode_within_memory(vae, latent_BCthw)


def test_more_free_memory_never_means_less_work_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, bucket, efforts = vae_of(model), Bucket(81, 480, 832), []
    for gigabytes in (0.1, 0.5, 1, 2, 4, 8, 64):
        monkeypatch.setattr("encode.budget.free_memory", lambda device, free=gigabytes: int(free * 2**30))
        effort = choose_effort(vae, bucket, torch.device("cuda"))
        efforts.append((effort.batch, effort.chunk or 10**6))
    assert efforts == sorted(efforts)
    assert efforts[0][1] < 21
    assert efforts[-1] == (1, 10**6)


def test_small_clips_share_a_batch(model: Path) -> None:
    assert choose_effort(vae_of(model), Bucket(9, 64, 64), CPU).batch > 4
    assert choose_effort(vae_of(model), Bucket(81, 480, 832), CPU).batch == 1


def small_device(monkeypatch: pytest.MonkeyPatch, most: int, name: str = "encode_mode") -> None:
    """A device that runs out of memory beyond `most` latent frames per pass, as CUDA says it."""
    run, per_latent = getattr(subject, name), 4 if name == "encode_mode" else 1

    def limited(vae: Any, clips: torch.Tensor, chunk: int | None, *rest: Any, **named: Any) -> torch.Tensor:
        frames = 1 + (clips.shape[2] - 1) // per_latent
        if clips.shape[0] * min(frames, chunk or frames) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        done: torch.Tensor = run(vae, clips, chunk, *rest, **named)
        return done

    monkeypatch.setattr(subject, name, limited)


@pytest.mark.parametrize(
    ("most", "fits"), [(100, (4, None)), (10, (2, None)), (5, (1, None)), (4, (1, 4)), (1, (1, 1))]
)
def test_out_of_memory_goes_on_with_less_at_once_and_equal_latents(
    model: Path, monkeypatch: pytest.MonkeyPatch, most: int, fits: tuple[int, int | None]
) -> None:
    vae, video_BCTHW = vae_of(model), torch.rand(4, 3, 17, 32, 32, generator=torch.manual_seed(0))
    whole, _ = encode_within_memory(vae, video_BCTHW, Effort(4, None))
    small_device(monkeypatch, most)
    latents, effort = encode_within_memory(vae, video_BCTHW, Effort(4, None))
    assert (effort.batch, effort.chunk) == fits
    torch.testing.assert_close(latents, whole, rtol=1e-4, atol=1e-5)


def test_memory_for_not_even_one_frame_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_device(monkeypatch, 0)
    with pytest.raises(ModelError, match=r"5x32x48.*does not fit into memory"):
        encode_within_memory(vae_of(model), torch.zeros(2, 3, 5, 32, 48), Effort(2, None))


def test_other_errors_are_not_taken_for_memory(model: Path) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        encode_within_memory(vae_of(model), torch.zeros(1, 5, 5, 32, 48), Effort(1, None))
