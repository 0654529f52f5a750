"""Single frames of a video, decoded in process. Input: times. Output: PyAV frames. Cost: decoding what lies between."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from ingest.probe import MICRO, OPEN_OPTIONS, Facts


def frames_at(path: Path, facts: Facts, times: list[float], check: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """The first frame at or after each time (seconds from the file's start, ascending), else the last there is.

    A seek is made only where it saves decoding; `check` is called for each frame and may raise. Ends early where the
    source is damaged: its transcode says what is wrong with it.
    """
    import av

    try:
        with av.open(f"file:{path.absolute()}", options=OPEN_OPTIONS, metadata_errors="ignore") as container:
            yield from decoded(container, facts, times, check)
    except av.error.FFmpegError:
        return


def decoded(container: Any, facts: Facts, times: list[float], check: Callable[[], None]) -> Iterator[Any]:
    """Likewise, of an open container; raises FFmpegError."""
    stream = container.streams[facts.stream]
    origin = Fraction(container.start_time or 0, MICRO)
    frames, now, current = container.decode(stream), facts.start, None
    for moment in times:
        keyframe = max((at for at in facts.keyframes if at <= moment), default=now)
        if keyframe > now:
            container.seek(math.ceil((keyframe + float(origin)) * MICRO) + 1)  # times are known to a microsecond
            frames, current = container.decode(stream), None
        while current is None or now < moment:
            check()
            following = next(frames, None)
            if following is None:
                break
            now = now if following.pts is None else float(following.pts * stream.time_base - origin)
            current = following
        if current is not None:
            yield current
