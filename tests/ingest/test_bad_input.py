"""Whatever files a folder holds: each is processed right or dropped with a reason, and ingest goes on."""

import ctypes
import os
import random
import re
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ingest.probe import Unlucky
from ingest.runner import Runner
from shared.shards import Index, read_index
from tests.ingest.make import (
    ROOT,
    decode,
    ingest_process,
    make_dataset,
    moving_square,
    pixels_of,
    run_command,
    run_ffmpeg,
    run_ingest,
    write_video,
)

X264 = ("-c:v", "libx264", "-qp", "10")
FIELDS = ("-vf", "tinterlace=interleave_top,fieldorder=tff", "-flags", "+ilme+ildct")
Make = Callable[[Path], object]


def transformed(*options: str, count: int = 16, size: tuple[int, int] = (96, 96), fps: float = 16) -> Make:
    return lambda path: write_video(path, moving_square(3, count, *size), fps, *options)


def damaged(change: Callable[[bytearray], object]) -> Make:
    """A good file with its bytes changed; the header is at its start."""

    def make(path: Path) -> None:
        good = path.with_name("good.mp4")
        write_video(good, moving_square(3, 32), 16, *X264, "-movflags", "+faststart", "-g", "8")
        content = bytearray(good.read_bytes())
        good.unlink()
        change(content)
        path.write_bytes(content)

    return make


def cut_to(share: float) -> Make:
    return damaged(lambda content: content.__delitem__(slice(int(len(content) * share), None)))


def no_moov(path: Path) -> None:
    write_video(path, moving_square(3, 32), 16, *X264)
    path.write_bytes(path.read_bytes()[:-2000])


def audio_only(path: Path) -> None:
    run_ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", str(path))


def rotated(degrees: int) -> Make:
    def make(path: Path) -> None:
        plain = path.with_name(f"plain{degrees}.mp4")
        write_video(plain, moving_square(3, 16, 64, 128))
        run_ffmpeg("-display_rotation", str(degrees), "-i", str(plain), "-c", "copy", str(path))
        plain.unlink()

    return make


def huge(path: Path) -> None:
    source = "testsrc2=s=7680x4320:r=8:d=0.75"
    run_ffmpeg("-f", "lavfi", "-i", source, "-c:v", "mpeg4", "-q:v", "8", "-bf", "0", str(path))


def looping_link(path: Path) -> None:
    path.symlink_to(path)


def moving_webp(path: Path) -> None:
    first, *rest = (Image.fromarray(frame) for frame in moving_square(3))
    first.save(path, save_all=True, append_images=rest)


