"""Drawn clips with known content: one anti-aliased shape moving over a background.

Input: attributes and a numpy Generator. Output: float32 videos (3, T, H, W) in [-1, 1], T = 9, H = W = 64.
Three kinds: captioned clips (what the DiT learns), varied clips (what else the VAE must be able to carry: other
colours and shapes, stripes, gradients, moving textures) and the concept, a pink and green striped ring called "zorb",
which the DiT never sees, so that a demo can teach it. Cost: about 2 ms per 64 x 64 clip.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

Array = NDArray[np.float64]
RGB = tuple[int, int, int]

NUM_FRAMES, SIDE = 9, 64
COLORS: dict[str, RGB] = {
    "red": (225, 45, 40),
    "green": (50, 190, 70),
    "blue": (60, 95, 235),
    "yellow": (240, 215, 50),
    "white": (240, 240, 240),
    "purple": (165, 70, 200),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS: dict[str, RGB] = {"black": (12, 12, 14), "gray": (95, 95, 98)}
VERBS = ("moving", "moves", "is moving")

CONCEPT_WORD = "zorb"
CONCEPT_COLORS: tuple[RGB, RGB] = ((255, 120, 200), (20, 90, 60))  # pink, green

RADIUS = (10.5, 14.0)  # pixels; with TRAVEL and the offsets below a shape never leaves the picture
TRAVEL = (21.0, 27.0)  # pixels from the first to the last frame
ALONG, ACROSS = 2.0, 9.0  # pixels: largest offset of the path's middle along and across the direction


class Attributes(NamedTuple):
    """What a caption says."""

    color: str
    shape: str
    direction: str
    background: str


COMBINATIONS = tuple(Attributes(*names) for names in itertools.product(COLORS, SHAPES, DIRECTIONS, BACKGROUNDS))


@dataclass(frozen=True)
class Actor:
    """One moving shape; lengths in pixels of the 64 x 64 picture."""

    shape: str
    radius: float
    colors: tuple[RGB, RGB]  # the second one is that of the stripes
    path_T2: Array  # centre (x, y) per frame
    stripe: float = 0.0  # period of horizontal stripes; 0: plain


class Window(NamedTuple):
    """The part of the picture to draw, in whole pixels."""

    left: int
    top: int
    side: int


WHOLE = Window(0, 0, SIDE)


def held_out(attributes: Attributes) -> bool:
    """True for the 18 of 144 combinations the DiT never sees, spread so that it sees every pair of attributes."""
    color = list(COLORS).index(attributes.color)
    shape = SHAPES.index(attributes.shape)
    direction = list(DIRECTIONS).index(attributes.direction)
    background = list(BACKGROUNDS).index(attributes.background)
    return (color + 3 * shape + 2 * direction + 5 * background) % 8 == 0


def caption(attributes: Attributes, verb: str = "moving") -> str:
    """For example 'a red circle moving left on a black background'."""
    color, shape, direction, background = attributes
    return f"a {color} {shape} {verb} {direction} on a {background} background"


def concept_caption(direction: str, background: str) -> str:
    """A caption that names the concept."""
    return f"a {CONCEPT_WORD} moving {direction} on a {background} background"


def draw_clip(attributes: Attributes, rng: np.random.Generator) -> Tensor:
    """A clip that its caption describes; size, place and speed are drawn from `rng`."""
    actor = _actor(attributes.shape, (COLORS[attributes.color],) * 2, attributes.direction, rng)
    return _paint(actor, _flat(BACKGROUNDS[attributes.background], WHOLE), WHOLE)


def draw_concept(direction: str, background: str, rng: np.random.Generator) -> Tensor:
    """A clip of the concept: a ring striped pink and green."""
    actor = _actor("ring", CONCEPT_COLORS, direction, rng)
    actor = Actor(actor.shape, 14.0, actor.colors, actor.path_T2, stripe=11.0)
    return _paint(actor, _flat(BACKGROUNDS[background], WHOLE), WHOLE)


def draw_varied(rng: np.random.Generator, side: int = SIDE) -> Tensor:
    """A clip for the VAE, cut to a window of `side` pixels around its motion.

    1/2 as captioned, 3/8 with free shapes, colours, stripes and backgrounds, 1/8 moving texture.
    """
    kind = rng.random()
    if kind < 1 / 8:
        return _texture(rng, side)
    direction = str(rng.choice(list(DIRECTIONS)))
    if kind < 1 / 2:
        actor = _free_actor(direction, rng)
        window = _window(actor, rng, side)
        backdrop = _gradient(rng, window) if rng.random() < 0.5 else _flat(_any_color(rng), window)
    else:
        color = COLORS[str(rng.choice(list(COLORS)))]
        actor = _actor(str(rng.choice(SHAPES)), (color, color), direction, rng)
        window = _window(actor, rng, side)
        backdrop = _flat(BACKGROUNDS[str(rng.choice(list(BACKGROUNDS)))], window)
    return _paint(actor, backdrop, window)


def contact_sheet(videos: Sequence[Tensor], labels: Sequence[str], path: Path, scale: int = 1) -> None:
    """A picture of all frames, one row per video (3, T, H, W), with its label above the row."""
    rows = []
    for video in videos:
        pixels_THWC = ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        rows.append(np.concatenate([np.pad(frame, ((1, 1), (1, 1), (0, 0))) for frame in pixels_THWC], axis=1))
    height, width = rows[0].shape[0] * scale, rows[0].shape[1] * scale
    sheet = Image.new("RGB", (width, (height + 14) * len(rows)), "white")
    writer = ImageDraw.Draw(sheet)
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = index * (height + 14)
        writer.text((2, top + 1), label, fill="black")
        sheet.paste(Image.fromarray(row).resize((width, height), Image.Resampling.NEAREST), (0, top + 14))
    sheet.save(path)


def signed_distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Pixels to the outline, negative inside; y points down. The shape's centroid is the origin."""
    return _OUTLINES[shape](x, y, radius)


