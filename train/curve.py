"""A line chart as a PNG, drawn with Pillow. Input: named lines of (x, y) points. Output: an image."""

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

Line = Sequence[tuple[float, float]]
SIZE, LEFT, TOP, RIGHT, BOTTOM = (900, 480), 70, 40, 20, 50  # pixels
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
INK, GRID = "#202020", "#dddddd"
TICKS = 5


def chart(lines: Mapping[str, Line], title: str, across: str) -> Image.Image:
    """Draw the lines on common axes; each has at least one point. `across` names the x axis."""
    points = [point for line in lines.values() for point in line]
    xs, ys = nice_ticks([x for x, _ in points]), nice_ticks([y for _, y in points])
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (LEFT + width * (x - xs[0]) / (xs[-1] - xs[0]), TOP + height * (1 - (y - ys[0]) / (ys[-1] - ys[0])))

    for x in xs:
        draw.line([place(x, ys[0]), place(x, ys[-1])], GRID)
        draw.text((place(x, ys[0])[0], SIZE[1] - BOTTOM + 6), f"{x:g}", INK, anchor="ma")
    for y in ys:
        draw.line([place(xs[0], y), place(xs[-1], y)], GRID)
        draw.text((LEFT - 6, place(xs[0], y)[1]), f"{y:g}", INK, anchor="rm")
    draw.text((LEFT, 12), title, INK)
    draw.text((LEFT + width / 2, SIZE[1] - 18), across, INK, anchor="ma")
    for number, (name, line) in enumerate(lines.items()):
        colour, places = COLOURS[number % len(COLOURS)], [place(*point) for point in line]
        draw.line(places, colour, width=2)
        for x, y in places:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        draw.text((SIZE[0] - RIGHT, 12 + 14 * number), name, colour, anchor="ra")
    return image


def nice_ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers that enclose the values."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / TICKS))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= TICKS)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * number, 12) for number in range(first, max(last, first + 1) + 1)]