# name -> (how it is made, what becomes of it: "kept" or a pattern of the reason)
CORPUS: dict[str, tuple[Make, str]] = {
    "zero.mp4": (lambda path: path.touch(), "empty file"),
    "text.mp4": (lambda path: path.write_text("hello " * 999), "not a video file"),
    "cut10.mp4": (cut_to(0.1), "not a video file|damaged|no frame|too short"),
    "cut50.mp4": (cut_to(0.5), "kept|damaged|too short"),
    "cut90.mp4": (cut_to(0.9), "kept|damaged"),
    "no_moov.mp4": (no_moov, "not a video file"),
    "sound.mp4": (audio_only, "no video in it"),
    "one_frame.mp4": (transformed(count=1), "too short"),
    "no_duration.mkv": (transformed(*X264, "-f", "matroska", "-live", "1"), "kept"),
    "tiny.mp4": (transformed(size=(16, 16)), "too small: 16x16"),
    "odd.mp4": (transformed("-c:v", "libx264", "-qp", "10", "-pix_fmt", "yuv444p", size=(97, 131)), "kept"),
    "deep.mp4": (transformed(*X264, "-pix_fmt", "yuv420p10le"), "kept"),
    "full_chroma.mp4": (transformed(*X264, "-pix_fmt", "yuv444p"), "kept"),
    "alpha.webm": (transformed("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p"), "kept"),
    "turned90.mp4": (rotated(90), "kept"),
    "turned180.mp4": (rotated(180), "kept"),
    "turned270.mp4": (rotated(270), "kept"),
    "fields.mp4": (transformed(*FIELDS, *X264, "-x264-params", "tff=1", count=48), "kept"),
    "slow.mp4": (transformed(count=4, fps=1), "frozen"),
    "fast.mp4": (transformed(count=240, fps=240), "kept"),
    "8k.mp4": (huge, "kept"),
    "mjpeg.avi": (transformed("-c:v", "mjpeg"), "kept"),
    "mpeg4.avi": (transformed("-c:v", "mpeg4", "-bf", "2"), "kept"),
    "moves.gif": (transformed("-f", "gif"), "kept"),
    "hevc.mov": (transformed("-c:v", "libx265", "-x265-params", "log-level=none"), "kept"),
    "link.mp4": (looping_link, "cannot be read: Too many levels of symbolic links"),
    "pipe.mp4": (os.mkfifo, "not a file but a pipe"),
    "moves.webp": (moving_webp, "a moving picture in a WEBP; make an MP4 or GIF of it"),
    "dolby.mp4": (transformed("-c:v", "libx265", "-x265-params", "log-level=none", "-tag:v", "dvh1"), "Dolby Vision"),
    "broken.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "not a picture|damaged"),
    "playlist.mp4": (
        lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nodd.mp4\n"),
        "not a video file|cannot be opened",
    ),
    "concat.mp4": (
        lambda path: path.write_text("ffconcat version 1.0\nfile odd.mp4\n"),
        "not a video file|cannot be op",
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Index]:
    """All of the corpus in one folder, ingested once."""
    root = tmp_path_factory.mktemp("corpus")
    for name, (make, _) in CORPUS.items():
        path = root / "data" / name
        path.parent.mkdir(exist_ok=True)
        make(path)
        path.with_suffix(".txt").write_text(f"a board called {name}")
    return root / "data", root / "work", run_ingest(root / "data", root / "work", "gates.near_duplicate=null")


@pytest.mark.parametrize("name", CORPUS)
def test_each_file_is_kept_or_dropped_with_its_reason(corpus: tuple[Path, Path, Index], name: str) -> None:
    _, work, index = corpus
    kept = [sample for sample in index.samples if sample.source == name]
    reasons = [drop.reason for drop in index.dropped if drop.source == name]
    assert kept or reasons, "silently skipped"
    fate = "kept" if kept else reasons[0]
    assert re.match(CORPUS[name][1], fate), fate
    for sample in kept:
        frames = pixels_of(index, work, sample.key)
        assert frames.shape == (sample.num_frames, sample.height, sample.width, 3)
        assert frames.std() > 10


def test_the_corpus_is_not_decoded_again(corpus: tuple[Path, Path, Index], monkeypatch: pytest.MonkeyPatch) -> None:
    data, work, index = corpus
    monkeypatch.setattr("ingest.__main__.run_jobs", None)
    assert run_ingest(data, work, "gates.near_duplicate=null") == index


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_rotation_is_honoured(corpus: tuple[Path, Path, Index], tmp_path: Path, degrees: int, turns: int) -> None:
    """ffmpeg's display_rotation is counter-clockwise, as numpy's rot90."""
    _, work, index = corpus
    upright = write_video(tmp_path / "plain.mp4", moving_square(3, 16, 64, 128))
    truth = np.rot90(decode(str(upright))[0].astype(float), turns)
    size = min(truth.shape[:2])
    top, left = (truth.shape[0] - size) // 2, (truth.shape[1] - size) // 2
    key = next(sample.key for sample in index.samples if sample.source == f"turned{degrees}.mp4")
    shown = pixels_of(index, work, key)[0].astype(float)
    assert shown.shape[0] == shown.shape[1] == size
    assert np.abs(shown - truth[top : top + size, left : left + size]).mean() < 3


def test_pixels_that_are_not_square_become_square(tmp_path: Path) -> None:
    write_video(tmp_path / "data" / "a_wide_board.mp4", moving_square(3, 16, 128, 128), 16, "-vf", "setsar=2", *X264)
    index = run_ingest(tmp_path / "data", tmp_path / "work", "resolution=128")
    assert (index.samples[0].height, index.samples[0].width) == (96, 160)


def test_interlaced_video_has_no_combs(corpus: tuple[Path, Path, Index]) -> None:
    _, work, index = corpus
    key = next(sample.key for sample in index.samples if sample.source == "fields.mp4")
    rows = pixels_of(index, work, key).astype(float).mean(axis=3)
    comb = np.abs(rows[:, 2:-2] - (rows[:, 1:-3] + rows[:, 3:-1]) / 2).mean()
    smooth = np.abs(rows[:, 2:-2] - (rows[:, :-4] + rows[:, 4:]) / 2).mean()
    assert comb < smooth


def flipped(seed: int, content: bytearray) -> None:
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 60)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


