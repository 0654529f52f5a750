"""Batch and chunk follow free memory, change no latent, and shrink when memory runs out all the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

import encode.budget as subject
from encode.budget import Effort, choose_effort, encode_within_memory
from shared.bucket import Bucket
from shared.errors import ModelError
from shared.weights import load_vae
from tests.encode.test_encode import settings

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


def test_more_free_memory_never_means_less_work_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, bucket, efforts = vae_of(model), Bucket(81, 480, 832), []
    for gigabytes in (0.1, 0.5, 1, 2, 4, 8, 64):
        monkeypatch.setattr("encode.budget.free_memory", lambda device, free=gigabytes: int(free * 2**30))
        effort = choose_effort(vae, bucket, CPU)
        efforts.append((effort.batch, effort.chunk or 10**6))
    assert efforts == sorted(efforts)
    assert efforts[0][1] < 21
    assert efforts[-1] == (1, 10**6)


def test_small_clips_share_a_batch(model: Path) -> None:
    assert choose_effort(vae_of(model), Bucket(9, 64, 64), CPU).batch > 4
    assert choose_effort(vae_of(model), Bucket(81, 480, 832), CPU).batch == 1


def small_device(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A device that runs out of memory beyond `most` latent frames per pass, as CUDA says it."""
    encode = subject.encode_mode

    def limited(vae: Any, video_BCTHW: torch.Tensor, chunk: int | None, *rest: Any) -> torch.Tensor:
        clips, frames = video_BCTHW.shape[0], 1 + (video_BCTHW.shape[2] - 1) // 4
        if clips * min(frames, chunk or frames) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return encode(vae, video_BCTHW, chunk, *rest)

    monkeypatch.setattr(subject, "encode_mode", limited)


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
