"""Clip -> samples: bucket, crop, scale and key are decided here, once. Input: facts, windows, config. Cost: none.

A key is the hash of all that determines a sample's pixels; captions, names and dates are not in it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Literal

from ingest.colour import refuse_unsupported
from ingest.crop import Focus, busiest, cover, is_choice, middle
from ingest.cut import STILL, Clip, Strategy, Window, WindowRule, cut, variants, windows
from ingest.probe import Facts, Unusable
from shared.bucket import Bucket
from shared.config import Config
from shared.errors import ConfigError
from shared.geometry import Geometry
from shared.keys import fingerprint

INGEST_VERSION = 2  # part of every key; raise it when the same input would give other pixels
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
    undecided: bool = False  # the crop waits for the energy of its window

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
class Footage:
    """A source as plans see it; `focus`: energy of its windows, by focus_name, as far as it is known."""

    sha256: str
    facts: Facts
    focus: Mapping[str, Focus] = field(default_factory=dict)


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

    def image(self, source: Footage) -> list[ClipPlan]:
        """Samples of a still picture; raises Unusable."""
        self.refuse_small(source.facts)
        return [ClipPlan(Clip(0, 0), tuple(self.samples(source, STILL, None)))]

    def video(self, source: Footage, scenes: tuple[float, ...], reversible: bool) -> list[ClipPlan]:
        """Clips of a video with their windows, not yet knowing of black bars; raises Unusable."""
        facts = source.facts
        self.refuse_small(facts)
        refuse_unsupported(facts)
        video, shortest = self.config.video_config, self.config.gates.min_duration
        length = facts.end - facts.start
        if shortest is not None and length < shortest:
            raise Unusable(f"too short: {length:.2f} s, gates.min_duration asks for {shortest:g}", length)
        plans = []
        for clip in cut(facts, video.max_duration, scenes):
            chosen = windows(clip, self.rule, facts.keyframes, source.sha256)
            every = self.with_variants(chosen, clip, reversible)
            samples = [sample for window in every for sample in self.samples(source, window, None)]
            spans = [span_of(window) for window in chosen]
            look = fingerprint(source=source.sha256, windows=spans) if samples else None
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

    def cropped(self, source: Footage, plan: ClipPlan, bars: Box | None) -> ClipPlan:
        """The plan once the clip's black bars are known (None: it has none)."""
        if bars is None:
            return ClipPlan(plan.clip, plan.samples)
        chosen = dict.fromkeys(sample.window for sample in plan.samples)
        samples = [sample for window in chosen for sample in self.samples(source, window, bars)]
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

    def samples(self, source: Footage, window: Window, bars: Box | None) -> list[Sample]:
        """One sample per distinct bucket of the resolutions asked for."""
        content = bars or Box(0, 0, source.facts.width, source.facts.height)
        display = content.width * source.facts.pixel_aspect, float(content.height)
        buckets = [self.geometry.bucket(*display[::-1], size, window.still) for size in self.geometry.resolutions]
        return [
            self.sample(source, window, content, cover(display, bucket), bucket) for bucket in dict.fromkeys(buckets)
        ]

    def sample(self, source: Footage, window: Window, content: Box, scaled: tuple[int, int], bucket: Bucket) -> Sample:
        """Fix crop and key."""
        extension: Extension = "mkv" if self.config.codec == "lossless" else "mp4"
        if window.still:
            extension = "png"
        smart = self.config.crop == "smart" and any(map(is_choice, scaled, (bucket.width, bucket.height)))
        focus = source.focus.get(focus_name(source.sha256, window)) if smart else None
        crop = self.crop(source.facts, content, scaled, bucket, focus)
        fps = 1.0 if window.still else self.geometry.fps
        made = {"version": INGEST_VERSION, "source": source.sha256, "content": asdict(content), "scaled": scaled,
                "crop": crop, "bucket": asdict(bucket), "fps": fps, "extension": extension}  # fmt: skip
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
            undecided=smart and focus is None,
        )

    def crop(
        self, facts: Facts, content: Box, scaled: tuple[int, int], bucket: Bucket, focus: Focus | None
    ) -> tuple[int, int]:
        """(left, top) of what is kept of the scaled content."""
        left, top = middle(scaled[0], bucket.width), middle(scaled[1], bucket.height)
        if self.config.crop == "top":
            top = 0
        if focus and focus.across and is_choice(scaled[0], bucket.width):
            part = Fraction(content.left, facts.width), Fraction(content.left + content.width, facts.width)
            left = busiest(scaled[0], bucket.width, bytes.fromhex(focus.across), part)
        if focus and focus.down and is_choice(scaled[1], bucket.height):
            part = Fraction(content.top, facts.height), Fraction(content.top + content.height, facts.height)
            top = busiest(scaled[1], bucket.height, bytes.fromhex(focus.down), part)
        return left, top


def span_of(window: Window) -> tuple[str, int, int, bool]:
    """What of a window determines pixels."""
    return str(window.rate), window.first, window.count, window.reverse


def focus_name(source: str, window: Window) -> str:
    """Under which the energy of a window, and so of its variants, is known."""
    return fingerprint(source=source, focus=span_of(window.plain))


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
