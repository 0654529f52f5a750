"""Gates keep ordinary clips and drop bad ones with reason and value; bars are cut away, dark scenes are not bars."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ingest.__main__ import Order, ingest
from ingest.gates import Duplicates, measure, perceptual_hash, refusal
from shared.config import GatesConfig
from shared.errors import DatasetError
from shared.resolve import Choice
from shared.shards import Index, read_index
from tests.demo.dataset import write_dataset
from tests.ingest.make import BT709, Frames, moving_square, pixels_of, run_ingest, write_video


def run_to_the_end(data: Path, work: Path, settings: str) -> Index:
    """The index, also of a run that kept nothing."""
    with contextlib.suppress(DatasetError):
        run_ingest(data, work, settings)
    return read_index(work)


def fate(tmp_path: Path, frames: Frames, settings: str = "") -> list[str]:
    """Reasons for which a clip of these frames is dropped; none: it is kept."""
    write_video(tmp_path / "data" / "some_board.mp4", frames)
    write_video(tmp_path / "data" / "other_board.mp4", moving_square(1234))
    index = run_to_the_end(tmp_path / "data", tmp_path / "work", settings)
    return [drop.reason for drop in index.dropped if drop.source == "some_board.mp4"]


def test_a_frozen_clip_is_dropped_unless_the_gate_is_off(tmp_path: Path) -> None:
    still = moving_square(3)[:1].repeat(16, 0)
    assert fate(tmp_path, still)[0].startswith("frozen: grey-level change per second 0")
    assert not fate(tmp_path, still, "gates.frozen=null gates.min_motion=null")


def test_a_black_clip_is_dropped_and_a_dark_one_kept(tmp_path: Path) -> None:
    assert fate(tmp_path, moving_square(3) // 60)[0].startswith("black: mean grey level")
    assert not fate(tmp_path, moving_square(3) // 60, "gates.black=null")
    assert not fate(tmp_path, moving_square(3) // 4)


def blurred(frames: Frames, radius: int) -> Frames:
    return np.stack([np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(radius))) for frame in frames])


def trembling(frames: Frames) -> Frames:
    """One frame, in which a few grey levels go up and down: not frozen per second, but far less than any motion."""
    still = frames[:1].repeat(len(frames), 0)
    still[::4, 0, :20] += 6
    return still


def passing_door() -> Frames:
    """A bright stripe that moves over the dark."""
    frames = np.full((16, 256, 256, 3), 20, np.uint8)
    for index in range(16):
        frames[index, :, 8 * index : 8 * index + 90] = 250
    return frames


DRAWN = moving_square(3)
NOISE = np.random.default_rng(0).integers(0, 255, DRAWN.shape, dtype=np.uint8)
# gate -> (a clip that only it drops, its settings, how the reason begins, where the value lies)
EXTREMES: dict[str, tuple[Frames, str, str, tuple[float, float]]] = {
    "min_duration": (DRAWN[:3], "frames=1", "too short: 0.19 s, gates.min_duration asks for 0.25", (0.18, 0.2)),
    "frozen": (DRAWN[:1].repeat(16, 0), "gates.min_motion=null", "frozen: grey-level change per second", (0, 0.3)),
    "black": (DRAWN // 60, "", "black: mean grey level", (0, 8)),
    "min_motion": (trembling(DRAWN), "gates.frozen=0.01", "too little motion: grey-level", (0.001, 0.02)),
    "max_motion": (NOISE // 255 * 255 + NOISE % 2 * 254, "", "too much motion: grey-level", (60, 130)),
    "min_sharpness": (
        blurred(passing_door(), 16),
        "resolution=256",
        "blurred: variance of the Laplacian / of the picture",
        (0, 0.002),
    ),
}


@pytest.mark.parametrize("gate", EXTREMES)
def test_each_default_drops_its_extreme_with_reason_and_value(tmp_path: Path, gate: str) -> None:
    frames, settings, reason, (low, high) = EXTREMES[gate]
    write_video(tmp_path / "data" / "some_board.mp4", frames)
    (drop,) = run_to_the_end(tmp_path / "data", tmp_path / "work", settings).dropped
    assert drop.reason.startswith(reason)
    assert drop.value is not None
    assert low <= drop.value <= high
    index = run_to_the_end(tmp_path / "data", tmp_path / "work", f"{settings} gates.{gate}=null")
    assert len(index.samples) == 1


def test_ordinary_clips_pass_every_default(tmp_path: Path) -> None:
    """Drawn boards, sharp and a little soft; the demo's faintest clips are red on a gray that is as bright."""
    faint = moving_square(5) // 12 + 90
    for name, frames in {
        "sharp": moving_square(9),
        "faint": faint,
        "soft": blurred(DRAWN, 2),
        "dark": moving_square(7) // 4,
    }.items():
        write_video(tmp_path / "data" / f"a_{name}_board.mp4", frames)
    index = run_ingest(tmp_path / "data", tmp_path / "work")
    assert (len(index.samples), index.dropped) == (4, ())


