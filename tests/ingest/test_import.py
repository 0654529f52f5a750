"""Datasets of other trainers go in: their files become a folder that ingest reads and a config that resolves."""

import io
import json
import shutil
import tarfile
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ingest.__main__ import Order, ingest
from ingest.foreign.ai_toolkit import toolkit
from ingest.foreign.diffusion_pipe import pipe_dataset, pipe_run
from ingest.foreign.musubi import musubi
from ingest.importing import import_foreign
from shared.config import Config
from shared.errors import DatasetError
from shared.geometry import geometry
from shared.resolve import Choice, resolve
from shared.shards import Index, read_index
from tests.e2e.commands import refused, run
from tests.ingest.foreign import MUSUBI, PIPE, PIPE_DATA, TOOLKIT
from tests.ingest.make import SMALL, make_dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two folders of clips, one with captions in .caption files; a list of the second's files."""
    make_dataset(tmp_path / "dogs", {"a.mp4": "a dog runs", "b.mp4": "a dog sits"})
    make_dataset(tmp_path / "cats", {"a.mp4": "a cat runs"}, seed=7)
    make_dataset(tmp_path / "videos", {"c.mp4": "a bird sings"}, seed=20)
    (tmp_path / "cats" / "a.txt").rename(tmp_path / "cats" / "a.caption")
    row = {"video_path": str(tmp_path / "cats" / "a.mp4"), "caption": "a cat runs"}
    (tmp_path / "cats.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def imported(root: Path, name: str, content: str) -> tuple[Config, list[str], Index]:
    """The config, what was said, and the index that ingest makes of both, at a small size."""
    (root / name).write_text(content)
    said = import_foreign(root / name, root / "out")
    choice = Choice(preset="cpu", config=root / "out" / "config.json")
    resolved = resolve(choice)
    assert geometry(resolved.config, resolved.spec).num_frames % 4 == 1
    small = f"{SMALL} gates.near_duplicate=null base_model_name=ti2v-5b"
    order = Choice(preset="cpu", config=choice.config, set=small)
    ingest(Order(root / "out" / "data", root / "work", order, None, rehash=False))
    return resolved.config, said, read_index(root / "work")


def captions(index: Index) -> dict[str, tuple[tuple[str, ...], int, bool]]:
    return {sample.source: (sample.captions, sample.repeats, sample.prior) for sample in index.samples}


def test_musubi(root: Path) -> None:
    (root / "dogs" / "b.txt").write_text("a dog sits\na dog is brown\n")
    config, said, index = imported(root, "dataset.toml", MUSUBI)
    assert (config.resolution, config.frames, config.windows_per_clip, config.batch_size) == ("723", 45, 3, 2)
    assert captions(index) == {
        "cats/a.mp4": (("a cat runs",), 1, False),
        "dogs/a.mp4": (("a dog runs",), 4, False),
        "dogs/b.mp4": (("a dog sits", "a dog is brown"), 4, False),
    }
    left = [line.removeprefix("no equivalent: ") for line in said if line.startswith("no equivalent")]
    assert left == [
        "datasets[0].target_frames: 1; only the longest is made",
        "datasets[0].target_frames: 25; only the longest is made",
        "datasets[0].bucket_no_upscale = True",
        "datasets[0].cache_directory = '/somewhere/cache' (latents are kept in the store)",
        "datasets[0].source_fps = 30.0 (each file's own times are measured)",
        "datasets[1].frame_extraction gives windows_per_clip='AUTO', but 3 holds for all datasets",
        "datasets[1].frame_extraction = 'chunk': here windows one after the other, at most 4 per clip",
        "datasets[1].bucket_no_upscale = True",
        "dogs: 1 .txt file of several lines; here each line is a caption",
    ]
    assert said[-1] == f"next: make ingest DATA={root / 'out' / 'data'} CONFIG={root / 'out' / 'config.json'}"
    assert (root / "out" / "data" / "dogs").is_symlink(), "nothing is copied"


def test_musubi_without_buckets_is_an_exact_size(root: Path) -> None:
    text = '[[datasets]]\nvideo_directory = "dogs"\nresolution = [832, 480]\ntarget_frames = [9]\n'
    config, said, _ = imported(root, "dataset.toml", text)
    assert (config.resolution, config.frames, config.windows_per_clip) == ("832x480", 9, 1)
    assert not any(line.startswith("no equivalent") for line in said)


def test_diffusion_pipe(root: Path) -> None:
    (root / "data.toml").write_text(PIPE_DATA)
    config, said, index = imported(root, "run.toml", PIPE)
    assert (config.resolution, config.frames, config.windows_per_clip) == ("512", 33, 1)
    assert (config.base_model_name, config.expert, config.training_method) == ("t2v-a14b", "low_noise", "LORA")
    assert (config.batch_size, config.epochs, config.lora_rank, config.lora_alpha) == (8, 100, 32, 32)
    assert (config.optimizer.name, config.optimizer.rounding, config.optimizer.beta2) == ("ADAMW", "KAHAN", 0.99)
    assert (config.learning_rate, config.transformer.weight_dtype) == (2e-5, "FLOAT_8")
    assert config.timestep_distribution == "LOGIT_NORMAL"
    assert captions(index) == {
        "dogs/a.mp4": (("a dog runs",), 5, False),
        "dogs/b.mp4": (("a dog sits",), 5, False),
        "set_videos/c.mp4": (("a bird sings",), 1, False),
    }
    left = "\n".join(line for line in said if line.startswith("no equivalent"))
    for key in (
        "directory[1].mask_path",
        "min_ar",
        "blocks_to_swap",
        "save_every_n_epochs",
        "adapter.dtype",
        "output_dir",
    ):
        assert f"no equivalent: {key} = " in left
    assert left.count("\n") == 5


def test_the_dataset_file_of_diffusion_pipe_alone(root: Path) -> None:
    config, _, index = imported(root, "data.toml", PIPE_DATA.replace("[512]", "[[1280, 720], 512]"))
    assert config.resolution == "960,512"
    assert len({sample.source for sample in index.samples}) == 3


def test_ai_toolkit(root: Path) -> None:
    config, said, index = imported(root, "job.yaml", TOOLKIT)
    assert (config.resolution, config.frames, config.caption_prefix) == ("512,768", 41, "zorb")
    assert (config.base_model_name, config.expert, config.max_steps) == ("t2v-a14b", "high_noise", 2000)
    assert (config.lora_rank, config.lora_alpha, config.learning_rate, config.batch_size) == (16, 8, 1e-4, 2)
    assert (config.optimizer.name, config.optimizer.weight_decay, config.ema) == ("ADAMW_8BIT", 1e-4, 0.99)
    assert (config.sample_prompts, config.sample_seed, config.sample_steps) == (("zorb rolls down a hill",), 0, 25)
    assert (config.transformer.weight_dtype, config.output_dtype) == ("FLOAT_8", "FLOAT_16")
    assert captions(index) == {
        "cats/a.mp4": (("a cat runs",), 1, True),
        "dogs/a.mp4": (("zorb a dog runs",), 2, False),
        "dogs/b.mp4": (("zorb a dog sits",), 2, False),
    }
    left = [line.removeprefix("no equivalent: ").split(" = ")[0] for line in said if line.startswith("no equivalent")]
    assert left == ["datasets[0].shrink_video_to_frames", "network.conv", "save.max_step_saves_to_keep",
                    "train.switch_boundary_every", "sample.walk_seed"]  # fmt: skip


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tars_of_video2dataset(root: Path) -> None:
    clips = [(root / folder).read_bytes() for folder in ("dogs/a.mp4", "dogs/b.mp4", "cats/a.mp4")]
    first = {"00000_000.mp4": clips[0], "00000_000.txt": b"a dog runs", "00000_000.json": b'{"caption": "other"}'}
    first |= {"../../00000_001.mp4": clips[1], "00000_001.json": b'{"caption": "a dog sits", "status": "success"}'}
    tar_of(root / "set" / "00000.tar", first | {"00000_000.npy": b"flow"})
    tar_of(root / "set" / "00001.tar", {"00001_000.mp4": clips[2], "00001_000.txt": b"a cat runs"})
    import_foreign(root / "set", root / "out")
    order = Choice(preset="cpu", config=root / "out" / "config.json", set=f"{SMALL} gates.near_duplicate=null")
    ingest(Order(root / "out" / "data", root / "work", order, None, rehash=False))
    assert {source: said[0] for source, said in captions(read_index(root / "work")).items()} == {
        "00000/00000_000.mp4": ("a dog runs",),
        "00000/00000_001.mp4": ("a dog sits",),
        "00001/00001_000.mp4": ("a cat runs",),
    }
    assert sorted(path.name for path in root.iterdir()) == [
        "cats",
        "cats.jsonl",
        "dogs",
        "out",
        "set",
        "videos",
        "work",
    ]


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    tar_of(tmp_path / "set" / "a.tar", {"x/1.mp4": b"one", "y/1.mp4": b"two"})
    with pytest.raises(DatasetError, match=r"1\.mp4 is in two of its folders"):
        import_foreign(tmp_path / "set" / "a.tar", tmp_path / "out")


def test_a_clip_without_a_caption_file_is_left_to_ingest(root: Path) -> None:
    """Which says so, or has it captioned; other files are no clips."""
    shutil.copyfile(root / "videos" / "c.mp4", root / "cats" / "c.MP4")
    (root / "cats" / "notes.json").write_text("{}")
    job = "config: {process: [{datasets: [{folder_path: cats, caption_ext: caption}]}]}"
    _, _, index = imported(root, "job.yaml", job)
    assert set(captions(index)) == {"cats/a.mp4"}
    assert [(drop.source, drop.reason.partition(":")[0]) for drop in index.dropped] == [("cats/c.MP4", "no caption")]


def test_fastvideo_and_a_lone_jsonl(root: Path) -> None:
    rows = [{"path": "c.mp4", "cap": ["a bird sings", "a small bird"], "fps": 16.0, "resolution": {"width": 96}}]
    _, _, index = imported(root, "videos2caption.json", json.dumps(rows))
    assert captions(index) == {f"{root.name.strip('_')}/c.mp4": (("a bird sings", "a small bird"), 1, False)}
    (root / "merge.txt").write_text(f"{root / 'videos'},videos2caption.json\n")
    assert "1 dataset" in import_foreign(root / "merge.txt", root / "out2")[0]
    import_foreign(root / "cats.jsonl", root / "out3")
    assert (root / "out3" / "data" / "cats" / "a.mp4").resolve() == root / "cats" / "a.mp4"


def test_two_files_of_one_name_and_one_folder_named_twice(root: Path) -> None:
    rows = [{"video_path": str(root / folder / "a.mp4"), "caption": folder} for folder in ("dogs", "cats")]
    _, _, index = imported(root, "both.jsonl", "\n".join(map(json.dumps, rows)))
    assert captions(index) == {"both/a.mp4": (("dogs",), 1, False), "both/a_2.mp4": (("cats",), 1, False)}
    twice = '[[directory]]\npath = "dogs"\nnum_repeats = 3\n' * 2
    (root / "twice.toml").write_text(twice)
    make_dataset(root / "dogs" / "old", {"c.mp4": "an old dog"}, seed=40)
    nested = '[[directory]]\npath = "dogs/old"\nnum_repeats = 7\n[[directory]]\npath = "dogs"\nnum_repeats = 2\n'
    shutil.rmtree(root / "out")
    assert captions(imported(root, "nested.toml", nested)[2]) == {
        "dogs/a.mp4": (("a dog runs",), 2, False),
        "dogs/b.mp4": (("a dog sits",), 2, False),
        "dogs/old/c.mp4": (("an old dog",), 7, False),
    }
    assert any("dogs is named twice" in line for line in import_foreign(root / "twice.toml", root / "out2"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.toml", "a = ", "not TOML"),
        ("x.yaml", "a: [", "not YAML"),
        ("x.toml", "[[datasets]]\nvideo_directory = 'nowhere'", r"datasets\[0\]\.video_directory: 'nowhere': no such"),
        ("x.toml", "[[datasets]]\nresolution = [8, 8]", r"datasets\[0\] names no video_directory"),
        ("x.toml", "datasets = 3", "datasets is no list of tables"),
        ("x.toml", "[[directory]]\nnum_repeats = 2", r"directory\[0\]\.path: '': no such"),
        ("x.toml", "[[directory]]\npath = 'cats.jsonl'", "is a file; a folder is wanted"),
        ("x.toml", "dataset = 'cats.jsonl'", "none of"),
        ("x.toml", "learning_rate = 1", "none of the kinds that can be read"),
        ("x.yaml", "config: {process: []}", "config.process is no list of tables"),
        ("x.jsonl", '{"path": "a"}', "line 1: no video_path"),
        ("x.jsonl", "{", "line 1: not JSON"),
        ("x.json", '{"frames": 9}', "is a config that needs no import"),
        ("x.json", '[{"a": 1}]', "entry 0 has no path and cap"),
        ("x.txt", "hello", "line 1: not folder,file.json"),
        ("x.tar", "no tar", "not a whole tar"),
        ("x.docx", "", ".docx is none of"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "cats.jsonl").write_text("[]")
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=message) as caught:
        import_foreign(tmp_path / name, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


WRONG = (None, 3, -1, 1.5, float("inf"), float("nan"), "x", [], {}, [1, "a"], ["512", "512"], [[-1, 5]], True, [{}])


def changed(value: Any, wrong: Any) -> Iterator[Any]:
    """The value with a wrong one in place of each of its parts, one at a time."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts):
        for other in (wrong, *changed(part, wrong)):
            value[key] = other
            yield value
        value[key] = part


@pytest.mark.parametrize("name", ["musubi", "pipe", "data", "toolkit"])
def test_a_value_of_another_kind_is_named_or_refused_in_one_line(root: Path, name: str) -> None:
    (root / "data.toml").write_text(PIPE_DATA)
    read, text = {"musubi": (musubi, MUSUBI), "pipe": (pipe_run, PIPE), "data": (pipe_dataset, PIPE_DATA),
                  "toolkit": (toolkit, TOOLKIT)}[name]  # fmt: skip
    value = yaml.safe_load(text) if name == "toolkit" else tomllib.loads(text)
    for wrong in WRONG:
        for content in changed(value, wrong):
            try:
                read(root / "x.yaml", deepcopy(content))
            except DatasetError as error:
                assert "\n" not in str(error)


def test_the_command_writes_once_and_names_the_next(root: Path) -> None:
    (root / "dataset.toml").write_text(MUSUBI)
    said = run("ingest", "import", root / "dataset.toml", "--out", root / "out")
    assert f"next: make ingest DATA={root / 'out' / 'data'}" in said
    assert "exists; remove it" in refused("ingest", "import", root / "dataset.toml", "--out", root / "out")
    assert "no such file" in refused("ingest", "import", root / "nothing.toml")


def test_a_value_that_the_schema_refuses_is_named_and_left_out(root: Path) -> None:
    config, said, _ = imported(root, "job.yaml", TOOLKIT.replace("guidance_scale: 3.5", "guidance_scale: 0.5"))
    assert config.sample_guidance_scale is None
    assert any("sample_guidance_scale" in line and "0.5" in line for line in said if line.startswith("no equivalent"))
