"""A red patch keeps its colour through every tag, matrix, range and depth, and in every reader."""

import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from PIL import Image, ImageCms

from ingest.__main__ import bundled_ffmpeg
from ingest.picture import load_picture
from shared.shards import Index, shard_folder
from tests.ingest.make import run_ffmpeg, run_ingest

RED = (200, 40, 40)
Reader = Callable[[Path], NDArray[np.float64]]
GATES_OFF = "gates.frozen=null gates.min_motion=null gates.near_duplicate=null resolution=96"
MATRICES = {
    "bt709": "bt709",
    "smpte170m": "smpte170m",
    "bt470bg": "bt470bg",
    "bt2020nc": "bt2020",
    "smpte240m": "smpte240m",
}
# weights of red and blue in luma (ITU-T H.273, table 4)
WEIGHTS = {
    "bt709": (0.2126, 0.0722),
    "smpte170m": (0.299, 0.114),
    "bt470bg": (0.299, 0.114),
    "bt2020nc": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
}


def patch(path: Path, size: str, *options: str) -> None:
    """A second of plain red, converted from RGB as the options say."""
    path.parent.mkdir(exist_ok=True)
    color = "".join(f"{value:02X}" for value in RED)
    run_ffmpeg("-f", "lavfi", "-i", f"color=c=0x{color}:s={size}:r=8:d=1,format=gbrp", *options, str(path))
    path.with_suffix(".txt").write_text(f"a red wall called {path.stem}")


def by_pyav(path: Path, flags: int = Interpolation.BILINEAR) -> NDArray[np.float64]:
    """Mean RGB of the first frame by PyAV's own conversion from the tags."""
    with av.open(path) as container:
        frame = next(container.decode(video=0))
        return frame.to_ndarray(format="rgb24", interpolation=flags).mean(axis=(0, 1))


def by_ffmpeg(path: Path, *options: str) -> NDArray[np.float64]:
    """Likewise by ffmpeg."""
    raw = subprocess.run(
        [
            bundled_ffmpeg(),
            "-v",
            "error",
            "-i",
            path,
            "-frames:v",
            "1",
            *options,
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-",
        ],
        capture_output=True,
        check=True,
    ).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, 3).mean(axis=0)


# by default swscale, in PyAV and in ffmpeg, cuts off what lies behind the point; asked for accurate_rnd it rounds
CUTTING: tuple[Reader, ...] = (by_pyav, by_ffmpeg)
ROUNDING: tuple[Reader, ...] = (
    lambda path: by_pyav(path, Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT),
    lambda path: by_ffmpeg(path, "-sws_flags", "bicubic+accurate_rnd+full_chroma_int"),
    lambda path: by_ffmpeg(path, "-vf", "zscale=matrix=gbr:range=full,format=gbrp"),
)


def unpacked(index: Index, work: Path) -> dict[str, Path]:
    """The sample of each source, as a file; tagged BT.709 limited range."""
    found = {}
    for sample in index.samples:
        subprocess.run(["tar", "xf", shard_folder(work) / sample.shard, "-C", work], check=True)
        found[sample.source] = work / f"{sample.key}.{sample.extension}"
        with av.open(found[sample.source]) as container:
            frame = next(container.decode(video=0))
            assert sample.extension != "mp4" or (int(frame.colorspace), int(frame.color_range)) == (1, 1)
    return found


def colours(index: Index, work: Path) -> dict[str, NDArray[np.float64]]:
    """Mean RGB per source."""
    return {name: by_pyav(path) for name, path in unpacked(index, work).items()}


def exact_rgb(path: Path, matrix: str, full_range: bool) -> NDArray[np.float64]:
    """RGB of a plain video's stored YCbCr by ITU-T H.273, equations 30-38: the law, whatever a library does."""
    with av.open(path) as container:
        frame = next(container.decode(video=0))
    depth = 10 if "10" in frame.format.name else 8
    kind = np.uint16 if depth == 10 else np.uint8
    y, cb, cr = (float(np.frombuffer(plane, kind)[0]) / 2 ** (depth - 8) for plane in frame.planes)
    luma, chroma = (y / 255, 255) if full_range else ((y - 16) / 219, 224)
    blue, red = (cb - 128) / chroma, (cr - 128) / chroma
    k_red, k_blue = WEIGHTS[matrix]
    r, b = luma + 2 * (1 - k_red) * red, luma + 2 * (1 - k_blue) * blue
    return np.array([r, (luma - k_red * r - k_blue * b) / (1 - k_red - k_blue), b]) * 255


