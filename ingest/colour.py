"""Colour: any source to BT.709 limited range, converted and tagged. Input and output: streams of an ffmpeg graph.

Without a tag a picture of HD size is taken for BT.709, a smaller one for BT.601, as players do; without a range tag YUV
is limited range. HDR (PQ, HLG) is tone-mapped, wide gamut (BT.2020, P3) is brought to BT.709's primaries, transparency
is laid over black. BT.601's primaries are so near to BT.709's that players ignore the difference; so does this.
"""

from typing import Any

from ingest.probe import Facts, Unusable

TAGS = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}
FLAGS = "lanczos+accurate_rnd+full_chroma_int+full_chroma_inp"
HD_WIDTH, HD_HEIGHT = 1280, 720
HDR_TRANSFERS = ("smpte2084", "arib-std-b67")
WIDE_PRIMARIES = ("bt2020", "smpte432")
SDR_WHITE = 203  # cd/m2 of diffuse white in HDR (ITU-R BT.2408)
SWSCALE_NAMES = {"bt470bg": "bt601", "smpte170m": "bt601", "bt2020nc": "bt2020"}  # as swscale's options name matrices
UNSUPPORTED = ("ycgco", "ictcp", "bt2020c")
RGB_FORMATS = ("rgb", "bgr", "gbr", "argb", "abgr", "pal8", "0rgb", "0bgr")


def refuse_unsupported(facts: Facts) -> None:
    """Raise Unusable for colour that would come out wrong."""
    if facts.matrix in UNSUPPORTED:
        raise Unusable(f"colour matrix {facts.matrix} cannot be converted here; convert the file to BT.709 first")


def matrix_of(facts: Facts) -> str:
    """The matrix to decode YUV with."""
    if facts.matrix not in ("unknown", "gbr"):
        return facts.matrix
    if facts.transfer in HDR_TRANSFERS:
        return "bt2020nc"
    return "bt709" if facts.width >= HD_WIDTH or facts.height >= HD_HEIGHT else "smpte170m"


def converted(stream: Any, facts: Facts, size: tuple[int, int], rgb: bool) -> Any:
    """Scale to `size` (width, height) and convert: BT.709 limited-range 4:2:0, or full-range RGB."""
    if facts.transfer in HDR_TRANSFERS or facts.primaries in WIDE_PRIMARIES:
        stream, source = to_bt709(stream, facts, size), {"in_color_matrix": "bt709", "in_range": "tv"}
    elif facts.alpha:
        stream, source = over_black(stream, facts, size), {}
    else:
        source = yuv_rule(facts)
    target = {} if rgb else {"out_color_matrix": "bt709", "out_range": "tv"}
    scaled = stream.filter("scale", *size, flags=FLAGS, **source, **target)
    return scaled.filter("format", "bgr0" if rgb else "yuv420p")


def yuv_rule(facts: Facts) -> dict[str, str]:
    """How swscale has to read the source; nothing for RGB."""
    if facts.pixel_format.startswith(RGB_FORMATS):
        return {}
    matrix = matrix_of(facts)
    return {"in_color_matrix": SWSCALE_NAMES.get(matrix, matrix), "in_range": "pc" if facts.full_range else "tv"}


def to_bt709(stream: Any, facts: Facts, size: tuple[int, int]) -> Any:
    """Scale, then bring HDR or wide gamut to BT.709 by zimg, in 10 bits; HDR is tone-mapped."""
    matrix = matrix_of(facts)
    rule = yuv_rule(facts)
    kept = {"out_color_matrix": rule["in_color_matrix"], "out_range": rule["in_range"]} if rule else {}
    stream = stream.filter("scale", *size, flags=FLAGS, **rule, **kept)
    if rule:
        stream = stream.filter("format", "yuv444p10le")
    primaries = facts.primaries if facts.primaries in WIDE_PRIMARIES else "bt2020"
    hdr = facts.transfer in HDR_TRANSFERS
    tags = {"color_primaries": primaries, "color_trc": facts.transfer if hdr else "bt709"}
    tags |= {"colorspace": matrix, "range": rule["in_range"]} if rule else {}
    stream = stream.filter("setparams", **tags)
    if hdr:
        linear = stream.filter("zscale", transfer="linear", npl=SDR_WHITE).filter("format", "gbrpf32le")
        stream = linear.filter("zscale", primaries="bt709").filter("tonemap", "mobius", desat=0)
    stream = stream.filter("zscale", primaries="bt709", transfer="bt709", matrix="bt709", range="tv")
    return stream.filter("format", "yuv444p10le")


def over_black(stream: Any, facts: Facts, size: tuple[int, int]) -> Any:
    """Scale, and lay what is transparent over black; RGB."""
    whole = stream.filter("scale", *size, flags=FLAGS, **yuv_rule(facts)).filter("format", "gbrap")
    return whole.filter("premultiply", inplace=1).filter("format", "gbrp")