@pytest.mark.parametrize(
    "seeds", [pytest.param(range(12), id="few"), pytest.param(range(12, 50), id="many", marks=pytest.mark.soak)]
)
def test_flipped_bytes_never_stop_ingest(tmp_path: Path, seeds: range) -> None:
    data = make_dataset(tmp_path / "data", {"clip0.mp4": "a good board"})
    for seed in seeds:
        damaged(lambda content, seed=seed: flipped(seed, content))(data / f"board_{seed}.mp4")
    index = run_ingest(data, tmp_path / "work", "gates.near_duplicate=null caption.from_file_names=true")
    told = {sample.source for sample in index.samples} | {drop.source for drop in index.dropped}
    assert told == {"clip0.mp4"} | {f"board_{seed}.mp4" for seed in seeds}
    for sample in index.samples:
        assert pixels_of(index, tmp_path / "work", sample.key).shape == (5, 64, 64, 3)


STRANGE = (
    *("-i.mp4", "-vf.mp4", "a board's side.mp4", 'quo"ted.mp4', "two\nlines.mp4", "concat:a.mp4", "http:__x.mp4"),
    *("%d.mp4", "\u043f\u0440\u0438\u043c\u0435\u0440 \u8996\u983b \U0001f3a5.mp4", "[0:v];null.mp4", "a=b,c:d\\e.mp4"),
    *("x" * 200 + ".mp4", "dot.in.name.mp4", "file:x.mp4"),
)


def test_strange_names_are_only_names(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "-i data's", {name: f"board {n}" for n, name in enumerate(STRANGE)})
    (data / "sub").mkdir()
    (data / "sub" / "-i.mp4").symlink_to(write_video(tmp_path / "elsewhere.mp4", moving_square(99)))
    (data / "sub" / "-i.txt").write_text("a linked board")
    index = run_ingest(data, tmp_path / "work")
    assert {sample.source for sample in index.samples} == {*STRANGE, "sub/-i.mp4"}
    assert not index.dropped


def test_a_relative_folder_that_looks_like_an_option_or_protocol_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path / "http:" / "host", {"clip.mp4": "a board"})
    monkeypatch.chdir(tmp_path)
    assert len(run_ingest(Path("http:/host"), tmp_path / "work").samples) == 1


def test_the_work_folder_inside_the_dataset_is_not_data(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {"clip.mp4": "a board"})
    first = run_ingest(data, data / "work")
    assert run_ingest(data, data / "work") == first


def test_a_missing_ffmpeg_is_said_in_one_line(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {"clip.mp4": "a board"})
    done = run_command([*ingest_process(data, tmp_path / "work"), "--ffmpeg", str(tmp_path / "nothing")])
    assert done.returncode == 2
    assert re.search(r"error: FFMPEG=.*nothing.*no such program", done.stderr.splitlines()[-1])


