"""Colour: any source to BT.709 limited range, converted and tagged. Input and output: streams of an ffmpeg graph.

Without a tag a picture of HD size is taken for BT.709, a smaller one for BT.601, as players do (ITU-R BT.709, BT.601);
without a range tag YUV is limited range.
"""

from typing import Any

from ingest.probe import Facts

TAGS = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}
HD_WIDTH, HD_HEIGHT = 1280, 720
HDR_TRANSFERS = ("smpte2084", "arib-std-b67")
# as swscale's options name them
SWSCALE_NAMES = {"bt470bg": "bt601", "smpte170m": "bt601", "bt2020nc": "bt2020", "bt2020c": "bt2020"}
RGB_FORMATS = ("rgb", "bgr", "gbr", "argb", "abgr", "pal8", "0rgb", "0bgr")


def is_rgb(facts: Facts) -> bool:
    """Whether the pixels are red, green and blue already."""
    return facts.pixel_format.startswith(RGB_FORMATS)


def matrix_of(facts: Facts) -> str:
    """The matrix to decode YUV with, as swscale names it."""
    if facts.matrix not in ("unknown", "gbr"):
        return SWSCALE_NAMES.get(facts.matrix, facts.matrix)
    return "bt709" if facts.width >= HD_WIDTH or facts.height >= HD_HEIGHT else "bt601"


def prepared(stream: Any, facts: Facts) -> Any:
    """What has to happen at the source's own size."""
    del facts
    return stream


def converted(stream: Any, facts: Facts, size: tuple[int, int], flags: str, rgb: bool) -> Any:
    """Scale to `size` and convert: BT.709 limited-range 4:2:0, or full-range RGB."""
    options: dict[str, Any] = {"flags": flags}
    if not is_rgb(facts):
        options |= {"in_color_matrix": matrix_of(facts), "in_range": "pc" if facts.full_range else "tv"}
    if not rgb:
        options |= {"out_color_matrix": "bt709", "out_range": "tv"}
    return stream.filter("scale", *size, **options).filter("format", "bgr0" if rgb else "yuv420p")
