"""Clip -> samples: bucket, crop, scale and key are decided here, once. Input: facts, windows, config. Cost: none.

A key is the hash of all that determines a sample's pixels; captions, names and dates are not in it.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

from ingest.colour import refuse_unsupported
from ingest.cut import STILL, Clip, Strategy, Window, WindowRule, cut, variants, windows
from ingest.probe import Facts, Unusable
from shared.bucket import Bucket
from shared.config import Config
from shared.errors import ConfigError
from shared.geometry import Geometry
from shared.keys import fingerprint

INGEST_VERSION = 1  # part of every key; raise it when the same input would give other pixels
Extension = Literal["mp4", "png", "mkv"]


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Sample:
    """What is made of one window at one resolution: `content` of the stored picture is scaled and cut at `crop`."""

    key: str
    clip_key: str  # shared by the variants of a window
    window: Window
    bucket: Bucket
    fps: float
    content: Box  # in stored pixels after rotation
    scaled: tuple[int, int]  # width, height
    crop: tuple[int, int]  # left, top in the scaled picture
    extension: Extension

    @property
    def files(self) -> tuple[str, str]:
        """Names of what is made of it: a thumbnail for people, and the sample, which stands for both being there."""
        return f"{self.key}.jpg", f"{self.key}.{self.extension}"

    def enlarges(self, pixel_aspect: float) -> bool:
        """Whether the bucket has more pixels than the content, whose pixels are `pixel_aspect` as wide as high."""
        return self.bucket.width > self.content.width * pixel_aspect or self.bucket.height > self.content.height


@dataclass(frozen=True)
class ClipPlan:
    """A clip and its samples. `look` names the black-bar measurement its first transcode has to make."""

    clip: Clip
    samples: tuple[Sample, ...]
    look: str | None = None


@dataclass(frozen=True)
class Planner:
    """The settings that decide samples."""

    config: Config
    geometry: Geometry

    @property
    def rule(self) -> WindowRule:
        """How windows are chosen."""
        video, per_clip = self.config.video_config, self.config.windows_per_clip
        strategy: Strategy = "stretch" if video.stretch else video.frame_sample_strategy
        count = None if per_clip == "AUTO" else per_clip
        return WindowRule(self.geometry.num_frames, self.geometry.fps, count, strategy, self.config.seed)

    def image(self, facts: Facts, source: str) -> list[ClipPlan]:
        """Samples of a still picture; raises Unusable."""
        self.refuse_small(facts)
        return [ClipPlan(Clip(0, 0), tuple(self.samples(facts, source, STILL, None)))]

    def video(self, facts: Facts, source: str, scenes: tuple[float, ...], reversible: bool) -> list[ClipPlan]:
        """Clips of a video with their windows, not yet knowing of black bars; raises Unusable."""
        self.refuse_small(facts)
        refuse_unsupported(facts)
        video, shortest = self.config.video_config, self.config.gates.min_duration
        length = facts.end - facts.start
        if shortest is not None and length < shortest:
            raise Unusable(f"too short: {length:.2f} s, gates.min_duration asks for {shortest:g}", length)
        plans = []
        for clip in cut(facts, video.max_duration, scenes):
            chosen = windows(clip, self.rule, facts.keyframes, source)
            every = self.with_variants(chosen, clip, reversible)
            samples = [sample for window in every for sample in self.samples(facts, source, window, None)]
            look = fingerprint(source=source, windows=[span_of(window) for window in chosen]) if samples else None
            plans.append(ClipPlan(clip, tuple(samples), look if self.config.gates.letterbox else None))
        return plans

    def with_variants(self, chosen: list[Window], clip: Clip, reversible: bool) -> list[Window]:
        """The windows, each followed by its temporal augmentations; no frames twice."""
        if not self.config.video_config.temporal_augmentation:
            return chosen
        spans = {span_of(window): window for window in chosen}
        for window in chosen:
            for variant in variants(window, clip, reversible):
                spans.setdefault(span_of(variant), variant)
        return sorted(spans.values(), key=lambda window: (window.plain.first, window.plain.rate))

    def cropped(self, facts: Facts, source: str, plan: ClipPlan, bars: Box | None) -> ClipPlan:
        """The plan once the clip's black bars are known (None: it has none)."""
        if bars is None:
            return ClipPlan(plan.clip, plan.samples)
        chosen = dict.fromkeys(sample.window for sample in plan.samples)
        samples = [sample for window in chosen for sample in self.samples(facts, source, window, bars)]
        return ClipPlan(plan.clip, tuple(samples))

    def too_short(self, facts: Facts, clip: Clip) -> str:
        """Why a clip has no window."""
        frames, fps = self.geometry.num_frames, self.geometry.fps
        if self.rule.strategy == "keyframe" and (clip.end - clip.start) * fps >= frames:
            return f"no I-frame has {frames} frames at {fps:g} frames/s after it"
        length = f"{clip.end - clip.start:.2f} s ({facts.fps:g} frames/s)"
        return f"too short: {length}; {frames} frames at {fps:g} frames/s need {frames / fps:.2f} s"

    def refuse_small(self, facts: Facts) -> None:
        """Raise Unusable when the shorter side is below min_resolution."""
        shorter, least = min(facts.display_width, facts.height), self.config.video_config.min_resolution
        if shorter < least:
            raise Unusable(
                f"too small: {facts.display_width:.0f}x{facts.height}, video_config.min_resolution is {least}", shorter
            )

    def samples(self, facts: Facts, source: str, window: Window, bars: Box | None) -> list[Sample]:
        """One sample per distinct bucket of the resolutions asked for."""
        content = bars or Box(0, 0, facts.width, facts.height)
        width, height = content.width * facts.pixel_aspect, float(content.height)
        buckets = [self.geometry.bucket(height, width, size, window.still) for size in self.geometry.resolutions]
        return [self.sample(source, window, content, (width, height), bucket) for bucket in dict.fromkeys(buckets)]

    def sample(self, source: str, window: Window, content: Box, display: tuple[float, float], bucket: Bucket) -> Sample:
        """Fix scale, crop and key."""
        extension: Extension = "mkv" if self.config.codec == "lossless" else "mp4"
        if window.still:
            extension = "png"
        scaled = cover(display, bucket)
        top = 0 if self.config.crop == "top" else middle(scaled[1], bucket.height)
        crop = middle(scaled[0], bucket.width), top
        fps = 1.0 if window.still else self.geometry.fps
        made = {"version": INGEST_VERSION, "source": source, "content": asdict(content), "scaled": scaled, "crop": crop,
                "bucket": asdict(bucket), "fps": fps, "extension": extension}  # fmt: skip
        return Sample(
            key=fingerprint(**made, span=span_of(window)),
            clip_key=fingerprint(**made, span=span_of(window.plain)),
            window=window,
            bucket=bucket,
            fps=fps,
            content=content,
            scaled=scaled,
            crop=crop,
            extension=extension,
        )