def test_a_full_disk_ends_in_one_line_and_the_next_run_goes_on(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {f"clip{n}.mp4": f"board {n}" for n in range(3)})
    full = tmp_path / "ffmpeg"
    full.write_text("#!/bin/sh\necho 'av_interleaved_write_frame(): No space left on device' >&2\nexit 1\n")
    full.chmod(0o755)
    done = run_command([*ingest_process(data, tmp_path / "work"), "--ffmpeg", str(full)])
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert len(run_ingest(data, tmp_path / "work").samples) == 3


@contextmanager
def small_filesystem(work: Path) -> Iterator[None]:
    """A real file system of 128 KiB at `work`; only root may mount one."""
    work.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", work], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", work], check=True)


def can_mount() -> bool:
    """Whether this process may; it tries."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_filesystem(Path(folder, "work")):
                return True
        except (subprocess.CalledProcessError, FileNotFoundError):
            return False


def noise_clips(data: Path) -> Path:
    """Three clips whose samples take some 100 KiB each."""
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (16, 96, 96, 3), dtype=np.uint8)
        write_video(data / f"noise_{number}.mp4", noise)
    return data


def small_files() -> None:
    """No file of this process and its children may grow beyond 40 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_960, 40_960))


ROOM = "resolution=96 gates.max_motion=null gates.near_duplicate=null"


@pytest.mark.parametrize("what", ["file", *["file system"] * can_mount()])
def test_a_small_disk_ends_in_one_line_and_the_next_run_goes_on(tmp_path: Path, what: str) -> None:
    data, work = noise_clips(tmp_path / "data"), tmp_path / "work"
    real = what == "file system"
    with small_filesystem(work) if real else nullcontext():
        command, limit = ingest_process(data, work, ROOM), None if real else small_files
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert ("No space left on device" if real else "File too large") in done.stderr.splitlines()[-1]
        if real:
            subprocess.run(["mount", "-o", "remount,size=8m", work], check=True)
        assert len(run_ingest(data, work, ROOM).samples) == 3


def without_root_rights() -> None:
    """A root process would read any file; CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2) leave its bounding set."""
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_an_unreadable_file_is_dropped_with_the_reason(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {"clip1.mp4": "a board", "clip2.mp4": "another", "clip3.mp4": "a third"})
    (data / "clip2.mp4").chmod(0)
    (data / "clip3.txt").chmod(0)
    (data / "clip1_old.txt").symlink_to("nothing.txt")
    os.mkfifo(data / "pipe.txt")
    (data / "a_photo_of_a_board.png").touch(mode=0)
    command = ingest_process(data, tmp_path / "work")
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=without_root_rights
    )
    assert done.returncode == 0, done.stderr
    assert "dropped 5:" in done.stdout
    dropped = {drop.source: drop.reason for drop in read_index(tmp_path / "work").dropped}
    assert dropped["clip2.mp4"] == "cannot be read: Permission denied"
    assert dropped["clip3.mp4"] == "its caption cannot be read: Permission denied"
    assert set(dropped) == {f"clip{n}.mp4" for n in (2, 3)} | {"a_photo_of_a_board.png", "clip1_old.txt", "pipe.txt"}


def test_a_killed_or_hanging_ffmpeg_costs_the_clip_only_for_this_run(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {f"clip{n}.mp4": f"board {n}" for n in range(2)})
    dying = tmp_path / "ffmpeg"
    dying.write_text("#!/bin/sh\nkill -9 $$\n")
    dying.chmod(0o755)
    done = run_command([*ingest_process(data, tmp_path / "work"), "--ffmpeg", str(dying)])
    assert done.returncode == 2
    assert done.stdout.count(": ffmpeg was killed") == 2
    assert len(run_ingest(data, tmp_path / "work").samples) == 2


def test_ffmpeg_is_given_up_after_its_time(tmp_path: Path) -> None:
    hanging = tmp_path / "ffmpeg"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    with pytest.raises(Unlucky, match="took longer than 0 s"):
        Runner(str(hanging), tmp_path).run([], tmp_path, limit=0.2)