@dataclass(frozen=True)
class Kind:
    """One way to store red."""

    tag: str
    span: str
    depth: str
    tagged: bool

    @property
    def name(self) -> str:
        return f"{self.tag}_{self.span}_{self.depth}_{'tagged' if self.tagged else 'untagged'}.mp4"

    def draw(self, path: Path) -> None:
        matrix = MATRICES[self.tag]
        tags = ("-colorspace", self.tag, "-color_range", self.span)
        strip = ("-bsf:v", "h264_metadata=matrix_coefficients=2")
        convert = f"scale=out_color_matrix={matrix}:out_range={self.span}:flags=accurate_rnd+full_chroma_int"
        size = "1280x720" if matrix == "bt709" and not self.tagged else "160x96"
        chain = ("-vf", f"{convert},format={self.depth}", "-c:v", "libx264", "-qp", "1")
        patch(path, size, *chain, *(tags if self.tagged else strip))


def kinds() -> list[Kind]:
    """Every matrix, range and depth with tags; without tags: HD is BT.709, SD is BT.601, both limited."""
    depths = ("yuv420p", "yuv444p10le")
    tagged = [Kind(tag, span, depth, True) for tag in MATRICES for span in ("tv", "pc") for depth in depths]
    return tagged + [Kind(tag, "tv", depth, False) for tag in ("bt709", "smpte170m") for depth in depths]


@pytest.fixture(scope="module")
def red_walls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("walls") / "data"
    for kind in kinds():
        kind.draw(data / kind.name)
    return data


