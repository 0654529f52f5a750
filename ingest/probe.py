"""Facts of a source. Input: a path. Output: Facts. Cost: reading its packets, and decoding one frame.

All times are measured from packets, because containers are often wrong about duration, frame count and rate. One frame
is decoded, because PyAV tells rotation and the colour tags of the bitstream only on a frame.
"""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from shared.shards import Record

# demuxers of the accepted suffixes; a playlist or script that names other files is none of them
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
TIMEOUT = 60.0  # seconds for opening, and for each read
MICRO = 1_000_000

# values of ISO/IEC 23091-2 (H.273), named as ffmpeg's filters name them; 2 and what is not here is "unknown"
MATRICES = {0: "gbr", 1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "ycgco", 9: "bt2020nc",
            10: "bt2020c", 14: "ictcp"}  # fmt: skip
TRANSFERS = {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 8: "linear", 13: "iec61966-2-1",
             14: "bt2020-10", 15: "bt2020-12", 16: "smpte2084", 18: "arib-std-b67"}  # fmt: skip
PRIMARIES = {1: "bt709", 4: "bt470m", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020", 12: "smpte432"}
FULL_RANGE = 2
DOLBY_VISION = ("dvh1", "dvhe", "dva1", "dvav", "dav1")  # with a base picture they are tagged as that
EXIF_ORIENTATION = 0x0112


class Unusable(Exception):
    """A source or clip that is dropped; the message is the reason, for the user, with the value that was found."""

    def __init__(self, reason: str, value: float | None = None) -> None:
        super().__init__(reason)
        self.value = value


class Unlucky(Unusable):
    """Dropped for no fault of its own; the next run tries it again."""


class Facts(Record):
    """What a video is. Sizes are of the stored picture after rotation; times are seconds from the file's start."""

    codec: str
    pixel_format: str
    width: int
    height: int
    pixel_aspect: float = 1.0  # width of a pixel / its height, after rotation
    rotation: int = 0  # degrees
    matrix: str = "unknown"
    transfer: str = "unknown"
    primaries: str = "unknown"
    full_range: bool = False
    interlaced: bool = False
    alpha: bool = False
    fps: float = 0.0  # frames / duration
    variable_rate: bool = False
    frames: int = 1
    start: float = 0.0
    end: float = 0.0  # end of the last frame
    keyframes: tuple[float, ...] = ()
    stream: int = 0  # index in the container

    @property
    def display_width(self) -> float:
        """Width in square pixels of the picture's height."""
        return self.width * self.pixel_aspect


@dataclass(frozen=True)
class Times:
    """Presentation times of a stream, in microseconds from the file's start."""

    frames: int
    start: int
    end: int
    variable: bool
    keyframes: tuple[int, ...]


def probe(path: Path) -> Facts:
    """Facts of a video file; raises Unusable with the reason when it cannot be one."""
    import av
    from av.stream import Disposition

    try:
        with av.open(f"file:{path}", options=OPEN_OPTIONS, metadata_errors="ignore", timeout=TIMEOUT) as container:
            stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
            if stream is None:
                raise Unusable("no video in it (audio or data only)")
            if stream.codec_context is None:
                raise Unusable("its codec is unknown to this ffmpeg")
            times = read_times(container, stream)
            container.seek(0)
            return facts_of(stream, first_frame(container, stream), times)
    except av.error.FFmpegError as error:
        raise Unusable(explain(error)) from None


def explain(error: Any) -> str:
    """A reason that a user understands, from PyAV's error."""
    import av

    if isinstance(error, av.error.InvalidDataError):
        return "not a video file of a known kind, or damaged at its start (a download that stopped?)"
    if isinstance(error, av.error.PermissionError):
        return "cannot be read: permission denied"
    return f"cannot be opened: {error.strerror}"


def first_frame(container: Any, stream: Any) -> Any:
    """The first frame that can be decoded."""
    frame = next(container.decode(stream), None)
    if frame is None:
        raise Unusable("no frame of it can be decoded")
    return frame


def read_times(container: Any, stream: Any) -> Times:
    """Read all packets of the stream, decoding none; ends quietly where a damaged file ends."""
    import av

    origin = Fraction(container.start_time or 0, MICRO)
    stamps: list[tuple[int, int, bool]] = []  # time, duration, keyframe
    step = int(MICRO / stream.average_rate) if stream.average_rate else MICRO // 25
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            time = (
                stamps[-1][0] + step if stamp is None and stamps else stamp_micro(stamp or 0, stream.time_base, origin)
            )
            length = round((packet.duration or 0) * stream.time_base * MICRO)
            stamps.append((time, length, packet.is_keyframe))
    except av.error.FFmpegError:
        pass  # what was read so far counts; the transcode reports damage inside a span
    if not stamps:
        raise Unusable("no frame in it")
    stamps.sort()
    gaps = [after[0] - before[0] for before, after in pairwise(stamps)]
    last = stamps[-1][1] or (gaps[-1] if gaps else step)
    uneven = bool(gaps) and max(gaps) - min(gaps) > 0.1 * sum(gaps) / len(gaps) + 2000  # 2 ms: Matroska's rounding
    return Times(
        frames=len(stamps),
        start=stamps[0][0],
        end=stamps[-1][0] + last,
        variable=uneven,
        keyframes=tuple(time for time, _, key in stamps if key),
    )


def stamp_micro(stamp: int, time_base: Fraction, origin: Fraction) -> int:
    """A stream's time stamp in microseconds from the file's start."""
    return round((stamp * time_base - origin) * MICRO)


def facts_of(stream: Any, frame: Any, times: Times) -> Facts:
    """Put container, frame and packet times together."""
    aspect = float(stream.sample_aspect_ratio or 1)
    width, height, rotation = frame.width, frame.height, round(frame.rotation) % 360
    if rotation % 180 == 90:
        width, height, aspect = height, width, 1 / aspect
    seconds = (times.end - times.start) / MICRO
    name = frame.format.name
    if stream.codec_context.codec_tag in DOLBY_VISION:
        raise Unusable("Dolby Vision without a picture for other players (profile 5); convert it to HDR10 or SDR first")
    return Facts(
        codec=stream.codec_context.name,
        pixel_format=name,
        width=width,
        height=height,
        pixel_aspect=round(aspect, 6),
        rotation=rotation,
        matrix=MATRICES.get(int(frame.colorspace), "unknown"),
        transfer=TRANSFERS.get(int(frame.color_trc), "unknown"),
        primaries=PRIMARIES.get(int(frame.color_primaries), "unknown"),
        full_range=int(frame.color_range) == FULL_RANGE or name.startswith("yuvj"),
        interlaced=bool(frame.interlaced_frame),
        alpha=stream.metadata.get("alpha_mode") == "1" or any(part.is_alpha for part in frame.format.components),
        fps=round(times.frames / seconds, 3) if seconds > 0 else 0.0,
        variable_rate=times.variable,
        frames=times.frames,
        start=times.start / MICRO,
        end=times.end / MICRO,
        keyframes=tuple(time / MICRO for time in times.keyframes),
        stream=stream.index,
    )


def probe_image(path: Path) -> Facts:
    """Facts of a still picture, its size after EXIF rotation; raises Unusable. Cost: reading its header."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
            if image.format in ("WEBP", "PNG") and getattr(image, "is_animated", False):
                raise Unusable(f"a moving picture in a {image.format}; make an MP4 or GIF of it")
            return Facts(codec=str(image.format), pixel_format=image.mode, width=width, height=height)
    except UnidentifiedImageError:
        raise Unusable("not a picture of a known kind, or damaged") from None
    except Image.DecompressionBombError:
        raise Unusable("a picture of more than 179 million pixels; scale it down") from None
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from None
