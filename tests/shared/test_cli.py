"""How commands end when the disk or the user says no: in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cli import MAKE_VARIABLES
from tests.e2e.commands import ROOT, refused


def python(code: str) -> str:
    """What a program says on stderr."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False).stderr


def test_an_interrupt_while_a_command_loads_is_one_line() -> None:
    said = python("import shared.cli, os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    assert said == "interrupted; the same command goes on from here\n"


def test_other_errors_keep_their_traceback() -> None:
    assert "Traceback" in python("import shared.cli; 1 / 0")


@pytest.mark.parametrize("inside", ["", "work"])
def test_a_work_folder_that_is_a_file_is_refused(tmp_path: Path, inside: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a_red_ball.mp4").write_text("no video")
    (tmp_path / "file").write_text("x")
    line = refused("ingest", "--data", tmp_path / "data", "--work", tmp_path / "file" / inside, "--preset", "cpu")
    assert str(tmp_path / "file") in line
    assert "a file is where a folder is wanted" in line


def test_a_value_that_no_option_takes_is_one_line() -> None:
    assert refused("train", "--resume", "maybe").endswith("(with make: RESUME=...); --help explains")
    assert "abc" in refused("train", "plan", "--card", "abc")
    assert "--presett" in refused("train", "--presett", "cpu")


def test_make_variables_are_those_of_the_makefile() -> None:
    listed = re.search(r"^FLAGS := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert listed is not None and listed[1].replace("\\", " ").split() == list(MAKE_VARIABLES)
    assert "with make" not in refused("train", "sample", "--seed", "abc")  # there is no such variable


def test_a_variable_that_no_target_knows_is_refused() -> None:
    done = subprocess.run(["make", "help", "PREST=8gb"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "PREST=8gb: no target knows this variable" in done.stderr


def test_a_missing_option_is_one_line_that_names_the_make_variable() -> None:
    assert refused("encode", "push") == "error: --to is missing (with make: TO=...); --help explains"