@pytest.fixture(scope="module")
def red_samples(red_walls: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The x264 sample of each kind."""
    work = tmp_path_factory.mktemp("samples") / "work"
    found = unpacked(run_ingest(red_walls, work, GATES_OFF), work)
    assert set(found) == {kind.name for kind in kinds()}
    return found


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_red_survives_every_tag_matrix_range_and_depth(
    red_walls: Path, red_samples: dict[str, Path], kind: Kind
) -> None:
    """Within 2 levels, in what is stored and in every reader that rounds.

    Readers that cut off show up to 1.9 levels less than is stored. One kind, 8-bit BT.2020 of full range, comes with a
    red that is 1.5 levels too dark itself (its file can hold no nearer one), so there they are 3 off, and they show its
    source 2 off.
    """
    source, sample = red_walls / kind.name, red_samples[kind.name]
    given, stored = exact_rgb(source, kind.tag, kind.span == "pc"), exact_rgb(sample, "bt709", full_range=False)
    assert np.abs(given - RED).max() < 1.7, "what the source's own 8 bits can hold"
    assert np.abs(stored - RED).max() <= 2
    for read in ROUNDING:
        assert np.abs(read(sample) - RED).max() <= 2
    for read in CUTTING:
        shown = read(sample)
        assert (np.abs(shown - RED).max() <= 2) != (kind.name == "bt2020nc_pc_yuv420p_tagged.mp4"), shown
        assert np.all((stored - shown > -0.7) & (stored - shown < 1.9)), "they cut off"
    for read in (*CUTTING, *ROUNDING) if kind.tagged else ():
        assert np.abs(read(sample) - read(source)).max() <= 2, "a reader sees in the sample what it saw in the source"


def test_red_survives_without_loss(red_walls: Path, tmp_path: Path) -> None:
    """The lossless codec holds RGB: what every reader shows is what is stored."""
    found = unpacked(run_ingest(red_walls, tmp_path / "work", f"{GATES_OFF} codec=lossless"), tmp_path / "work")
    for kind in kinds():
        shown = by_pyav(found[kind.name])
        assert np.abs(shown - RED).max() <= 2, kind
        assert np.array_equal(shown, by_ffmpeg(found[kind.name]))


def test_wide_gamut_is_converted_and_hdr_is_tone_mapped(tmp_path: Path) -> None:
    data = tmp_path / "data"
    into = "p={}:t={}:m={}:r=tv:pin=709:tin=709:min=gbr:rin=pc:npl=203"
    for name, primaries, transfer, matrix, tags in (
        ("wide", "2020", "2020_10", "2020_ncl", ("bt2020", "bt2020-10", "bt2020nc")),
        ("phone", "smpte432", "709", "709", ("smpte432", "bt709", "bt709")),
        ("pq", "2020", "smpte2084", "2020_ncl", ("bt2020", "smpte2084", "bt2020nc")),
        ("hlg", "2020", "arib-std-b67", "2020_ncl", ("bt2020", "arib-std-b67", "bt2020nc")),
    ):
        chain = f"format=gbrp16le,zscale={into.format(primaries, transfer, matrix)},format=yuv420p10le"
        flags = ("-color_primaries", tags[0], "-color_trc", tags[1], "-colorspace", tags[2], "-color_range", "tv")
        patch(data / f"{name}.mp4", "160x96", "-vf", chain, "-c:v", "libx264", "-qp", "1", *flags)
    index = run_ingest(data, tmp_path / "work", GATES_OFF)
    found = {name.removesuffix(".mp4"): color for name, color in colours(index, tmp_path / "work").items()}
    for name in ("wide", "phone"):
        assert np.abs(found[name] - RED).max() <= 3, found
    for name in ("pq", "hlg"):  # a curve bends what is near white; without one red is (119, 75, 60)
        assert found[name][0] > 180
        assert np.all(found[name][1:] < 55)


@pytest.mark.parametrize("suffix", ["webm", "gif", "png"])
def test_transparency_is_laid_over_black(tmp_path: Path, suffix: str) -> None:
    alpha = "format=rgba,geq=r=200:g=40:b=40:a='if(lt(X,W/2),255,0)'"
    codec = {"webm": ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-crf", "4"), "gif": (), "png": ("-frames:v", "1")}[
        suffix
    ]
    if suffix == "gif":
        alpha += ",split[a][b];[a]palettegen=reserve_transparent=1[p];[b][p]paletteuse"
    patch(tmp_path / "data" / f"half_a_wall.{suffix}", "96x96", "-vf", alpha, *codec)
    index = run_ingest(tmp_path / "data", tmp_path / "work", GATES_OFF)
    color = colours(index, tmp_path / "work")[f"half_a_wall.{suffix}"]
    assert np.abs(color - np.array(RED) / 2).max() <= 3


def test_pictures_are_shown_in_srgb_with_8_bits(tmp_path: Path) -> None:
    """16-bit grey keeps its levels; the red of a wide-gamut profile is more than sRGB's of the same numbers."""
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.abs(np.asarray(load_picture(tmp_path / "ramp.png"))[0, :, 0] - ramp[0] / 257).max() <= 0.5
    red = Image.new("RGB", (8, 8), RED)
    for name, profile in (("wide", wide_profile()), ("srgb", srgb_profile()), ("none", b""), ("broken", b"x" * 200)):
        red.save(tmp_path / f"{name}.png", icc_profile=profile)
    found = {name: load_picture(tmp_path / f"{name}.png").getpixel((0, 0)) for name in ("srgb", "none", "broken")}
    assert set(found.values()) == {RED}
    clear = red.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png", icc_profile=wide_profile())
    assert load_picture(tmp_path / "clear.png").getpixel((0, 0)) == (0, 0, 0)
    wide = np.array(load_picture(tmp_path / "wide.png").getpixel((0, 0)))
    assert np.abs(wide - wide_red()).max() <= 2, wide


# red, green, blue as D50 XYZ: of Display P3, and of sRGB
P3 = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]])
SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def wide_profile() -> bytes:
    """The least ICC profile (version 2): Display P3's primaries and a gamma of 2.2."""
    fixed = lambda values: b"".join(struct.pack(">i", round(value * 65536)) for value in values)  # noqa: E731
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 3) + b"P3\0" + bytes(79)}
    tags |= {b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": b"XYZ " + bytes(4) + fixed((0.9642, 1, 0.8249))}
    for letter, primary in zip(b"rgb", P3, strict=True):
        tags[bytes([letter]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(primary)
        tags[bytes([letter]) + b"TRC"] = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256))
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12)
    head += b"acsp" + bytes(28) + fixed((0.9642, 1, 0.8249))
    return head + bytes(128 - len(head)) + table + body


def wide_red() -> NDArray[np.float64]:
    """RED of that profile as sRGB, by the matrices."""
    linear = (np.array(RED) / 255) ** 2.2 @ P3 @ np.linalg.inv(SRGB)
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
