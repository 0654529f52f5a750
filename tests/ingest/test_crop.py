"""`crop: smart` keeps what moves or has edges, wherever it is; where nothing decides, it keeps the middle."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ingest.__main__ import bundled_ffmpeg
from ingest.crop import STEPS, busiest, cover, is_choice, middle, strips_of
from ingest.cut import Window
from ingest.decide import Source, decide
from ingest.discover import Found
from ingest.focus import FocusJob, check, find_focus
from ingest.frames import frames_at
from ingest.ledger import Learned, Ledger, read_ledger, write_ledger
from ingest.plan import Planner
from ingest.probe import Unlucky, probe
from ingest.runner import Runner, Stopped
from shared.bucket import Bucket
from shared.geometry import geometry
from shared.resolve import Choice, resolve
from tests.ingest.make import BT709, SMALL, Frames, moving_square, pixels_of, run_ffmpeg, run_ingest, write_video

WHOLE = Fraction(0), Fraction(1)
FREE = "gates.frozen=null gates.min_motion=null gates.near_duplicate=null gates.min_sharpness=null"
RED = np.array([220, 40, 40])


def scene(left: int, top: int = 20, size: tuple[int, int] = (64, 192), count: int = 16) -> Frames:
    """A red, striped thing that trembles at a place, on a plain, dim wall."""
    frames = np.full((count, *size, 3), 70, np.uint8)
    for index in range(count):
        x = left + index % 3
        frames[index, top : top + 24, x : x + 24] = RED
        frames[index, top : top + 24 : 4, x : x + 24] //= 2
    return frames


def redness(frames: Frames) -> float:
    """Pixels per frame that are red."""
    return float((frames[..., 0].astype(int) - frames[..., 1] > 60).sum() / len(frames))


def cropped(tmp_path: Path, frames: Frames, settings: str = "", *options: str) -> Frames:
    write_video(tmp_path / "data" / "a_wall.mp4", frames, 16, *options)
    index = run_ingest(tmp_path / "data", tmp_path / "work", f"{FREE} resolution=64x64 crop=smart {settings}")
    return pixels_of(index, tmp_path / "work", index.samples[0].key)


@pytest.mark.parametrize("left", [0, 120, 164])
def test_a_thing_is_kept_wherever_it_is(tmp_path: Path, left: int) -> None:
    assert redness(cropped(tmp_path, scene(left))) > 0.95 * redness(scene(left))


@pytest.mark.parametrize("top", [0, 164])
def test_also_in_a_tall_picture(tmp_path: Path, top: int) -> None:
    assert redness(cropped(tmp_path, scene(16, top, (192, 64)))) > 0.95 * redness(scene(16, top, (192, 64)))


def test_the_middle_of_the_side_would_have_lost_it(tmp_path: Path) -> None:
    write_video(tmp_path / "data" / "a_wall.mp4", scene(164))
    index = run_ingest(tmp_path / "data", tmp_path / "work", f"{FREE} resolution=64x64")
    assert redness(pixels_of(index, tmp_path / "work", index.samples[0].key)) == 0


def test_motion_counts_more_than_still_edges(tmp_path: Path) -> None:
    """A still thing on the left, as bright and striped, and wider; the one that moves is on the right."""
    frames = scene(160)
    frames[:, 20:44, 4:30] = 84
    frames[:, 20:44:4, 4:30] //= 2
    assert redness(cropped(tmp_path, frames)) > 0.95 * redness(scene(160))


@pytest.mark.parametrize("degrees", [90, 180])
def test_a_turned_video_is_cut_as_it_is_shown(tmp_path: Path, degrees: int) -> None:
    write_video(tmp_path / "plain.mp4", scene(160))
    (tmp_path / "data").mkdir()
    run_ffmpeg("-display_rotation", str(degrees), "-i", str(tmp_path / "plain.mp4"), "-c", "copy",
               str(tmp_path / "data" / "a_wall.mp4"))  # fmt: skip
    index = run_ingest(tmp_path / "data", tmp_path / "work", f"{FREE} resolution=64x64 crop=smart")
    assert redness(pixels_of(index, tmp_path / "work", index.samples[0].key)) > 0.95 * redness(scene(160))


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("mp4", ("-c:v", "mpeg4", "-q:v", "2")),
        ("mkv", ("-c:v", "libx264", "-pix_fmt", "yuv420p10le")),
        ("gif", ()),
        ("mov", ("-c:v", "qtrle", "-pix_fmt", "rgb24")),
        ("avi", ("-c:v", "msrle", "-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse")),
    ],
)
def test_other_codecs_and_depths_too(tmp_path: Path, suffix: str, options: tuple[str, ...]) -> None:
    path = write_video(tmp_path / "data" / f"a_wall.{suffix}", scene(4), 16, *options or ("-f", "gif"))
    frames = [frame for frame in frames_at(path, probe(path), [0.1])]
    index = run_ingest(tmp_path / "data", tmp_path / "work", f"{FREE} resolution=64x64 crop=smart")
    kept = pixels_of(index, tmp_path / "work", index.samples[0].key)
    assert redness(kept) > 0.85 * redness(scene(4)), frames[0].format.name


def test_pictures_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.fromarray(scene(160)[0]).save(tmp_path / "data" / "a_wall.png")
    index = run_ingest(tmp_path / "data", tmp_path / "work", "resolution=64x64 crop=smart")
    assert redness(pixels_of(index, tmp_path / "work", index.samples[0].key)) > 0.95 * redness(scene(160)[:1])


def boards() -> dict[str, Frames]:
    """Still pictures that are the same on both sides of the middle, or everywhere."""
    noise = np.random.default_rng(2).integers(40, 200, (64, 96, 3), dtype=np.uint8)
    blocks = moving_square(6, 1, 64, 192)[:, :, :96]
    twins = np.maximum(scene(10), scene(10)[:, :, ::-1])[:1]
    pictures = {"plain": np.full((1, 64, 192, 3), 99, np.uint8), "twins": twins}
    pictures |= {"mirrored": np.concatenate([blocks, blocks[:, :, ::-1]], axis=2)}
    pictures |= {"noise": np.concatenate([noise, noise[:, ::-1]], axis=1)[None], "middle": scene(83)[:1]}
    return {name: frames.repeat(16, 0) for name, frames in pictures.items()}


@pytest.mark.parametrize("name", boards())
def test_where_nothing_decides_the_middle_is_kept(tmp_path: Path, name: str) -> None:
    """The same key as `crop: center` has: the same pixels."""
    write_video(tmp_path / "data" / "a_board.mp4", boards()[name])
    keys = [
        run_ingest(tmp_path / "data", tmp_path / crop, f"{FREE} gates.max_motion=null resolution=64x64 crop={crop}")
        .samples[0].key
        for crop in ("smart", "center")
    ]  # fmt: skip
    assert keys[0] == keys[1]


def test_each_window_follows_the_thing_and_its_variants_agree(tmp_path: Path) -> None:
    frames = np.concatenate([scene(0, count=32), scene(164, count=32)])
    write_video(tmp_path / "data" / "a_wall.mp4", frames)
    (tmp_path / "data" / "a_wall.txt").write_text("a red thing is there")
    settings = f"{FREE} resolution=64x64 crop=smart windows_per_clip=2 video_config.temporal_augmentation=true"
    index = run_ingest(tmp_path / "data", tmp_path / "work", settings)
    plain = {sample.clip: sample for sample in index.samples if sample.variant == "plain"}
    assert len(plain) == 2
    assert {sample.clip for sample in index.samples} == set(plain), "a variant has another crop than its window"
    for sample in plain.values():
        assert redness(pixels_of(index, tmp_path / "work", sample.key)) > 0.95 * redness(frames)


@pytest.mark.parametrize("bars", [(24, 0), (0, 48)], ids=["above", "beside"])
def test_black_bars_are_cut_away_first(tmp_path: Path, bars: tuple[int, int]) -> None:
    high, wide = ((width, width) for width in bars)
    frames = np.pad(scene(160), ((0, 0), high, wide, (0, 0)))
    write_video(tmp_path / "data" / "a_wall.mp4", frames)
    settings = f"{FREE} resolution=64x64 crop=smart"
    index = run_ingest(tmp_path / "data", tmp_path / "work", settings)
    frames = pixels_of(index, tmp_path / "work", index.samples[0].key)
    assert redness(frames) > 0.9 * redness(scene(160))
    assert frames[:, [0, -1]].mean() > 40 and frames[:, :, [0, -1]].mean() > 40


def test_it_is_looked_for_once_and_found_alike_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "data" / "a_wall.mp4", scene(164, count=48), 16, *BT709, "-g", "12")
    settings = f"{FREE} resolution=64x64 crop=smart windows_per_clip=3"
    first = run_ingest(tmp_path / "data", tmp_path / "work", settings)
    assert [s.key for s in run_ingest(tmp_path / "data", tmp_path / "other", settings).samples] == [
        s.key for s in first.samples
    ]
    windows = tuple(Window(Fraction(8), start, 5) for start in (0, 9, 19))
    (tmp_path / "staging").mkdir()
    runner = Runner(bundled_ffmpeg(), tmp_path / "staging")
    alone = [find_focus(FocusJob(path, "sha", probe(path), (window,)), runner).learned.focus for window in windows]
    together = find_focus(FocusJob(path, "sha", probe(path), windows), runner).learned.focus
    assert together == alone[0] | alone[1] | alone[2], "a window has the energy that it has in company"
    monkeypatch.setattr("ingest.__main__.run_jobs", None)
    assert run_ingest(tmp_path / "data", tmp_path / "work", settings) == first


def test_a_stopped_look_records_nothing_and_a_slow_one_costs_the_clip_for_this_run(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a_wall.mp4", scene(164))
    source = Source(Found("a_wall.mp4", ("a wall",)), path, "sha", probe(path))
    resolved = resolve(Choice(preset="cpu", set=f"{SMALL} resolution=64x64 crop=smart"))
    planner, ledger = Planner(resolved.config, geometry(resolved.config, resolved.spec)), Ledger()
    (job,) = decide([source], planner, ledger, set()).jobs
    assert isinstance(job, FocusJob)
    runner = Runner(bundled_ffmpeg(), tmp_path)
    with pytest.raises(Unlucky, match="took too long"):
        check(runner, give_up=0.0)
    runner.stopping.set()
    with pytest.raises(Stopped):
        find_focus(job, runner)
    assert not list(tmp_path.glob("*.json"))
    ledger.learn("sha", Learned.without(job.names, Unlucky("took too long to look at")))
    decision = decide([source], planner, ledger, set())
    assert ([drop.reason for drop in decision.dropped], decision.jobs) == (["took too long to look at"], [])
    write_ledger(tmp_path, ledger)
    assert decide([source], planner, read_ledger(tmp_path), set()).jobs == [job]


def test_a_source_that_needs_no_cut_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "data" / "a_board.mp4", moving_square(3))
    monkeypatch.setattr("ingest.__main__.find_focus", None)
    assert len(run_ingest(tmp_path / "data", tmp_path / "work", "crop=smart").samples) == 1


@pytest.mark.parametrize("seed", range(8))
def test_the_place_mirrors_with_the_picture_and_beats_the_middle(seed: int) -> None:
    draw = np.random.default_rng(seed)
    strips = bytes(draw.integers(0, 256, 64, dtype=np.uint8).tolist())
    side, kept = 320, int(draw.integers(60, 300))
    left = busiest(side, kept, strips, WHOLE)
    right = busiest(side, kept, strips[::-1], WHOLE)
    assert abs(left + kept - (side - right)) <= 2 + (side - kept) / STEPS
    assert left % 2 == 0
    assert 0 <= left <= side - kept
    inside = strips_energy(strips, left, kept, side)
    assert inside >= strips_energy(strips, middle(side, kept), kept, side) - 255 * 64 / side


def test_of_places_that_are_as_good_the_middle_one_is_taken() -> None:
    """A thing in pixels 240 to 255 of 320 is in every window of 160 that begins at 96 to 160: steps 100 to 160."""
    strips = bytes(255 * (48 <= strip < 51) for strip in range(64))
    assert busiest(320, 160, strips, WHOLE) == 130
    assert busiest(320, 160, strips[::-1], WHOLE) == 30


@pytest.mark.parametrize("seed", range(8))
def test_a_cover_is_the_least_even_size_that_keeps_the_aspect(seed: int) -> None:
    draw = np.random.default_rng(seed)
    display = draw.uniform(100, 4000), draw.uniform(100, 4000)
    bucket = Bucket(9, *(16 * int(side) for side in draw.integers(4, 80, 2)))
    size, factor = cover(display, bucket), max(bucket.width / display[0], bucket.height / display[1])
    assert size[0] >= bucket.width and size[1] >= bucket.height
    assert all(not side % 2 and 0 <= side - factor * length < 2 for side, length in zip(size, display, strict=True))


def strips_energy(strips: bytes, left: int, kept: int, side: int) -> float:
    """Energy between two pixels by another way: one value per pixel."""
    return float(np.frombuffer(strips, np.uint8).repeat(side // 64)[left : left + kept].sum() * 64 / side)


def test_little_things() -> None:
    assert strips_of([0, 0, 4, 4], 2) == "00ff"
    assert strips_of([0, 0], 64) == "0000"
    assert is_choice(64, 32)
    assert not is_choice(856, 848)
    assert busiest(100, 50, bytes(64), WHOLE) == middle(100, 50)
