"""Where a picture's content is, for `crop: smart`. Output: energy along both sides. Cost: decoding the windows once.

The energy is that of M. Rubinstein, A. Shamir, S. Avidan, "Improved Seam Carving for Video Retargeting" (ACM TOG 27(3),
2008): 0.3 x the largest |dI/dx| + |dI/dy| and 0.7 x the largest |dI/dt| over time. It is computed in integers from luma
as it is decoded, without a scaler, so that every machine finds the same.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingest.crop import Focus, strips_of
from ingest.cut import Window
from ingest.frames import frames_at
from ingest.ledger import Learned, Outcome
from ingest.picture import load_picture
from ingest.plan import focus_name
from ingest.probe import Facts, Unlucky, Unusable
from ingest.runner import Runner, Stopped, time_limit
from shared.files import write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Luma = NDArray[np.int32]

FRAMES = 6  # per window
SIDE = 256  # pixels of the longer side that is looked at
STRIPS = 64  # along each side
SPATIAL, TEMPORAL = 3, 7  # tenths


@dataclass(frozen=True)
class FocusJob:
    """Find the energy of windows of one clip."""

    path: Path
    source: str  # sha256
    facts: Facts
    windows: tuple[Window, ...]

    @property
    def names(self) -> list[str]:
        """Under which the ledger knows the windows' energy."""
        return [focus_name(self.source, window) for window in self.windows]


def find_focus(job: FocusJob, runner: Runner) -> Outcome:
    """Energy of each window; that of one that cannot be decoded is empty. Raises Stopped, OSError."""
    try:
        seen = still(job) if job.windows[0].still else moving(job, runner)
        learned = Learned(focus=dict(zip(job.names, map(focus_of, seen), strict=True)))
    except Unlucky as problem:
        learned = Learned.without(job.names, problem)
    outcome = Outcome(sha256=job.source, learned=learned)
    write_json(runner.staging / f"focus-{job.names[0]}.json", outcome.model_dump(mode="json"))
    return outcome


def focus_of(frames: "list[Luma]") -> Focus:
    """Energy of one window's frames, all of one size, along its sides."""
    import numpy as np

    if not frames:
        return Focus()
    edges, change = np.zeros_like(frames[0]), np.zeros_like(frames[0])
    for number, frame in enumerate(frames):
        across = np.abs(np.diff(frame, axis=1, append=frame[:, -1:]))
        down = np.abs(np.diff(frame, axis=0, append=frame[-1:]))
        np.maximum(edges, across + down, out=edges)
        if number:
            np.maximum(change, np.abs(frame - frames[number - 1]), out=change)
    energy = SPATIAL * edges + TEMPORAL * change
    return Focus(across=strips_of(energy.sum(0).tolist(), STRIPS), down=strips_of(energy.sum(1).tolist(), STRIPS))


def still(job: FocusJob) -> "list[list[Luma]]":
    """The picture; a damaged one is its transcode's matter."""
    import numpy as np

    try:
        return [[reduced(np.asarray(load_picture(job.path).convert("L"), dtype=np.int32))]]
    except Unusable:
        return [[]]


def moving(job: FocusJob, runner: Runner) -> "list[list[Luma]]":
    """FRAMES frames of each window, evenly spaced, upright, in one pass; fewer where the source is damaged."""
    wanted = sorted(
        (window.start + window.duration * (2 * part + 1) / (2 * FRAMES), place)
        for place, window in enumerate(job.windows)
        for part in range(FRAMES)
    )
    give_up = time.monotonic() + time_limit(job.facts, wanted[-1][0] - wanted[0][0])
    seen: list[list[Luma]] = [[] for _ in job.windows]
    frames = frames_at(job.path, job.facts, [moment for moment, _ in wanted], lambda: check(runner, give_up))
    for (_, place), frame in zip(wanted, frames, strict=False):
        picture = upright(frame, job.facts)
        if not seen[place] or seen[place][0].shape == picture.shape:
            seen[place].append(picture)
    return seen


def check(runner: Runner, give_up: float) -> None:
    """Raise when the user has interrupted, or the time is over."""
    if runner.stopping.is_set():
        raise Stopped
    if time.monotonic() > give_up:
        raise Unlucky("took too long to look at")


def upright(frame: Any, facts: Facts) -> "Luma":
    """A frame's luma as it is shown, small."""
    import numpy as np

    return np.ascontiguousarray(np.rot90(reduced(luma(frame)), facts.rotation // 90))


def luma(frame: Any) -> "Luma":
    """(H, W), in the source's own scale; of a picture without a plane of its own for it, from RGB."""
    import numpy as np

    stored = frame.format
    has_plane = stored.is_planar or len(stored.components) == 1
    if stored.is_rgb or stored.has_palette or stored.is_bit_stream or not has_plane:
        rgb = frame.to_ndarray(format="rgb24").astype(np.int32)
        return np.asarray((2 * rgb[..., 0] + 5 * rgb[..., 1] + rgb[..., 2]) // 8)
    wide = stored.components[0].bits > 8
    kind = np.dtype(np.uint8 if not wide else ">u2" if stored.name.endswith("be") else "<u2")
    plane = np.frombuffer(frame.planes[0], kind).reshape(-1, frame.planes[0].line_size // kind.itemsize)
    return plane[: frame.height, : frame.width].astype(np.int32)


def reduced(picture: "Luma") -> "Luma":
    """Means of squares, so that the longer side has at most SIDE pixels."""
    import numpy as np

    height, width = picture.shape
    factor = min(-(-max(height, width) // SIDE), height, width)
    whole = picture[: height // factor * factor, : width // factor * factor]
    squares = whole.reshape(height // factor, factor, width // factor, factor)
    return np.asarray(squares.sum(axis=(1, 3)) // factor**2, dtype=np.int32)
