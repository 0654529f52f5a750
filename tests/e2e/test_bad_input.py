"""Bad input gets one line that names the thing and the command that mends it, exit code 2, and nothing half-written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cli import MAKE_VARIABLES
from tests.e2e.commands import ROOT, refused

STAGES = ("ingest", "encode", "train")


def stage(name: str, work: Path, data: Path | None = None) -> list[object]:
    return [name, "--work", work, *(["--data", data or work] if name == "ingest" else [])]


@pytest.mark.parametrize("name", STAGES)
def test_an_unknown_preset_names_the_nearest(name: str, tmp_path: Path) -> None:
    line = refused(*stage(name, tmp_path / "work", tmp_path), "--preset", "17gb")
    assert "PRESET=17gb" in line
    assert "16gb" in line
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", STAGES)
def test_a_corrupt_config_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text('{"seed": ')
    line = refused(*stage(name, tmp_path / "work", tmp_path), "--config", tmp_path / "my.json")
    assert "my.json" in line
    assert not (tmp_path / "work").exists()


def test_a_missing_dataset_folder_is_named(tmp_path: Path) -> None:
    line = refused("ingest", "--data", tmp_path / "nowhere", "--work", tmp_path / "work", "--preset", "demo")
    assert "nowhere" in line
    assert "make ingest DATA=" in line
    assert not (tmp_path / "work").exists()


def test_make_ingest_without_data_says_how_to_give_it() -> None:
    done = subprocess.run(["make", "ingest"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "make ingest DATA=" in done.stderr


@pytest.mark.parametrize("files", [[], ["notes.txt", "data.csv"]])
def test_a_folder_without_videos_is_refused(files: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in files:
        (data / name).write_text("not a video")
    line = refused("ingest", "--data", data, "--work", tmp_path / "work", "--preset", "demo")
    assert str(data) in line
    assert not (tmp_path / "work" / "index.json").exists()


def test_encode_before_ingest_names_ingest(tmp_path: Path) -> None:
    assert "make ingest DATA=" in refused("encode", "--work", tmp_path / "work", "--preset", "demo")
    assert not (tmp_path / "work").exists()


def test_train_before_encode_names_encode(tmp_path: Path) -> None:
    line = refused("train", "--work", tmp_path / "work", "--preset", "demo", "--run", tmp_path / "run")
    assert "make encode" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["sample", "export"])
def test_a_command_on_a_run_names_the_variable_it_lacks(command: str) -> None:
    assert "RUN is missing" in refused("train", command)


def test_contradictions_are_refused_before_torch_loads(tmp_path: Path) -> None:
    code = "import sys, train.__main__ as m\ntry: m.main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    (tmp_path / "s.zarr").mkdir()
    command = [
        sys.executable,
        "-c",
        code,
        "--store",
        tmp_path / "s.zarr",
        "--preset",
        "demo",
        "--set",
        "expert=low_noise",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "False\n", done
    assert done.stderr == "error: expert=low_noise: tiny has one expert; leave expert at both\n"


def test_help_names_every_variable_and_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    variables = [*MAKE_VARIABLES, "TORCH", "TORCH_INDEX", "PYTHON"]
    targets = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)[0].split()
    assert not [name for name in variables if not re.search(rf"\b{name}\b", told)]
    assert not [name for name in targets if not re.search(rf"^  {name} ", told, re.M)]
