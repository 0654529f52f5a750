"""How much to encode at once: batch and chunk chosen from free memory, halved when memory runs out all the same.

Neither changes what is encoded: clips of a batch do not meet, and chunks are exact (encode/vae.py). Spatial tiling
would change latents and is never chosen here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from encode.vae import FRAMES_PER_LATENT, ConvKind, encode_mode, normalise
from encode.vae import decode as decode_latents
from shared.bucket import Bucket
from shared.errors import ModelError

SHARE_OF_FREE = 0.6  # the rest is for the decoder's queue, the writer and fragmentation
WIDE_TENSORS = 5  # tensors of the widest layer alive at once: input, norm, output, one tap's output, a shortcut
HISTORY = 3  # frames of a pass that weigh as much as the two frames each layer keeps for the next pass
PIXELS_PER_BATCH = {"cpu": 2**19, "cuda": 2**24}  # beyond this many pixels a batch gains nothing
# On a CPU longer passes are hardly faster (measured: 5 %), and passes of this many take less memory than stock's chunks
ONE_PASS = 5  # frames


@dataclass(frozen=True)
class Effort:
    """Clips per pass, and latent frames per pass (None: the whole clip)."""

    batch: int
    chunk: int | None

    def halved(self) -> "Effort | None":
        """The next smaller effort, None when there is none: first fewer clips, then fewer frames."""
        if self.batch > 1:
            return replace(self, batch=self.batch // 2)
        if self.chunk is None or self.chunk > 1:
            return replace(self, chunk=4 if self.chunk is None else self.chunk // 2)
        return None


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def choose_effort(vae: Any, bucket: Bucket, device: torch.device, dim: int | None = None) -> Effort:
    """Batch and chunk for clips of a bucket; `dim` is the width of the layers at full resolution, the encoder's own."""
    pixels = bucket.height * bucket.width // (vae.config.patch_size or 1) ** 2
    bytes_per_frame = WIDE_TENSORS * (dim or vae.config.base_dim) * pixels * vae.dtype.itemsize
    frames = int(free_memory(device) * SHARE_OF_FREE) // bytes_per_frame
    chunk = 1 if device.type == "cpu" and bucket.num_frames > ONE_PASS else None
    wanted = bucket.num_frames if chunk is None else min(bucket.num_frames, 1 + FRAMES_PER_LATENT * chunk + HISTORY)
    if frames < wanted:
        return Effort(1, max(1, min(chunk or frames, (frames - HISTORY) // FRAMES_PER_LATENT)))
    useful = max(1, PIXELS_PER_BATCH[device.type] // (bucket.num_frames * bucket.height * bucket.width))
    return Effort(min(frames // wanted, useful), chunk)


def encode_within_memory(vae: Any, video_BCTHW: torch.Tensor, effort: Effort) -> tuple[torch.Tensor, Effort]:
    """Normalised latents of a batch, in smaller passes when memory runs out; returns the effort that worked."""

    def encode(effort: Effort) -> torch.Tensor:
        return torch.cat([encode_clips(vae, clips, effort.chunk) for clips in torch.split(video_BCTHW, effort.batch)])

    return _within_memory(encode, effort, video_BCTHW.shape[2:])


def decode_within_memory(vae: Any, latent_BCthw: torch.Tensor) -> torch.Tensor:
    """Pixels of normalised latents, in passes that fit into memory."""
    frames, height, width = latent_BCthw.shape[2:]
    side = vae.config.scale_factor_spatial
    bucket = Bucket(1 + FRAMES_PER_LATENT * (frames - 1), height * side, width * side)
    dim = getattr(vae.config, "decoder_base_dim", None) or vae.config.base_dim
    effort = choose_effort(vae, bucket, vae.device, dim)

    def decode(effort: Effort) -> torch.Tensor:
        parts = torch.split(latent_BCthw, effort.batch)
        return torch.cat([decode_latents(vae, part, effort.chunk, kind=best_kind(vae)) for part in parts])

    return _within_memory(decode, effort, (bucket.num_frames, bucket.height, bucket.width))[0]


def _within_memory(
    call: Callable[[Effort], torch.Tensor], effort: Effort, size: Sequence[int]
) -> tuple[torch.Tensor, Effort]:
    """Call with less and less effort until memory suffices."""
    while True:
        try:
            with torch.no_grad():
                return call(effort), effort
        except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
            smaller = effort.halved()
            if not _is_out_of_memory(error):
                raise
        if smaller is None:
            raise ModelError(f"one clip of {'x'.join(map(str, size))} (frames x height x width) does not fit into "
                             "memory, even one latent frame at a time; free memory, or ingest at a smaller "
                             "resolution")  # fmt: skip
        effort = smaller
        torch.cuda.empty_cache()


def encode_clips(vae: Any, video_BCTHW: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """One pass per chunk; stock tiled encoding when the user asked for tiling."""
    if vae.use_tiling:
        return normalise(vae, vae.encode(video_BCTHW).latent_dist.mode())
    return encode_mode(vae, video_BCTHW, chunk, best_kind(vae))


def best_kind(vae: Any) -> ConvKind:
    """The fastest way to convolve that is exact enough: on a CPU Winograd's, where a layer gains by it."""
    return "winograd" if vae.device.type == "cpu" else "conv3d"


def _is_out_of_memory(error: BaseException) -> bool:
    """CPU allocations fail with plain RuntimeErrors: those of c10/core/impl/alloc_cpu.cpp and of oneDNN."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "could not create a primitive"))
