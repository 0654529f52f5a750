"""Videos for the tests of ingest, made by the real ffmpeg from drawn frames; and one call that ingests a folder."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from ingest.__main__ import Order, bundled_ffmpeg, ingest
from shared.resolve import Choice
from shared.shards import Index, read_index, shard_folder

Frames = NDArray[np.uint8]  # (T, H, W, 3)
ROOT = Path(__file__).parent.parent.parent
BT709 = (
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p", "-c:v", "libx264", "-qp", "4"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
)
SMALL = "resolution=64 frames=5 video_config.target_fps=8 windows_per_clip=1"


def moving_square(number: int, count: int = 16, height: int = 96, width: int = 96) -> Frames:
    """A bright square that moves over a textured background; the number decides place, colour and texture."""
    draw = np.random.default_rng(number)
    noise = draw.integers(40, 160, (height // 8, width // 8, 3), dtype=np.uint8)
    frames = np.repeat(np.repeat(noise, 8, 0), 8, 1)[None].repeat(count, 0)
    side = min(height, width) // 4
    color, top = draw.integers(100, 255, 3), int(draw.integers(0, height - side))
    for index in range(count):
        left = (int(draw.integers(0, 4)) + 5 * index) % (width - side)
        frames[index, top : top + side, left : left + side] = color
    return frames


def write_video(path: Path, frames: Frames, fps: float = 16, *options: str) -> Path:
    """Encode frames with ffmpeg (x264, nearly lossless, limited BT.709 unless the options say otherwise)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, height, width, _ = frames.shape
    rules = options or BT709
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-")
    run_ffmpeg(*source, *rules, f"file:{path}", pixels=frames.tobytes())
    return path


def run_ffmpeg(*arguments: str, pixels: bytes | None = None) -> None:
    """Run ffmpeg; its complaint is the error."""
    command = [bundled_ffmpeg(), "-v", "error", "-y", *arguments]
    done = subprocess.run(command, input=pixels, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def make_dataset(root: Path, names: dict[str, str | None], seed: int = 0) -> Path:
    """A folder of short clips: file name -> caption in a .txt beside it (None: no .txt)."""
    for number, (name, caption) in enumerate(names.items()):
        path = write_video(root / name, moving_square(seed + number))
        if caption is not None:
            path.with_suffix(".txt").write_text(caption + "\n")
    return root


def run_ingest(data: Path, work: Path, settings: str = "", rehash: bool = False) -> Index:
    """Ingest in this process with small defaults; the index it left."""
    ingest(Order(data, work, Choice(preset="cpu", set=f"{SMALL} {settings}"), None, rehash))
    return read_index(work)


def run_command(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run `python -m ingest` or the like in the repository root."""
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


def ingest_process(data: Path, work: Path, settings: str = "") -> list[str]:
    """The command line of the same."""
    settings = f"{SMALL} {settings}".strip()
    return [
        sys.executable,
        "-m",
        "ingest",
        "--data",
        str(data),
        "--work",
        str(work),
        "--preset",
        "cpu",
        "--set",
        settings,
    ]


def pixels_of(index: Index, work: Path, key: str) -> Frames:
    """Frames of a sample, read from its tar."""
    record = next(sample for sample in index.samples if sample.key == key)
    with tarfile.open(shard_folder(work) / record.shard) as tar:
        member = tar.extractfile(f"{key}.{record.extension}")
        assert member is not None
        return decode(io.BytesIO(member.read()))


def decode(file: object) -> Frames:
    """All frames of a video or picture as RGB."""
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
