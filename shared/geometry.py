"""From config and model to the sizes of samples: frames, fps, resolutions. Decided here once, obeyed by every stage."""

from dataclasses import dataclass

from shared.bucket import Bucket, nearest_size, parse_resolution, round_frames, round_to_grid
from shared.config import Config
from shared.errors import ConfigError
from shared.models import ModelSpec


@dataclass(frozen=True)
class Geometry:
    """The size decisions of a config for one model: made here once, obeyed by all stages."""

    num_frames: int
    fps: float
    resolutions: tuple[tuple[int, int] | int, ...]
    grid: int
    remarks: tuple[str, ...]
    max_side: int | None = None  # pixels; video_config.max_resolution

    def bucket(self, height: float, width: float, resolution: tuple[int, int] | int, image: bool = False) -> Bucket:
        """Bucket of a picture of this display size (pixels); an area shrinks until its longer side is in max_side."""
        size = nearest_size(height, width, resolution, self.grid)
        while self.max_side and isinstance(resolution, int) and max(size) > self.max_side and resolution > self.grid:
            resolution -= self.grid
            size = nearest_size(height, width, resolution, self.grid)
        return Bucket(1 if image else self.num_frames, *size)


def geometry(config: Config, spec: ModelSpec) -> Geometry:
    """Apply frames, max_frames, resolution and the wanted compression ratios; remarks say what was changed and why."""
    video = config.video_config
    asked = min(config.frames, video.max_frames) if video.max_frames else config.frames
    frames = round_frames(asked)
    remarks = [f"frames: {asked} -> {frames} (4n+1)"] if frames != asked else []
    fps = video.target_fps or spec.fps
    space = compression(video.spatial_compression_ratio, spec.vae.stride_THW[1], "spatial", remarks)
    time = compression(video.temporal_compression_ratio, spec.vae.stride_THW[0], "temporal", remarks)
    if time < 1:
        frames = round_frames(1 + (frames - 1) * time)
        fps *= time
    resolutions = parse_resolution(config.resolution)
    if space < 1:
        resolutions = [scaled(size, space, spec.grid) for size in resolutions]
    if video.max_resolution is not None:
        refuse_larger(resolutions, video.max_resolution, spec.grid)
    return Geometry(frames, fps, tuple(dict.fromkeys(resolutions)), spec.grid, tuple(remarks), video.max_resolution)


def refuse_larger(resolutions: list[tuple[int, int] | int], most: int, grid: int) -> None:
    """Raise ConfigError when no bucket, or an exact resolution, can have its longer side within max_resolution."""
    exact = [size for size in resolutions if isinstance(size, tuple) and max(size) > most]
    if most < grid or exact:
        wanted = f"resolution {exact[0][0]}x{exact[0][1]}" if exact else f"the model's grid of {grid} pixels"
        raise ConfigError(f"video_config.max_resolution: {most} is less than {wanted}; raise it, or set it to null")


def compression(wanted: int | None, own: int, name: str, remarks: list[str]) -> float:
    """VAE ratio / wanted ratio, at most 1: the VAE's own ratio is the least there is."""
    if wanted is None or wanted == own:
        return 1.0
    if wanted < own:
        remarks.append(f"video_config.{name}_compression_ratio: {wanted} is met by the VAE's own {own}")
        return 1.0
    remarks.append(
        f"video_config.{name}_compression_ratio: {wanted} is met by scaling down {wanted / own:g}x before the VAE"
    )
    return own / wanted


def scaled(size: tuple[int, int] | int, factor: float, grid: int) -> tuple[int, int] | int:
    """A resolution scaled by `factor`, on the grid."""
    if isinstance(size, tuple):
        return round_to_grid(size[0] * factor, grid), round_to_grid(size[1] * factor, grid)
    return round_to_grid(size * factor, grid)