def span_of(window: Window) -> tuple[str, int, int, bool]:
    """What of a window determines pixels."""
    return str(window.rate), window.first, window.count, window.reverse


def cover(display: tuple[float, float], bucket: Bucket) -> tuple[int, int]:
    """The least even (width, height) of the display's aspect that covers the bucket."""
    factor = max(bucket.width / display[0], bucket.height / display[1])

    def side(length: float, least: int) -> int:
        return max(least, 2 * math.ceil(length * factor / 2 - 1e-6))

    return side(display[0], bucket.width), side(display[1], bucket.height)


def middle(side: int, kept: int) -> int:
    """Where the middle `kept` pixels of a side begin; even, because 4:2:0 cannot be cut elsewhere."""
    return (side - kept) // 4 * 2


def refuse_unknown_folders(config: Config, folders: set[str]) -> None:
    """Raise ConfigError for settings that name a sub-folder which the dataset does not have."""
    named = [(f"concepts.{name}", name) for name in config.concepts]
    named += [("prior.folders", name) for name in config.prior.folders]
    named += [("validation.folder", config.validation.folder)] if config.validation.folder is not None else []
    for key, name in named:
        if not any(in_folder(folder, name) for folder in folders):
            there = ", ".join(sorted(folder for folder in folders if folder)) or "none"
            raise ConfigError(f"{key}: no sub-folder {name!r} with videos or images in DATA; there are: {there}")


def in_folder(folder: str, name: str) -> bool:
    """Whether `folder` is `name` or below it."""
    return folder == name or folder.startswith(f"{name}/")
