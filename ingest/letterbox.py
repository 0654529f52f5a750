"""Black bars: found by ffmpeg's cropdetect in the first transcode of a clip, and cut away in its second.

A dark scene must not be taken for bars: their edge has to be straight and bright along most of its length.
"""

import re
from typing import TYPE_CHECKING, Any

from ingest.plan import Box
from ingest.probe import Facts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLACK = 3 / 255  # above black, as a share of full scale; bars carry a little noise
LEAST, MOST = 0.02, 0.45  # of a side that a pair of bars takes, both together
ALONG = 0.6  # share of the edge that is brighter than black at some time
GREY_BLACK = 10  # grey level; scaling lets a little of the picture into the bars


def detector(stream: Any, facts: Facts, log: str) -> Any:
    """Add cropdetect; it writes the union of all frames' content to the file `log` in the current folder."""
    black = 0 if facts.full_range else 16 / 255
    found = stream.filter("cropdetect", limit=f"{black + BLACK:.6f}", round=2, skip=0, reset=0)
    return found.filter("metadata", mode="print", file=log)


def bars_of(logs: list[str], greys: "list[NDArray[np.uint8]]", size: tuple[int, int]) -> Box | None:
    """The content of a clip with bars, None for one without.

    `logs`: cropdetect's, one per window; `greys`: the windows' whole pictures (T, H, W); `size`: stored width, height.
    """
    import numpy as np

    corners = [corner for log in logs if (corner := last_rectangle(log))]
    if not corners:
        return None  # all black: the gate's matter
    left, top = min(c[0] for c in corners), min(c[1] for c in corners)
    right, bottom = max(c[2] for c in corners) + 1, max(c[3] for c in corners) + 1
    brightest = np.max([grey.max(axis=0) for grey in greys], axis=0)
    across = is_bars(left, size[0] - right, size[0], brightest)
    down = is_bars(top, size[1] - bottom, size[1], brightest.T)
    if not (across or down):
        return None
    left, right = (even_up(left), right // 2 * 2) if across else (0, size[0])
    top, bottom = (even_up(top), bottom // 2 * 2) if down else (0, size[1])
    return Box(left, top, right - left, bottom - top)


def is_bars(before: int, after: int, side: int, brightest_HW: "NDArray[np.uint8]") -> bool:
    """Whether `before` and `after` pixels at both ends of a side are bars; the picture has that side last."""
    if not (LEAST * side <= before + after <= MOST * side and abs(before - after) <= max(4, LEAST * side)):
        return False
    grey_side = brightest_HW.shape[1]
    scale = grey_side / side
    first, last = int(before * scale) + 2, int((side - after) * scale) - 3  # two grey pixels inside the edge
    edges = brightest_HW[:, [first, last]] > GREY_BLACK
    return bool((edges.mean(axis=0) >= ALONG).all())


def last_rectangle(log: str) -> tuple[int, int, int, int] | None:
    """(x1, y1, x2, y2), inclusive, of the last frame in a log of cropdetect; None when all was black."""
    values = {name: int(value) for name, value in re.findall(r"lavfi\.cropdetect\.(x1|y1|x2|y2)=(-?\d+)", log)}
    if len(values) < 4 or values["x2"] < values["x1"] or values["y2"] < values["y1"]:
        return None
    return values["x1"], values["y1"], values["x2"], values["y2"]


def even_up(value: int) -> int:
    """The least even number that is not below."""
    return (value + 1) // 2 * 2
