"""Which part of a scaled picture is kept. Input: sizes, and for `crop: smart` the picture's energy. Cost: none.

All arithmetic is in integers and fractions, so that the same source is cut at the same pixel on every machine.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from shared.bucket import Bucket
from shared.shards import Record

STEPS = 16  # places that are compared along a side
WORTH = Fraction(1, 32)  # of a side: cutting less away needs no choice; of the energy: gaining less is no reason
NEARLY = Fraction(7, 8)  # of the gain: places with as much are as good as the best


class Focus(Record):
    """Energy of a whole picture along its width and its height: a byte per strip, in hex; empty when unknown."""

    across: str = ""
    down: str = ""


def cover(display: tuple[float, float], bucket: Bucket) -> tuple[int, int]:
    """The least even (width, height) of the display's aspect that covers the bucket."""
    factor = max(bucket.width / display[0], bucket.height / display[1])

    def side(length: float, least: int) -> int:
        return max(least, 2 * math.ceil(length * factor / 2 - 1e-6))

    return side(display[0], bucket.width), side(display[1], bucket.height)


def middle(side: int, kept: int) -> int:
    """Where the middle `kept` pixels of a side begin; even, because 4:2:0 cannot be cut elsewhere."""
    return (side - kept) // 4 * 2


def is_choice(side: int, kept: int) -> bool:
    """Whether so much of a side is cut away that it matters where."""
    return side - kept >= WORTH * side


def busiest(side: int, kept: int, strips: bytes, part: tuple[Fraction, Fraction]) -> int:
    """Where the `kept` of `side` pixels with the most energy begin (even).

    `strips`: energy along the whole picture, of which the side is `part` (first, last share). The middle, unless
    another place gains much; where places on both sides of it gain alike, nothing decides between them: the middle.
    """
    sums = energies(side, kept, strips, part)
    best, half = max(sums), STEPS // 2
    gain = best - sums[half]
    if not gain or gain < WORTH * best:
        return middle(side, kept)
    good = [step for step, value in enumerate(sums) if value >= sums[half] + NEARLY * gain]
    if good[0] < half < good[-1]:
        return middle(side, kept)
    first = last = sums.index(best)
    while last + 1 in good:
        last += 1
    return (side - kept) * (first + last) // (4 * STEPS) * 2


def energies(side: int, kept: int, strips: Sequence[int], part: tuple[Fraction, Fraction]) -> list[Fraction]:
    """Energy of the kept pixels for each place, from the first to the last that is possible."""
    sums = [0, *accumulate(strips)]
    low, high = (share * len(strips) for share in part)

    def before(pixel: Fraction) -> Fraction:
        """Energy up to a pixel of the side."""
        place = low + (high - low) * pixel / side
        whole = min(int(place), len(strips) - 1)
        return sums[whole] + (place - whole) * strips[whole]

    starts = [Fraction((side - kept) * step, STEPS) for step in range(STEPS + 1)]
    return [before(start + kept) - before(start) for start in starts]


def strips_of(totals: Sequence[int], count: int) -> str:
    """At most `count` strips of equal width, as hex: the mean of the totals in each, 255 for the largest."""
    count = min(count, len(totals))
    edges = [len(totals) * strip // count for strip in range(count + 1)]
    means = [sum(totals[low:high]) * 256 // (high - low) for low, high in pairwise(edges)]
    most = max(means)
    return bytes(mean * 255 // most if most else 0 for mean in means).hex()