def test_the_demo_keeps_all_of_its_clips(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    ingest(Order(tmp_path / "data", tmp_path / "work", Choice(preset="demo"), None, rehash=False))
    index = read_index(tmp_path / "work")
    assert (len(index.samples), index.dropped) == (32, ())


def test_a_picture_is_not_judged_by_motion(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, picture in {"a_board": DRAWN[0], "a_plain_wall": np.full((96, 96, 3), 99, np.uint8)}.items():
        Image.fromarray(picture).save(tmp_path / "data" / f"{name}.png")
    index = run_ingest(tmp_path / "data", tmp_path / "work", "gates.near_duplicate=null")
    assert (len(index.samples), index.dropped) == (2, ())


def test_a_changed_threshold_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fate(tmp_path, moving_square(3))
    monkeypatch.setattr("ingest.__main__.run_jobs", None)
    index = run_to_the_end(tmp_path / "data", tmp_path / "work", "gates.min_motion=90 gates.frozen=0")
    assert len(index.dropped) == 2


def test_a_re_encoded_copy_is_a_near_duplicate_and_another_clip_is_not(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_video(data / "a_board.mp4", moving_square(3))
    write_video(data / "the_same_board.mp4", moving_square(3), 16, *BT709[:2], "-c:v", "libx264", "-crf", "30")
    write_video(data / "z_other_board.mp4", moving_square(4))
    index = run_ingest(data, tmp_path / "work")
    assert [(drop.source, drop.reason.split(":")[0]) for drop in index.dropped] == [
        ("the_same_board.mp4", "looks like a_board.mp4")
    ]
    assert "gates.near_duplicate asks for more than" in index.dropped[0].reason
    assert len(run_ingest(data, tmp_path / "work", "gates.near_duplicate=null").samples) == 3


def with_bars(frames: Frames, bar: int, black: int = 0) -> Frames:
    """Bars of `bar` pixels above and below."""
    return np.pad(frames, ((0, 0), (bar, bar), (0, 0), (0, 0)), constant_values=black)


def test_bars_are_cut_away_before_bucketing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    picture = moving_square(3, height=96, width=160)
    write_video(data / "a_board_with_bars.mp4", with_bars(picture, 24))
    write_video(
        data / "b_side_bars_on_a_board.mp4", with_bars(moving_square(8, height=160, width=96), 32).swapaxes(1, 2)
    )
    index = run_ingest(data, tmp_path / "work", "resolution=128 windows_per_clip=2")
    assert {(s.source[0], s.width, s.height) for s in index.samples} == {("a", 160, 96), ("b", 160, 96)}
    for sample in index.samples:
        frames = pixels_of(index, tmp_path / "work", sample.key)
        edges = (
            np.concatenate([frames[:, 0], frames[:, -1]], axis=1),
            np.concatenate([frames[:, :, 0], frames[:, :, -1]], 1),
        )
        assert all(edge.mean(axis=2).max(axis=0).min() > 20 for edge in edges)
    uncut = run_ingest(data, tmp_path / "work", "resolution=128 windows_per_clip=2 gates.letterbox=false")
    assert {(s.source[0], s.width, s.height) for s in uncut.samples} == {("a", 128, 128), ("b", 160, 96)}


@pytest.mark.parametrize("black", [0, 8])
def test_a_lit_thing_on_black_is_no_letterbox(tmp_path: Path, black: int) -> None:
    frames = np.full((16, 96, 160, 3), black, np.uint8)
    grid_H, grid_W = np.mgrid[:96, :160]
    for index in range(16):
        frames[index][(grid_H - 48) ** 2 + (grid_W - 30 - 6 * index) ** 2 < 20**2] = 220
    write_video(tmp_path / "data" / "a_moon_crosses_the_sky.mp4", frames)
    index = run_ingest(tmp_path / "data", tmp_path / "work", "resolution=128 gates.black=null")
    assert (index.samples[0].height, index.samples[0].width) == (96, 160)


def test_bars_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "data" / "a_board_with_bars.mp4", with_bars(moving_square(3, height=64, width=96), 16))
    first = run_ingest(tmp_path / "data", tmp_path / "work")
    monkeypatch.setattr("ingest.__main__.run_jobs", None)
    assert run_ingest(tmp_path / "data", tmp_path / "work") == first


def test_hashes_survive_noise_and_tell_pictures_apart() -> None:
    draw = np.random.default_rng(1)
    pictures = [np.kron(draw.integers(0, 255, (9, 16)), np.ones((16, 16))).astype(np.uint8) for _ in range(20)]
    noisy = [np.clip(p + draw.normal(0, 6, p.shape), 0, 255).astype(np.uint8) for p in pictures]
    bits = [int(perceptual_hash(picture), 16) for picture in pictures]
    for index, picture in enumerate(noisy):
        apart = [(bit ^ int(perceptual_hash(picture), 16)).bit_count() for bit in bits]
        assert apart[index] <= 4
        assert min(apart[:index] + apart[index + 1 :]) > 8


@pytest.mark.parametrize("bits", [0, 4, 9])
def test_bands_find_every_twin_that_comparing_all_pairs_finds(bits: int) -> None:
    draw = np.random.default_rng(bits)
    found = Duplicates(bits)
    seen: list[int] = []
    for step in range(300):
        near = seen[int(draw.integers(len(seen)))] if seen and draw.random() < 0.5 else int(draw.integers(2**62))
        for place in draw.integers(0, 64, int(draw.integers(0, bits + 4))):
            near ^= 1 << int(place)
        truth = any((near ^ other).bit_count() <= bits for other in seen)
        assert (found.twin_of(f"clip{step}", "kind", [f"{near:016x}"]) is not None) == truth
        if not truth:
            seen.append(near)


def test_gates_judge_by_the_measures() -> None:
    grey = moving_square(3)[..., 0]
    good = measure(grey)
    assert refusal(good, GatesConfig(), 16.0, still=False) is None
    assert refusal(measure(grey[:1].repeat(5, 0)), GatesConfig(), 16.0, still=False) is not None
    assert refusal(measure(grey[:1]), GatesConfig(), 0.0, still=True) is None
    assert measure(np.full((5, 32, 32), 77, np.uint8)).black == 77
    for name, limit in (("black", 255), ("frozen", 1e9), ("min_motion", 255), ("max_motion", 0), ("min_sharpness", 1)):
        fault = refusal(good, GatesConfig.model_validate({name: limit}), 16.0, still=False)
        assert fault is not None and f"gates.{name} " in fault[0]  # the setting to change is named
