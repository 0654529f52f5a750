"""Buckets: num_frames x height x width in pixels, and the few rules by which a clip gets one."""

import math
import re
from dataclasses import dataclass

from shared.errors import ConfigError

ASPECT_LIMIT = 2.0  # width/height of generated buckets lies in [1/2, 2]; wider clips are cropped to it


@dataclass(frozen=True, order=True)
class Bucket:
    """Size of a sample in pixels; num_frames is 4n+1, height and width are multiples of the model's grid."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"


def round_frames(frames: float) -> int:
    """Nearest 4n+1, ties up: 8 -> 9, 12 -> 13, 16 -> 17, 3 -> 5; at least 1."""
    return max(1, 4 * math.floor((frames - 1) / 4 + 0.5) + 1)


def round_to_grid(side: float, grid: int) -> int:
    """Nearest multiple of `grid` pixels, ties up, at least one."""
    return max(1, math.floor(side / grid + 0.5)) * grid


def parse_resolution(text: str) -> list[tuple[int, int] | int]:
    """'384,512' -> [384, 512] (areas of 384x384 ...); '832x480' -> [(832, 480)] (exactly that, width x height)."""
    sizes: list[tuple[int, int] | int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"\s*(\d+)(?:\s*[xX*]\s*(\d+))?\s*", part)) or not int(match[1]):
            raise ConfigError(f"resolution: {text!r} is not like '512', '384,512,640' or '832x480'")
        sizes.append((int(match[1]), int(match[2])) if match[2] else int(match[1]))
    return list(dict.fromkeys(sizes))


def parse_bucket(text: str, grid: int) -> Bucket:
    """'832x480x81' (width x height x frames) -> Bucket, on the model's grid."""
    match = re.fullmatch(r"\s*(\d+)[xX*](\d+)[xX*](\d+)\s*", text)
    if not match:
        raise ConfigError(f"size {text!r} is not like 832x480x81 (width x height x frames)")
    width, height, frames = map(int, match.groups())
    return Bucket(round_frames(frames), round_to_grid(height, grid), round_to_grid(width, grid))


def aspect_sizes(area_side: int, grid: int) -> list[tuple[int, int]]:
    """All (height, width) on the grid whose area is nearest to area_side^2, one per height, aspect within the limit."""
    area = area_side * area_side
    sizes = set()
    for height in range(grid, 2 * area_side + grid, grid):
        width = round_to_grid(area / height, grid)
        if 1 / ASPECT_LIMIT <= width / height <= ASPECT_LIMIT:
            sizes.add((height, width))
    side = round_to_grid(area_side, grid)
    return sorted(sizes | {(side, side)})


def nearest_size(height: float, width: float, resolution: tuple[int, int] | int, grid: int) -> tuple[int, int]:
    """The (height, width) a clip of this display size is cropped to: nearest log aspect, then nearest area."""
    if isinstance(resolution, tuple):
        return round_to_grid(resolution[1], grid), round_to_grid(resolution[0], grid)

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        aspect = abs(math.log(size[1] / size[0]) - math.log(width / height))
        return round(aspect, 9), abs(size[0] * size[1] - resolution * resolution)

    return min(aspect_sizes(resolution, grid), key=distance)