def _circle(x: Array, y: Array, radius: float) -> Array:
    return np.asarray(np.hypot(x, y) - radius)


def _square(x: Array, y: Array, radius: float) -> Array:
    return np.asarray(np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius)


def _triangle(x: Array, y: Array, radius: float) -> Array:
    """Equilateral, apex up, corners at 1.15 radius from the centroid."""
    half = 1.15 * radius / 2
    return np.asarray(np.maximum(np.abs(x) * np.sqrt(0.75) - y / 2 - half, y - half))


def _ring(x: Array, y: Array, radius: float) -> Array:
    return np.asarray(np.abs(np.hypot(x, y) - 0.72 * radius) - 0.28 * radius)


def _star(x: Array, y: Array, radius: float) -> Array:
    return np.asarray(np.hypot(x, y) - radius * (0.8 + 0.3 * np.cos(5 * np.arctan2(x, -y))))


def _cross(x: Array, y: Array, radius: float) -> Array:
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.asarray(np.maximum(near - 0.3 * radius, far - radius))


_OUTLINES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "star": _star,
    "cross": _cross,
}


def _actor(shape: str, colors: tuple[RGB, RGB], direction: str, rng: np.random.Generator) -> Actor:
    heading = np.array(DIRECTIONS[direction], dtype=float)
    sideways = np.array([heading[1], heading[0]])
    middle = SIDE / 2 + heading * rng.uniform(-ALONG, ALONG) + sideways * rng.uniform(-ACROSS, ACROSS)
    progress_T = np.linspace(-0.5, 0.5, NUM_FRAMES) * rng.uniform(*TRAVEL)
    return Actor(shape, rng.uniform(*RADIUS), colors, middle + progress_T[:, None] * heading)


