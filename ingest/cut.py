"""Source -> clips -> windows: which frames become samples. Input: facts and config. Output: spans. Cost: none.

Windows live on a grid: slot k of rate r is the time k / r seconds from the file's start, and shows the latest frame
whose time, rounded to the grid (half up), is at most k. That is what ffmpeg's `fps=r:round=near` makes, whatever frame
decoding begins at; so the same slot has the same pixels in every process.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from ingest.probe import MICRO, Facts
from shared.keys import fingerprint

AUTO_WINDOWS = 4  # at most, per clip
SPEEDS = {"slow": Fraction(4, 5), "fast": Fraction(5, 4)}
SLACK = 1e-3  # of a slot; times are known to a microsecond
Strategy = Literal["uniform", "random", "keyframe", "stretch"]


@dataclass(frozen=True)
class Clip:
    """A frame span of a source, in seconds; no scene change is inside."""

    start: float
    end: float


@dataclass(frozen=True)
class Window:
    """`count` slots of the grid of `rate` slots per second, from slot `first`; `variant` is a temporal augmentation."""

    rate: Fraction
    first: int
    count: int
    variant: str = "plain"
    origin: tuple[Fraction, int] | None = None  # (rate, first) of the plain window that it is a variant of

    @property
    def plain(self) -> "Window":
        """The window that this one is a variant of: itself for most."""
        rate, first = self.origin or (self.rate, self.first)
        return Window(rate, first, self.count)

    @property
    def still(self) -> bool:
        """The one frame of a picture."""
        return self.rate == 0

    @property
    def start(self) -> float:
        """Seconds from the file's start."""
        return 0.0 if self.still else float(self.first / self.rate)

    @property
    def duration(self) -> float:
        """Seconds of the source."""
        return 0.0 if self.still else float(self.count / self.rate)

    @property
    def reverse(self) -> bool:
        """Frames play backwards."""
        return self.variant == "reverse"


STILL = Window(Fraction(0), 0, 1)


def grid_rate(fps: float) -> Fraction:
    """Frames per second as a fraction; 23.976 stays 2997/125."""
    return Fraction(fps).limit_denominator(10_000)


def slots(clip: Clip, rate: Fraction) -> range:
    """Slots that show frames of the clip only."""
    first = math.ceil(clip.start * rate - SLACK)
    return range(first, max(first, math.floor(clip.end * rate + 0.5 - SLACK)))


def cut(facts: Facts, max_duration: float | None, scenes: tuple[float, ...]) -> list[Clip]:
    """Clips of a source: the whole of it, or, when it is longer than max_duration, its scenes in equal parts.

    `scenes`: times of scene changes in seconds.
    """
    if max_duration is None or facts.end - facts.start <= max_duration + SLACK:
        return [Clip(facts.start, facts.end)]
    borders = [facts.start, *(time for time in scenes if facts.start < time < facts.end), facts.end]
    clips = []
    for start, end in pairwise(borders):
        parts = math.ceil((end - start) / max_duration - SLACK)
        steps = [start + (end - start) * part / parts for part in range(parts + 1)]
        clips += [Clip(*pair) for pair in pairwise(steps)]
    return clips


@dataclass(frozen=True)
class WindowRule:
    """How windows are chosen: frames and frames/s of samples, how many per clip (None: AUTO), where they start."""

    num_frames: int
    fps: float
    per_clip: int | None
    strategy: Strategy
    seed: int


def windows(clip: Clip, rule: WindowRule, keyframes: tuple[float, ...], source: str) -> list[Window]:
    """Windows of a clip in order of time, none when it is too short; `source` (its sha256) seeds the random ones."""
    if rule.strategy == "stretch":
        return [stretched(clip, rule.num_frames)] if clip.end > clip.start else []
    rate = grid_rate(rule.fps)
    grid = slots(clip, rate)
    room = len(grid) - rule.num_frames  # of the last start
    if room < 0:
        return []
    count = rule.per_clip or min(AUTO_WINDOWS, len(grid) // rule.num_frames)
    if rule.strategy == "uniform":
        offsets = spread(range(room + 1), count)
    elif rule.strategy == "random":
        draw = random.Random(fingerprint(seed=rule.seed, source=source, clip=clip.start))
        offsets = draw.sample(range(room + 1), min(count, room + 1))
    else:
        at = sorted({math.ceil(time * rate - SLACK) - grid.start for time in keyframes})
        inside = [offset for offset in at if 0 <= offset <= room]
        offsets = spread(inside if rule.per_clip else apart(inside, rule.num_frames), count)
    return [Window(rate, grid.start + offset, rule.num_frames) for offset in sorted(set(offsets))]


def apart(offsets: list[int], gap: int) -> list[int]:
    """The offsets that are at least `gap` after the one taken before, from the first on."""
    taken: list[int] = []
    for offset in offsets:
        if not taken or offset - taken[-1] >= gap:
            taken.append(offset)
    return taken


def spread(choices: Sequence[int], count: int) -> list[int]:
    """`count` of the choices, evenly spaced, from the first to the last; one alone is the first."""
    if count <= 1 or len(choices) <= 1:
        return list(choices[:1])
    count = min(count, len(choices))
    return [choices[part * (len(choices) - 1) // (count - 1)] for part in range(count)]


def stretched(clip: Clip, num_frames: int) -> Window:
    """One window of all of the clip: its frames are spread, so motion is faster or slower than life."""
    length = Fraction(clip.end - clip.start).limit_denominator(MICRO)
    rate = num_frames / length
    if len(slots(clip, rate)) < num_frames:  # the grid does not begin where the clip begins
        rate = (num_frames + 1) / length
    return Window(rate, slots(clip, rate).start, num_frames)


def variants(window: Window, clip: Clip, reversible: bool) -> list[Window]:
    """The window's temporal augmentations that fit in the clip: half a window later, slower, faster, backwards."""
    origin = (window.rate, window.first)
    made = [Window(window.rate, window.first + window.count // 2, window.count, "shift", origin)]
    for variant, speed in SPEEDS.items():
        rate = window.rate / speed
        made.append(Window(rate, math.ceil(window.first / window.rate * rate), window.count, variant, origin))
    fitting = [other for other in made if other.first + other.count <= slots(clip, other.rate).stop]
    if reversible:
        fitting.append(Window(window.rate, window.first, window.count, "reverse", origin))
    return fitting
