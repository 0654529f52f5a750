"""The walls between the rooms, the budgets of files and functions, the agreed top level: read off the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("ingest", "encode", "train", "shared")
# imports at the top of a module; those inside functions are the named exceptions of the design
WALLS = {
    "ingest": {"encode", "train", "torch", "webdataset", "diffusers", "transformers", "zarr"},
    "encode": {"ingest", "train"},
    "train": {"ingest", "encode", "av", "ffmpeg", "webdataset", "imageio_ffmpeg"},
    "shared": {"ingest", "encode", "train", "torch", "diffusers", "transformers"},
}
TOP = {
    "ingest",
    "encode",
    "train",
    "shared",
    "tests",
    "Makefile",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "constraints.txt",
}
MAX_FILE, MAX_FUNCTION = 400, 60


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", node.lineno


def top_level_imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_across_a_wall(room: str) -> None:
    rooms = set(ROOMS) - {"shared", room}
    broken = []
    for path in sources(room):
        tree = ast.parse(path.read_text())
        broken += [f"{path}:{line} {name}" for name, line in imported(tree) if name.split(".")[0] in rooms]
        broken += [
            f"{path}:{line} {name}" for name, line in top_level_imports(tree) if name.split(".")[0] in WALLS[room]
        ]
    assert not broken


@pytest.mark.parametrize("room", (*ROOMS, "tests"))
def test_files_and_functions_stay_small(room: str) -> None:
    long = []
    for path in sources(room):
        text = path.read_text()
        if text.count("\n") > MAX_FILE:
            long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION:
                long.append(f"{path}: {node.name}")
    assert not long


@pytest.mark.parametrize("room", (*ROOMS, "tests"))
def test_nothing_catches_everything(room: str) -> None:
    broad = [
        f"{path}:{node.lineno}"
        for path in sources(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}))
    ]
    assert not broad


def test_the_top_level_is_the_agreed_one() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tops = {name.split("/")[0] for name in tracked if name}
    assert {name for name in tops if not name.startswith(".")} <= TOP


@pytest.mark.parametrize(
    ("module", "forbidden"), [("ingest", ["torch", "webdataset"]), ("train", ["av", "ffmpeg", "webdataset"])]
)
def test_starting_a_room_loads_nothing_it_must_not(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}.__main__; print([m for m in {forbidden} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
