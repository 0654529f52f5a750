"""Which frames become samples: every frame of these videos carries its own number as a grey level."""

import dataclasses
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ingest.__main__ import bundled_ffmpeg
from ingest.cut import Clip, Strategy, WindowRule, cut, grid_rate, slots, windows
from ingest.plan import Footage, Planner
from ingest.probe import Facts, probe
from ingest.runner import Runner
from ingest.transcode import Job, transcode
from shared.geometry import geometry
from shared.resolve import Choice, resolve
from shared.shards import Index
from tests.ingest.make import SMALL, Frames, pixels_of, run_ffmpeg, run_ingest, write_video

STEP = 3  # grey levels between neighbouring frames
OFF = " ".join(
    f"gates.{gate}=null"
    for gate in ("frozen", "black", "near_duplicate", "min_motion", "max_motion", "min_sharpness", "min_duration")
)
OFF += " gates.letterbox=false"


def numbered(count: int) -> Frames:
    """Frame k is plain grey 20 + 3 k."""
    levels = (20 + STEP * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, 64, 64, 3)).copy()


def numbers(index: Index, work: Path) -> list[list[int]]:
    """The frame numbers of each sample, in index order."""
    means = [pixels_of(index, work, sample.key).mean(axis=(1, 2, 3)) for sample in index.samples]
    return [np.round((mean - 20) / STEP).astype(int).tolist() for mean in means]


def ingest_numbered(tmp_path: Path, settings: str, count: int = 64, fps: float = 16, *options: str) -> list[list[int]]:
    write_video(tmp_path / "data" / "a_grey_wall.mp4", numbered(count), fps, *options)
    return numbers(run_ingest(tmp_path / "data", tmp_path / "work", f"{OFF} {settings}"), tmp_path / "work")


def test_uniform_windows_begin_at_zero_and_are_evenly_spaced(tmp_path: Path) -> None:
    shown = ingest_numbered(tmp_path, "windows_per_clip=AUTO")  # 32 slots at 8 frames/s
    assert shown == [[start + 2 * step for step in range(5)] for start in (0, 18, 36, 54)]


@pytest.mark.parametrize(("source_fps", "target"), [(30, 8), (24, 16), (12, 24), (25, 15)])
def test_frames_are_resampled_by_time(tmp_path: Path, source_fps: float, target: float) -> None:
    shown = ingest_numbered(tmp_path, f"video_config.target_fps={target} windows_per_clip=1 frames=17", 78, source_fps)
    for slot, frame in enumerate(shown[0]):
        assert -1 / source_fps < frame / source_fps - slot / target <= 0.5 / target + 1e-6


def test_a_window_alone_has_the_bytes_it_has_in_company(tmp_path: Path) -> None:
    """Decoding from a later keyframe gives the same pixels: an interrupted run may go on with what is missing."""
    path = write_video(tmp_path / "a_grey_wall.mp4", numbered(78), 30, "-c:v", "libx264", "-g", "12", "-qp", "4")
    facts = probe(path.absolute())
    config = resolve(Choice(preset="cpu", set=f"{SMALL} {OFF} windows_per_clip=3 video_config.target_fps=15"))
    planner = Planner(config.config, geometry(config.config, config.spec))
    samples = planner.video(Footage("sha", facts), (), True)[0].samples
    assert len(samples) == 3
    for name, chosen in (("together", samples), ("alone", samples[2:])):
        (tmp_path / name).mkdir()
        transcode(Job(path, "sha", facts, chosen), Runner(bundled_ffmpeg(), tmp_path / name))
    last = f"{samples[2].key}.mp4"
    assert (tmp_path / "together" / last).read_bytes() == (tmp_path / "alone" / last).read_bytes()


def test_keyframe_windows_begin_at_keyframes(tmp_path: Path) -> None:
    settings = "video_config.frame_sample_strategy=keyframe windows_per_clip=AUTO video_config.target_fps=16"
    options = ("-c:v", "libx264", "-qp", "4", "-x264-params", "keyint=12:scenecut=0")
    shown = ingest_numbered(tmp_path, settings, 64, 16, *options)
    assert [row[0] for row in shown] == [0, 12, 24, 48]


def test_stretch_spreads_frames_over_the_whole_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ingest_numbered(tmp_path, "video_config.stretch=true")
    assert len(shown) == 1
    assert shown[0][0] <= 7
    assert np.ptp(np.diff(shown[0])) <= 1
    assert shown[0][-1] >= 50
    short = ingest_numbered(tmp_path / "short", "video_config.stretch=true", 3, 16)
    assert len(short[0]) == 5
    assert capsys.readouterr().out.count("motion is faster or slower than it was") == 2


