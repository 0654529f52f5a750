"""Reads from pixels what a clip shows, so that following a caption can be counted.

Input: videos (3, T, H, W) in [-1, 1]. The shape is read by comparing its soft mask, frame by frame, with drawn
templates of the same area and centroid; the one that overlaps most wins. Cost: about 5 ms per clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tests.tiny.draw import BACKGROUNDS, COLORS, CONCEPT_COLORS, DIRECTIONS, SHAPES, Attributes, signed_distance

Array = NDArray[np.float64]
UNIT_AREA = {"circle": np.pi, "square": (2 * 0.86) ** 2, "triangle": 1.15**2 * np.sqrt(27) / 4}  # at radius 1
SMALLEST_AREA = 30.0  # pixels; frames with less show nothing
SMALLEST_PATH = 6.0  # pixels between the first and the last frame
NOTHING = Attributes("none", "none", "none", "none")


def read_clip(video: Tensor) -> Attributes:
    """Colour, shape, direction and background; 'none' where there is nothing to read."""
    pixels_THWC = _pixels(video)
    backdrop = np.median(pixels_THWC.reshape(-1, 3), axis=0)
    distance_THW = np.linalg.norm(pixels_THWC - backdrop, axis=-1)
    strong = distance_THW > 0.6 * np.quantile(distance_THW, 0.995)
    color = np.median(pixels_THWC[strong], axis=0) if strong.any() else backdrop
    contrast = float(np.linalg.norm(color - backdrop))
    if contrast < 20:
        return NOTHING
    mask_THW = np.clip(distance_THW / contrast, 0, 1)
    mask_THW[mask_THW < 0.15] = 0  # what is left of noise in the background
    seen = [index for index, mask in enumerate(mask_THW) if mask.sum() >= SMALLEST_AREA]
    if len(seen) < len(mask_THW) / 2:
        return NOTHING
    centers = np.array([_centroid(mask_THW[index]) for index in seen])
    direction = _direction(np.array(seen), centers, len(mask_THW))
    overlaps = {shape: np.mean([_overlap(mask_THW[i], shape) for i in seen]) for shape in SHAPES}
    return Attributes(_nearest(color, COLORS), max(SHAPES, key=lambda shape: overlaps[shape]), direction,
                      _nearest(backdrop, BACKGROUNDS))  # fmt: skip


def count_followed(videos: Iterable[Tensor], asked: Sequence[Attributes]) -> dict[str, int]:
    """How many clips show what was asked, per attribute and for all four at once."""
    counts = dict.fromkeys([*Attributes._fields, "all"], 0)
    for video, wanted in zip(videos, asked, strict=True):
        found = read_clip(video)
        for name, got, want in zip(Attributes._fields, found, wanted, strict=True):
            counts[name] += got == want
        counts["all"] += found == wanted
    return counts


def concept_share(video: Tensor) -> tuple[float, float]:
    """Shares of the foreground that are the concept's pink and green: near 0 without it, near 0.45 each with it."""
    pixels = _pixels(video).reshape(-1, 3)
    foreground = pixels[np.abs(pixels - np.median(pixels, axis=0)).sum(axis=1) > 60]
    if len(foreground) == 0:
        return 0.0, 0.0
    pink, green = (float((np.abs(foreground - np.array(c)).sum(axis=1) < 110).mean()) for c in CONCEPT_COLORS)
    return pink, green


def _pixels(video: Tensor) -> Array:
    scaled: Array = ((video.detach().clamp(-1, 1).double() + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    return scaled


def _nearest(color: Array, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.abs(color - np.array(palette[name])).sum()))


def _centroid(mask_HW: Array) -> tuple[float, float]:
    rows, columns = np.indices(mask_HW.shape) + 0.5
    area = mask_HW.sum()
    return float((columns * mask_HW).sum() / area), float((rows * mask_HW).sum() / area)


def _direction(frames: Array, centers_T2: Array, num_frames: int) -> str:
    """The axis and sign of the fitted straight path."""
    slope = np.polyfit(frames, centers_T2, 1)[0] * (num_frames - 1)
    if np.abs(slope).max() < SMALLEST_PATH:
        return "none"
    return max(DIRECTIONS, key=lambda name: float(slope @ np.array(DIRECTIONS[name])))


def _overlap(mask_HW: Array, shape: str) -> float:
    """Soft intersection over union with the shape of the mask's own area and centroid."""
    center_x, center_y = _centroid(mask_HW)
    rows, columns = np.indices(mask_HW.shape) + 0.5
    radius = float(np.sqrt(mask_HW.sum() / UNIT_AREA[shape]))
    template = np.clip(0.5 - signed_distance(shape, columns - center_x, rows - center_y, radius), 0, 1)
    return float(np.minimum(mask_HW, template).sum() / np.maximum(mask_HW, template).sum())