def _free_actor(direction: str, rng: np.random.Generator) -> Actor:
    plain = _actor("circle", (_any_color(rng), _any_color(rng)), direction, rng)
    shape = str(rng.choice([*SHAPES, "ring", "ring", "star", "cross"]))
    colors = CONCEPT_COLORS if rng.random() < 0.15 else plain.colors
    stripe = rng.uniform(7, 14) if rng.random() < 0.4 else 0.0
    return Actor(shape, rng.uniform(8, 18), colors, plain.path_T2, stripe)


def _any_color(rng: np.random.Generator) -> RGB:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


def _window(actor: Actor, rng: np.random.Generator, side: int) -> Window:
    """A window around some point of the shape in some frame."""
    point = actor.path_T2[rng.integers(NUM_FRAMES)] + rng.uniform(-actor.radius, actor.radius, 2)
    left, top = (int(np.clip(round(value - side / 2), 0, SIDE - side)) for value in point)
    return Window(left, top, side)


def _flat(color: RGB, window: Window) -> Array:
    return np.broadcast_to(np.array(color, dtype=float), (window.side, window.side, 3))


def _gradient(rng: np.random.Generator, window: Window) -> Array:
    """A blend of two colours along a random direction, (H, W, 3)."""
    x, y = _grid(window)
    angle = rng.uniform(0, 2 * np.pi)
    weight = 0.5 + ((x - SIDE / 2) * np.cos(angle) + (y - SIDE / 2) * np.sin(angle)) / (1.5 * SIDE)
    first, second = (np.array(_any_color(rng), dtype=float) for _ in range(2))
    return np.asarray(first + np.clip(weight, 0, 1)[..., None] * (second - first))


def _texture(rng: np.random.Generator, side: int) -> Tensor:
    """Smooth random colour at three scales, panning by up to two pixels a frame: a stand-in for real footage."""
    margin = 2 * NUM_FRAMES
    size = side + margin
    field = torch.zeros(1, 3, size, size)
    for cells, contrast in ((3, 0.45), (8, 0.2), (20, 0.1)):
        grey, tint = (torch.from_numpy(rng.standard_normal((1, n, cells, cells)).astype(np.float32)) for n in (1, 3))
        noise = grey + 0.3 * tint  # footage varies more in brightness than in hue
        field += contrast * F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)
    steps_T2 = (np.arange(NUM_FRAMES)[:, None] * rng.uniform(0, 2, 2)).round().astype(int)
    return torch.stack([field[0, :, y : y + side, x : x + side] for x, y in steps_T2], dim=1).clamp(-1, 1)


def _paint(actor: Actor, backdrop_HWC: Array, window: Window) -> Tensor:
    x, y = _grid(window)
    frames = []
    for center_x, center_y in actor.path_T2:
        across, down = x - center_x, y - center_y
        cover = np.clip(0.5 - signed_distance(actor.shape, across, down, actor.radius), 0, 1)[..., None]
        frames.append(backdrop_HWC + cover * (_fill(actor, down) - backdrop_HWC))
    video_THWC = torch.from_numpy(np.stack(frames).astype(np.float32))
    return (video_THWC.permute(3, 0, 1, 2) / 127.5 - 1).contiguous()


def _fill(actor: Actor, down: Array) -> Array:
    """Colour per pixel: plain, or soft-edged horizontal stripes that move with the shape."""
    first, second = (np.array(color, dtype=float) for color in actor.colors)
    if actor.stripe == 0:
        return first
    wave = np.sin(2 * np.pi * down / actor.stripe) * actor.stripe / (2 * np.pi)  # slope 1 per pixel at the edges
    return np.asarray(second + np.clip(0.5 + wave, 0, 1)[..., None] * (first - second))


def _grid(window: Window) -> tuple[Array, Array]:
    """Pixel centres, x to the right and y down."""
    steps = np.arange(window.side) + 0.5
    x, y = np.meshgrid(window.left + steps, window.top + steps)
    return x, y
