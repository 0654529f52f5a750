"""From a folder to tars and index: what is kept, what is dropped and why, and what a second run does."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from ingest.index import drop_lines
from ingest.index import held_out as held_out_of
from shared.config import Config
from shared.errors import ConfigError, DatasetError
from shared.files import sha256_of
from shared.shards import Drop, Index, read_index, shard_folder
from tests.ingest.make import (
    ROOT,
    ingest_process,
    make_dataset,
    moving_square,
    pixels_of,
    run_command,
    run_ingest,
    write_video,
)

CAPTIONS = {f"clip{number}.mp4": f"a square of kind {number} slides over a board" for number in (1, 2, 10)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", dict(CAPTIONS))


def test_every_clip_becomes_samples_with_its_caption_in_natural_order(data: Path, tmp_path: Path) -> None:
    index = run_ingest(data, tmp_path / "work")
    assert [sample.source for sample in index.samples] == ["clip1.mp4", "clip2.mp4", "clip10.mp4"]
    assert [sample.captions for sample in index.samples] == [(caption,) for caption in CAPTIONS.values()]
    assert {(s.num_frames, s.height, s.width, s.fps) for s in index.samples} == {(5, 64, 64, 8.0)}
    assert not index.dropped


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its own
def test_the_stock_webdataset_reads_every_sample(data: Path, tmp_path: Path) -> None:
    index = run_ingest(data, tmp_path / "work", "windows_per_clip=2")
    tars = [str(path) for path in shard_folder(tmp_path / "work").glob("*.tar")]
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(tars, shardshuffle=False)}
    assert set(read) == {sample.key for sample in index.samples}
    assert len(read) == 6
    for sample in index.samples:
        facts = json.loads(read[sample.key]["json"])
        assert (facts["num_frames"], facts["fps"], facts["clip"]) == (5, 8.0, sample.clip)
        assert pixels_of(index, tmp_path / "work", sample.key).shape == (5, 64, 64, 3)


def test_the_index_knows_each_tar_by_hash_and_order(data: Path, tmp_path: Path) -> None:
    index = run_ingest(data, tmp_path / "work", "shard_megabytes=1")
    for shard in index.shards:
        path = shard_folder(tmp_path / "work") / shard.name
        assert (sha256_of(path), path.stat().st_size) == (shard.sha256, shard.bytes)
        with tarfile.open(path) as tar:
            assert tuple(dict.fromkeys(name.split(".")[0] for name in tar.getnames())) == shard.keys


def test_keys_and_tars_are_the_same_in_any_folder(data: Path, tmp_path: Path) -> None:
    first = run_ingest(data, tmp_path / "work")
    moved = data.rename(tmp_path / "elsewhere")
    second = run_ingest(moved, tmp_path / "other")
    assert (first.samples, first.shards) == (second.samples, second.shards)


def test_an_unchanged_dataset_is_neither_read_nor_decoded_again(data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = run_ingest(data, work)
    before = {path: path.stat().st_mtime_ns for path in shard_folder(work).iterdir()}
    code = (
        "import sys, ingest.__main__ as m\n"
        "m.bundled_ffmpeg = m.examine = m.run_jobs = None\n"
        "try:\n m.main()\nfinally:\n print(sorted({'torch', 'webdataset', 'av', 'ffmpeg'} & set(sys.modules)))"
    )
    arguments = ingest_process(data, work)[3:]
    done = run_command([sys.executable, "-c", code, *arguments])
    assert done.stdout.strip().endswith("[]"), done.stdout
    assert run_ingest(data, work) == first
    assert {path: path.stat().st_mtime_ns for path in shard_folder(work).iterdir()} == before


def test_an_edited_caption_rewrites_no_pixels(data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = run_ingest(data, work)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shard_folder(work).iterdir()}
    (data / "clip2.txt").write_text("a new caption\nand a second one\n")
    second = run_ingest(data, work)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shard_folder(work).iterdir()} == before
    assert [s.captions for s in second.samples][1] == ("a new caption", "and a second one")
    assert [s.key for s in second.samples] == [s.key for s in first.samples]


def test_a_removed_file_leaves_the_index_and_a_new_one_joins_without_touching_the_rest(
    data: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    first = run_ingest(data, work)
    (data / "clip2.mp4").unlink()
    make_dataset(data, {"clip11.mp4": "one more square"}, seed=50)
    second = run_ingest(data, work)
    assert [s.source for s in second.samples] == ["clip1.mp4", "clip10.mp4", "clip11.mp4"]
    assert second.shards[0] == first.shards[0]
    assert second.samples[0] == first.samples[0]
    assert {path.name for path in shard_folder(work).iterdir()} == {shard.name for shard in second.shards}


def test_a_changed_file_of_the_same_name_is_seen(data: Path, tmp_path: Path) -> None:
    first = run_ingest(data, tmp_path / "work")
    write_video(data / "clip1.mp4", moving_square(77))
    second = run_ingest(data, tmp_path / "work")
    assert first.samples[0].key != second.samples[0].key
    assert first.samples[1:] == second.samples[1:]


def test_identical_bytes_are_kept_once_and_said(data: Path, tmp_path: Path) -> None:
    (data / "copy of clip.mp4").write_bytes((data / "clip1.mp4").read_bytes())
    index = run_ingest(data, tmp_path / "work")
    assert len(index.samples) == 3
    assert [(drop.source, drop.reason) for drop in index.dropped] == [("copy of clip.mp4", "same bytes as clip1.mp4")]


def test_pictures_are_one_frame_samples(data: Path, tmp_path: Path) -> None:
    Image.fromarray(moving_square(5, 1, 128, 64)[0]).save(data / "a_tall_board.png")
    index = run_ingest(data, tmp_path / "work", "resolution=128")
    picture = next(sample for sample in index.samples if sample.extension == "png")
    assert (picture.num_frames, picture.captions) == (1, ("a tall board",))
    assert (picture.height, picture.width) == (192, 96)
    assert pixels_of(index, tmp_path / "work", picture.key).shape == (1, 192, 96, 3)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_pictures_are_upright(tmp_path: Path, suffix: str) -> None:
    """A camera that was held on its side says so in EXIF."""
    upright = Image.fromarray(moving_square(5, 1, 128, 64)[0])
    tags = Image.Exif()
    tags[0x0112] = 6  # shown after a quarter turn clockwise
    (tmp_path / "data").mkdir()
    upright.rotate(90, expand=True).save(tmp_path / "data" / f"a_tall_board.{suffix}", exif=tags, quality=95)
    index = run_ingest(tmp_path / "data", tmp_path / "work", "resolution=128")
    shown = pixels_of(index, tmp_path / "work", index.samples[0].key)[0]
    assert shown.shape == (192, 96, 3)
    assert np.abs(shown - np.asarray(upright.resize((96, 192), Image.Resampling.LANCZOS)).astype(float)).mean() < 6


def test_concepts_priors_and_validation_come_from_sub_folders(tmp_path: Path) -> None:
    names = {"zorb/a.mp4": "a ring", "ordinary/b.mp4": "a board", "videos/held/c.mp4": "a box"}
    data = make_dataset(tmp_path / "data", dict(names))
    settings = ('concepts={"zorb":{"repeats":3}} prior.folders=["ordinary"] prior.weight=0.5 '
                "validation.folder=held caption_prefix=sks")  # fmt: skip
    index = run_ingest(data, tmp_path / "work", settings)
    facts = {s.source: (s.repeats, s.prior, s.weight, s.split, s.captions) for s in index.samples}
    assert facts == {
        "zorb/a.mp4": (3, False, 1.0, "train", ("sks a ring",)),
        "ordinary/b.mp4": (1, True, 0.5, "train", ("a board",)),
        "videos/held/c.mp4": (1, False, 1.0, "validation", ("sks a box",)),
    }
    with pytest.raises(ConfigError, match=r"concepts\.zorg: no sub-folder 'zorg'.*zorb"):
        run_ingest(data, tmp_path / "work", 'concepts={"zorg":{"repeats":3}}')


def held_out(index: Index) -> set[str]:
    return {sample.source for sample in index.samples if sample.split == "validation"}


def test_a_fraction_is_held_out_by_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "data", {f"clip{n}.mp4": f"board {n}" for n in range(8)})
    some = held_out(run_ingest(data, tmp_path / "work", "validation.fraction=0.5"))
    more = held_out(run_ingest(data, tmp_path / "work", "validation.fraction=0.9"))
    assert 0 < len(some) < 8
    assert some <= more
    one = run_ingest(data, tmp_path / "work", "validation.fraction=0.0001")  # no hash is so low: the lowest one
    assert len(held_out(one)) == 1 and held_out(one) <= some
    assert "1 of them held out for validation" in capsys.readouterr().out
    assert not held_out(run_ingest(data, tmp_path / "work", "validation.fraction=0"))


@pytest.mark.parametrize(
    ("sources", "held"),
    [
        ({"5": "a"}, ""),  # one is trained
        ({"5": "a", "6": "a"}, "5"),
        ({"1": "zorb", "2": "prior", "3": "prior"}, ""),  # the only one of the concept is trained
        ({"3": "zorb", "2": "zorb", "1": "prior"}, "2"),
        ({"9": "held", "5": "a", "6": "a"}, "9"),
    ],
)
def test_where_no_hash_is_low_enough_one_of_several_is_held_out(sources: dict[str, str], held: str) -> None:
    values = {"validation": {"fraction": 1e-3, "folder": "held"}, "prior": {"folders": ["prior"]}}
    settings = Config.model_validate(values)
    found: Any = [SimpleNamespace(sha256=first * 64, found=SimpleNamespace(folder=folder))
                  for first, folder in sources.items()]  # fmt: skip
    assert held_out_of(settings, found) == {first * 64 for first in held}
    both = settings.model_copy(update={"validation": settings.validation.model_copy(update={"fraction": 0.36})})
    assert held_out_of(both, found) >= {first * 64 for first in sources if first < "6" and sources[first] != "held"}


def test_a_clip_that_is_too_short_is_dropped_with_its_length(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {"clip1.mp4": "a board"})
    write_video(data / "short.mp4", moving_square(9, count=4))
    (data / "short.txt").write_text("a short one")
    index = run_ingest(data, tmp_path / "work")
    assert [drop.source for drop in index.dropped] == ["short.mp4"]
    assert "too short: 0.25 s (16 frames/s); 5 frames at 8 frames/s need 0.62 s" in index.dropped[0].reason


def test_a_video_without_caption_is_dropped_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "data", {"clip1.mp4": "a board", "IMG_0042.mp4": None})
    index = run_ingest(data, tmp_path / "work")
    assert [(drop.source, drop.reason.split(":")[0]) for drop in index.dropped] == [("IMG_0042.mp4", "no caption")]
    said = capsys.readouterr().out
    assert "1 sample of 1 file in 1 shard\n" in said
    assert "\n  IMG_0042.mp4: no caption: write it to a .txt file of the same name, or set caption.model\n" in said
    assert said.endswith(f"\nreport: {tmp_path / 'work' / 'report.html'}; next: make encode\n")


def test_many_drops_are_summed_up_by_kind_with_an_example_that_says_what_to_do() -> None:
    drops = [Drop(source=f"{n}.mp4", reason=f"too short: {n} s") for n in range(2)]
    drops += [Drop(source=f"IMG_{n}.mp4", reason="no caption: write it") for n in range(4)]
    assert drop_lines(tuple(drops)) == [
        "dropped 6:",
        "       4 such as IMG_0.mp4: no caption: write it",
        "       2 such as 0.mp4: too short: 0 s",
    ]
    clip = Drop(source="a.mp4", reason="black: 3", start=2.5)
    assert drop_lines((clip,))[1] == "  a.mp4 at 2.5 s: black: 3"  # other clips of the file may be kept


def test_files_smaller_than_their_bucket_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "data", {"large.mp4": "a board", "large2.mp4": "another board"})
    write_video(data / "a_small_board.mp4", moving_square(9, height=48, width=48))
    run_ingest(data, tmp_path / "work", "video_config.min_resolution=16")
    assert "\n1 of 3 files is smaller than its bucket and is scaled up\n" in capsys.readouterr().out


def test_the_current_folder_is_a_dataset(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"clip1.mp4": "a board"})
    command = ingest_process(Path(), tmp_path / "work")
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kept 1 sample of 1 file" in done.stdout


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "it is empty"),
        (lambda path: path.write_text("x"), "is not a folder"),
        (lambda path: (path.mkdir(), (path / "notes.doc").write_text("x")), "no video or image .there are 1 other"),
    ],
)
def test_data_that_is_no_dataset_is_refused_in_one_line(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "data")  # type: ignore[operator]
    with pytest.raises(DatasetError, match=message) as caught:
        run_ingest(tmp_path / "data", tmp_path / "work")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work").exists()


def test_nothing_left_is_an_error_with_a_report(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a_red_ball.mp4").write_text("this is no video")
    done = run_command(ingest_process(tmp_path / "data", tmp_path / "work"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "nothing of DATA" in done.stderr.splitlines()[-1]
    assert "not a video file" in done.stdout
    assert (tmp_path / "work" / "report.html").is_file()


def test_data_is_asked_for_and_the_command_line_works(data: Path, tmp_path: Path) -> None:
    done = run_command([sys.executable, "-m", "ingest"])
    assert (done.returncode, "DATA is missing" in done.stderr) == (2, True)
    done = run_command(ingest_process(data, tmp_path / "work"))
    assert "3 videos, 0 images; captions: 3 from .txt files" in done.stdout
    assert "kept 3 samples of 3 files" in done.stdout


def test_max_resolution_bounds_the_longer_side(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_video(data / "a_wide_board.mp4", moving_square(3, height=96, width=192))
    free = run_ingest(data, tmp_path / "free", "resolution=160").samples[0]
    bound = run_ingest(data, tmp_path / "bound", "resolution=160 video_config.max_resolution=160").samples[0]
    assert max(free.height, free.width) > 160 >= max(bound.height, bound.width)
    with pytest.raises(ConfigError, match="max_resolution: 160 is less than resolution 832x480"):
        run_ingest(data, tmp_path / "bound", "resolution=832x480 video_config.max_resolution=160")


def test_several_resolutions_give_a_sample_each_from_one_pass(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {"clip1.mp4": "a board"})
    index = run_ingest(data, tmp_path / "work", "resolution=64,96 crop=top")
    assert sorted(sample.height for sample in index.samples) == [64, 96]
    assert len({sample.clip for sample in index.samples}) == 2


def test_the_kept_part_is_the_middle_or_the_top(tmp_path: Path) -> None:
    frames = moving_square(3, height=192, width=64)
    frames[:, :64], frames[:, 64:128], frames[:, 128:] = frames[:, :64] // 4, 120, 250
    data = tmp_path / "data"
    write_video(data / "a_tall_board.mp4", frames)
    for crop, low, high in (("top", 0, 60), ("center", 115, 125)):
        index = run_ingest(
            data, tmp_path / crop, f"resolution=64x64 crop={crop} gates.frozen=null gates.min_motion=null"
        )
        assert low < pixels_of(index, tmp_path / crop, index.samples[0].key).mean() < high


def test_a_changed_setting_redoes_only_what_it_affects(data: Path, tmp_path: Path) -> None:
    first = run_ingest(data, tmp_path / "work")
    second = run_ingest(data, tmp_path / "work", "resolution=64,96 prior.weight=0.5")
    assert first.shards[0] in second.shards
    assert {s.key for s in first.samples} < {s.key for s in second.samples}


def test_rehash_reads_every_file_again_and_makes_nothing_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    first = run_ingest(data, work)
    status = (data / "clip1.mp4").stat()
    content = bytearray((data / "clip1.mp4").read_bytes())
    content[-1] ^= 1
    (data / "clip1.mp4").write_bytes(content)
    os.utime(data / "clip1.mp4", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run_ingest(data, work) == first, "size, time and inode are unchanged"
    second = run_ingest(data, work, rehash=True)
    assert second.samples[0].key != first.samples[0].key
    assert second.samples[1:] == first.samples[1:]
    monkeypatch.setattr("ingest.__main__.run_jobs", None)
    assert run_ingest(data, work, rehash=True) == second


def test_a_source_shorter_than_the_user_wants_is_dropped(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        run_ingest(data, tmp_path / "work", "gates.min_duration=3")
    reasons = {drop.reason for drop in read_index(tmp_path / "work").dropped}
    assert reasons == {"too short: 1.00 s, gates.min_duration asks for 3"}
