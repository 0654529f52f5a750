"""Quality gates: keep a sample or drop it, with the reason and the value. Input: a small grey copy of its picture.

The grey copy is a second output of the transcode; its Measures are kept, so that a changed threshold decodes nothing.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from shared.config import GatesConfig
from shared.shards import Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Grey = NDArray[np.uint8]

GREY_SIDE = 256  # pixels of the longer side
HASH_SIDE = 32  # pixels; the DCT of this picture is hashed
HASH_BITS = 64


class Measures(Record):
    """What the gates look at; grey levels are 0 to 255. `hashes`: first, middle and last frame."""

    black: float  # mean grey level of the brightest frame
    motion: float  # mean grey-level change from frame to frame
    detail: float  # variance of the Laplacian / variance of the picture, median over frames
    hashes: tuple[str, ...]  # hex


def measure(grey_THW: "Grey") -> Measures:
    """Measures of one sample's grey frames (T, H, W)."""
    import numpy as np

    small = grey_THW.astype(np.int16)
    change = float(np.abs(np.diff(small, axis=0)).mean()) if len(small) > 1 else 0.0
    laplacian = (4 * small[:, 1:-1, 1:-1] - small[:, :-2, 1:-1] - small[:, 2:, 1:-1] - small[:, 1:-1, :-2]
                 - small[:, 1:-1, 2:])  # fmt: skip
    return Measures(
        black=round(float(small.mean(axis=(1, 2)).max()), 3),
        motion=round(change, 4),
        # relative, because a faint drawing is no blur; and ones, because a plain wall is none either
        detail=round(float(np.median((laplacian.var(axis=(1, 2)) + 1) / (small.var(axis=(1, 2)) + 1))), 6),
        hashes=tuple(perceptual_hash(grey_THW[index]) for index in (0, len(small) // 2, len(small) - 1)),
    )


def perceptual_hash(grey_HW: "Grey") -> str:
    """64 bits as hex: signs of the lowest 8x8 cosine coefficients against their median (the common pHash)."""
    import numpy as np
    from PIL import Image

    size = (HASH_SIDE, HASH_SIDE)
    small = np.asarray(Image.fromarray(grey_HW).resize(size, Image.Resampling.BOX), dtype=np.float64)
    steps = np.arange(HASH_SIDE)
    basis = np.cos(np.pi * (2 * steps[None] + 1) * steps[:8, None] / (2 * HASH_SIDE))
    low = (basis @ small @ basis.T).flatten()
    bits = low > np.median(low[1:])
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


def refusal(measures: Measures, gates: GatesConfig, fps: float, still: bool) -> tuple[str, float] | None:
    """(reason, value) of the first gate that a sample fails. `fps`: grid rate, frames per second of the source."""
    checks: list[tuple[float, float | None, str, str]] = [
        (measures.black, gates.black, "black: mean grey level", "black")
    ]
    if not still:
        checks += [
            (measures.motion * fps, gates.frozen, "frozen: grey-level change per second", "frozen"),
            (measures.motion, gates.min_motion, "too little motion: grey-level change per frame", "min_motion"),
        ]
    blurred = "blurred: variance of the Laplacian / of the picture"
    checks.append((measures.detail, gates.min_sharpness, blurred, "min_sharpness"))
    for value, least, what, name in checks:
        if least is not None and value < least:
            return f"{what} {value:.3g}, gates.{name} asks for at least {least:g}", value
    if not still and gates.max_motion is not None and measures.motion > gates.max_motion:
        what = f"too much motion: grey-level change per frame {measures.motion:.3g}"
        return f"{what}, gates.max_motion allows {gates.max_motion:g}", measures.motion
    return None


class Duplicates:
    """Finds samples that look like an earlier one of another source, by perceptual hashes of three frames.

    Two 64-bit hashes at most k bits apart agree in one of k + 1 bands of their bits, so only those are compared.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.seen: dict[Any, list[tuple[str, tuple[int, ...]]]] = defaultdict(list)

    def twin_of(self, source: str, kind: Any, hashes: Iterable[str]) -> tuple[str, int] | None:
        """(source, bits apart) of its look-alike among earlier samples of this kind; without one, it is remembered."""
        numbers = tuple(int(value, 16) for value in hashes)
        bands = [(kind, band) for band in self.bands(numbers[0])]
        for band in bands:
            for other, known in self.seen[band]:
                apart = max((a ^ b).bit_count() for a, b in zip(numbers, known, strict=True))
                if other != source and apart <= self.bits:
                    return other, apart
        for band in bands:
            self.seen[band].append((source, numbers))
        return None

    def bands(self, number: int) -> list[tuple[int, int]]:
        """The hash in bits + 1 pieces, each with its place."""
        count = self.bits + 1
        edges = [HASH_BITS * piece // count for piece in range(count + 1)]
        return [(low, number >> low & (1 << high - low) - 1) for low, high in pairwise(edges)]