def test_variable_rate_follows_the_clock(tmp_path: Path) -> None:
    """30 frames in the first second, then 3 per second: a sample shows at each moment the frame of that moment."""
    keep = "select='lt(t,1)+not(mod(n,10))',format=yuv420p"
    options = ("-vf", keep, "-fps_mode", "vfr", "-c:v", "libx264", "-qp", "4")
    write_video(tmp_path / "data" / "a_grey_wall.mp4", numbered(72), 30, *options)
    facts = probe((tmp_path / "data" / "a_grey_wall.mp4").absolute())
    assert facts.variable_rate
    index = run_ingest(tmp_path / "data", tmp_path / "work", f"{OFF} frames=17 windows_per_clip=1")
    for slot, frame in enumerate(numbers(index, tmp_path / "work")[0]):
        shown_until = (frame // 10 + 1) / 3 if frame >= 30 else (frame + 1) / 30
        assert frame / 30 - 1 / 16 - 1e-6 <= slot / 8 <= shown_until + 1 / 16


def test_variants_are_a_shift_two_speeds_and_a_reversal(tmp_path: Path) -> None:
    write_video(tmp_path / "data" / "clip1.mp4", numbered(80))
    (tmp_path / "data" / "clip1.txt").write_text("a wall is bright")
    settings = f"{OFF} video_config.temporal_augmentation=true windows_per_clip=1"
    index = run_ingest(tmp_path / "data", tmp_path / "work", settings)
    shown = dict(zip([sample.variant for sample in index.samples], numbers(index, tmp_path / "work"), strict=True))
    assert shown["plain"] == [0, 2, 4, 6, 8]
    assert shown["shift"] == [4, 6, 8, 10, 12]
    assert shown["reverse"] == shown["plain"][::-1]
    assert np.diff(shown["slow"]).sum() in (6, 7)  # 0.8 x 8 frames of the source
    assert np.diff(shown["fast"]).sum() == 10
    assert len({sample.clip for sample in index.samples}) == 1
    (tmp_path / "data" / "clip1.txt").write_text("a wall is bright from left to right")
    again = run_ingest(tmp_path / "data", tmp_path / "work", settings)
    assert {sample.variant for sample in again.samples} == set(shown) - {"reverse"}


def test_long_sources_are_cut_at_scene_changes_and_no_window_crosses_one(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    boards = [np.kron(draw.integers(20, 235, (1, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8) for _ in range(3)]
    frames = np.concatenate([boards[0].repeat(20, 0), boards[1].repeat(44, 0), boards[2].repeat(26, 0)])
    write_video(tmp_path / "data" / "three_boards.mp4", frames)
    settings = f"{OFF} video_config.max_duration=2 windows_per_clip=AUTO"
    index = run_ingest(tmp_path / "data", tmp_path / "work", settings)
    starts = [sample.start for sample in index.samples]
    assert starts == sorted(starts)
    assert len(starts) >= 5
    for sample in index.samples:
        pixels = pixels_of(index, tmp_path / "work", sample.key).astype(float)
        assert np.abs(pixels - pixels[0]).max() < 30
        assert not any(sample.start < cut_at / 16 - 0.01 < sample.start + sample.duration - 0.13 for cut_at in (20, 64))


def facts_of(**changes: object) -> Facts:
    return Facts(codec="h264", pixel_format="yuv420p", width=64, height=64).model_copy(update=changes)


@pytest.mark.parametrize("longest", [1.0, 2.5, 7.0])
def test_cut_covers_the_source_and_keeps_to_the_length(longest: float) -> None:
    clips = cut(facts_of(start=0.5, end=19.5), longest, (3.0, 3.4, 12.0))
    assert clips[0].start == 0.5
    assert clips[-1].end == 19.5
    assert all(a.end == b.start for a, b in pairwise(clips))
    assert all(clip.end - clip.start <= longest + 1e-6 for clip in clips)
    assert {3.0, 3.4, 12.0} <= {clip.end for clip in clips}


@pytest.mark.parametrize("strategy", ["uniform", "random", "keyframe"])
@pytest.mark.parametrize("per_clip", [None, 1, 3, 50])
def test_windows_stay_inside_their_clip(strategy: Strategy, per_clip: int | None) -> None:
    clip = Clip(1.23, 7.89)
    rule = WindowRule(17, 16.0, per_clip, strategy, seed=5)
    found = windows(clip, rule, (0.0, 1.3, 2.6, 7.7), "sha")
    grid = slots(clip, Fraction(16))
    assert found == windows(clip, rule, (0.0, 1.3, 2.6, 7.7), "sha")
    assert 0 < len(found) <= (per_clip or 4)
    assert all(grid.start <= window.first <= grid.stop - 17 for window in found)
    if per_clip is None and strategy == "uniform":
        assert all(b.first - a.first >= 17 for a, b in pairwise(found))


def test_random_windows_depend_on_the_seed_and_the_source() -> None:
    rule = WindowRule(5, 16.0, 3, "random", seed=1)
    one = windows(Clip(0, 60), rule, (), "sha")
    assert one != windows(Clip(0, 60), dataclasses.replace(rule, seed=2), (), "sha")
    assert one != windows(Clip(0, 60), rule, (), "other")


def test_slots_show_only_frames_of_the_clip() -> None:
    rate = grid_rate(23.976)
    for start, end in ((0.0, 1.0), (0.21, 3.337), (2.0, 2.04)):
        for slot in slots(Clip(start, end), rate):
            assert slot / rate >= start - 1e-3
            assert math.floor(end * rate + 0.5) > slot


def test_a_damaged_tail_costs_only_its_own_windows(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "whole.mp4", np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), dtype=np.uint8)
    )
    (tmp_path / "data").mkdir()
    run_ffmpeg("-i", str(path), "-c", "copy", "-movflags", "+faststart", str(tmp_path / "data" / "grey_noise.mp4"))
    broken = bytearray((tmp_path / "data" / "grey_noise.mp4").read_bytes())
    broken[-len(broken) // 6 :] = bytes(len(broken) // 6 + 1)[: len(broken) // 6]
    (tmp_path / "data" / "grey_noise.mp4").write_bytes(broken)
    index = run_ingest(tmp_path / "data", tmp_path / "work", f"{OFF} windows_per_clip=4")
    assert 1 <= len(index.samples) <= 3
    assert index.samples[0].start == 0.0
    assert any("damaged" in drop.reason for drop in index.dropped)
