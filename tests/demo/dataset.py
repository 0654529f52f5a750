"""Draw the demo's dataset: a folder of MP4 files with captions, as a user would have.

`zorb/` holds clips of a concept the tiny Wan has never seen, `ordinary/` clips of the kind it knows, which keep it from
forgetting them. Files that are there are left alone, so the folder can be edited and the demo run again.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import draw

FPS = 8  # the tiny Wan's own rate
SCALE = 4  # files are 256 x 256; ingest brings them back to 64 x 64
SEED = 7
CONCEPT_DIRECTIONS = ("left", "right", "up", "down")


def write_dataset(folder: Path, concept_clips: int = 16, ordinary_clips: int = 16) -> None:
    """Clips and captions under `folder`; seeded, so that every run draws the same."""
    rng = np.random.default_rng(SEED)
    backgrounds = list(draw.BACKGROUNDS)
    for number in range(concept_clips):
        direction, background = CONCEPT_DIRECTIONS[number % 4], backgrounds[number // 4 % 2]
        clip = draw.draw_concept(direction, background, rng)
        write_clip(folder / "zorb" / f"zorb_{number:02}.mp4", clip, draw.concept_caption(direction, background))
    known = [attributes for attributes in draw.COMBINATIONS if not draw.held_out(attributes)]
    for number, choice in enumerate(rng.choice(len(known), ordinary_clips, replace=False)):
        clip = draw.draw_clip(known[choice], rng)
        write_clip(folder / "ordinary" / f"clip_{number:02}.mp4", clip, draw.caption(known[choice]))


def write_clip(path: Path, video_CTHW: Tensor, text: str) -> None:
    """One MP4 beside its .txt; the name appears when the file is whole."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text(text + "\n")
    part = path.with_name(f"{path.name}.part")
    encode_mp4(part, video_CTHW)
    part.replace(path)


def encode_mp4(path: Path, video_CTHW: Tensor) -> None:
    """H.264 of pixels in [-1, 1], enlarged SCALE times."""
    frames_TCHW = F.interpolate(video_CTHW.transpose(0, 1), scale_factor=SCALE, mode="bicubic")
    pixels_THWC = ((frames_TCHW.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=Fraction(FPS), options={"crf": "10", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = *pixels_THWC.shape[1:3], "yuv420p"
        for frame in pixels_THWC:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def read_mp4(path: Path) -> Tensor:
    """Pixels (3, T, H, W) in [-1, 1] of a video file."""

    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
