"""Look at latents: decode them to MP4 files and to one PNG contact sheet, several sources side by side.

Input: safetensors files with tensors "0", "1", ... (normalised latents, C T h w) and metadata "labels", a JSON list.
Output: `<file>_<n>.mp4` and `sheet.png` in the output folder. Files are compared: row n of the sheet shows tensor n
of every file beside each other, under one label.
"""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from shared.errors import RunError
from shared.files import atomic_write

Frames = NDArray[np.uint8]  # (T, H, W, C)
SHOWN = 5  # frames of a clip on the sheet, evenly spaced
SHEET_SIDE = 320  # pixels of a frame's longer side on a sheet of previews, at most: a few hundred kB each
TEXT_HEIGHT, GAP = 14, 8  # pixels
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Latents:
    """One file of latents: its name and (label, latent_CThw float32) pairs."""

    name: str
    clips: tuple[tuple[str, Any], ...]


def read_latents(path: Path) -> Latents:
    """Load a latents file; raises RunError when it is not one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys(), key=int)
            labels = json.loads((file.metadata() or {}).get("labels", "[]"))
            tensors = [file.get_tensor(name).float() for name in names]
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path} is not a file of latents ({error}); it needs tensors named 0, 1, 2 ...") from None
    labels = [*labels, *names[len(labels) :]]
    return Latents(path.stem, tuple(zip(labels, tensors, strict=True)))


def decode_latent(vae: Any, latent_CThw: Any) -> Frames:
    """Pixels of one normalised latent."""
    from encode.budget import decode_within_memory

    return to_frames(decode_within_memory(vae, latent_CThw[None].to(vae.device, vae.dtype))[0])


def to_frames(video_CTHW: Any) -> Frames:
    """[-1, 1] pixels (C, T, H, W) to uint8 frames."""
    frames = ((video_CTHW.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return np.asarray(frames.permute(1, 2, 3, 0).cpu().numpy())


def write_mp4(path: Path, frames_THWC: Frames, fps: float) -> None:
    """H.264 in 4:2:0, near lossless, tagged bt709; sides must be even."""
    with atomic_write(path) as file, av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "12"}
        stream.color_range, stream.colorspace = 1, 1  # tv, bt709
        for pixels in frames_THWC:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())


def contact_sheet(columns: dict[str, list[Frames]], labels: list[str]) -> Image.Image:
    """Column name -> clips; row n shows every column's clip n as a strip of frames, under the row's label."""
    strips = {name: [strip(clip) for clip in clips] for name, clips in columns.items()}
    widths = [max(image.width for image in images) for images in strips.values()]
    rows = [max(images[row].height for images in strips.values() if row < len(images)) for row in range(len(labels))]
    size = (sum(widths) + GAP * (len(widths) + 1), sum(rows) + (TEXT_HEIGHT + GAP) * len(rows) + TEXT_HEIGHT + GAP)
    sheet = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(sheet)
    x = GAP
    for (name, images), width in zip(strips.items(), widths, strict=True):
        draw.text((x, 2), name, BLACK)
        y = TEXT_HEIGHT + GAP
        for label, image, height in zip(labels, images, rows, strict=False):
            draw.text((x, y), label, BLACK)
            sheet.paste(image, (x, y + TEXT_HEIGHT))
            y += height + TEXT_HEIGHT + GAP
        x += width + GAP
    return sheet


def shrunk(frames_THWC: Frames) -> Frames:
    """The frames that a sheet shows, at its size."""
    chosen = frames_THWC[shown(len(frames_THWC))]
    factor = max(1, math.ceil(max(frames_THWC.shape[1:3]) / SHEET_SIDE))
    return np.stack([np.asarray(Image.fromarray(frame).reduce(factor)) for frame in chosen])


def shown(count: int) -> NDArray[np.int64]:
    """Numbers of the frames on a sheet."""
    return np.linspace(0, count - 1, min(SHOWN, count)).round().astype(np.int64)


def strip(frames_THWC: Frames) -> Image.Image:
    """A few frames of a clip beside each other."""
    return Image.fromarray(np.concatenate(list(frames_THWC[shown(len(frames_THWC))]), axis=1))


def write_sheet(path: Path, sheet: Image.Image) -> None:
    """Save as PNG, atomically."""
    with atomic_write(path) as file:
        sheet.save(file, "PNG")


def preview(vae: Any, files: list[Latents], out: Path, fps: float) -> list[Path]:
    """Decode every latent of every file; returns what was written, the sheet last."""
    written: list[Path] = []
    columns: dict[str, list[Frames]] = {}
    for number, latents in enumerate(files):
        name = latents.name if latents.name not in columns else f"{latents.name}-{number}"
        columns[name] = []
        for clip, (_, latent_CThw) in enumerate(latents.clips):
            frames_THWC = decode_latent(vae, latent_CThw)
            written.append(out / f"{name}_{clip}.mp4")
            write_mp4(written[-1], frames_THWC, fps)
            columns[name].append(shrunk(frames_THWC))
    labels = [label for label, _ in max((latents.clips for latents in files), key=len)]
    write_sheet(out / "sheet.png", contact_sheet(columns, labels))
    return [*written, out / "sheet.png"]
