"""Every command of the README runs as it is printed, with the tiny model and two steps in place of the large ones.

`make -n` turns a make command into the program's command line, which then runs in this process, in a folder of its own.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.demo.dataset import write_dataset
from tests.e2e.commands import ROOT
from tests.shared.hub import REPO, hub_address
from tests.train.guide import FRAGMENTS
from tests.train.hub import ModelHub

README = (ROOT / "README.md").read_text()
SMALL = ("resolution=64x64 frames=9 video_config.max_frames=9 video_config.target_fps=8 max_steps=2 batch_size=1 "
         "sample_steps=2 windows_per_clip=1 lora_rank=4 train_dtype=FLOAT_32 transformer.weight_dtype=FLOAT_32 "
         "text_encoder.weight_dtype=FLOAT_32 vae.weight_dtype=FLOAT_32 optimizer.name=ADAMW "
         "optimizer.rounding=NEAREST output_dtype=FLOAT_32 gates.near_duplicate=null")  # fmt: skip
CONFIGURED = {"ingest", "encode", "train", "plan", "explain", "doctor", "status", "verify"}
# commands that other tests run (the demo, the tests themselves), or that need a GPU, or a machine to set up
ELSEWHERE = {"demo", "test", "bench-gpu", "setup", "help"}
GUIDE = {"character": "Workflow 1", "style": "Workflow 2", "domain": "Workflow 3", "concept": "Workflow 4"}


def commands() -> list[str]:
    """Lines of code blocks that are commands, in order."""
    return [line.split("  #")[0].strip() for line in README.splitlines() if line.startswith("make ")]


def inline() -> list[str]:
    """Commands inside sentences."""
    return re.findall(r"`(make [a-z-]+[^`]*)`", README)


def program(command: str) -> list[str]:
    """['train', 'export', '--run', ...] of a make command, by make itself."""
    words = shlex.split(command)
    variables = dict(word.split("=", 1) for word in words[2:])
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if re.search(r"-m (ingest|encode|train) ?", line))
    parts = shlex.split(line.rpartition(" -m ")[2])
    return [re.sub(r"\$(\w+)", lambda found: variables.get(found[1], "work"), part) for part in parts]


def run(command: str) -> None:
    """Run a make command's program here; the tiny model's settings are laid over all others."""
    room, *arguments = program(command)
    if shlex.split(command)[1] in CONFIGURED:
        said = arguments.index("--set") if "--set" in arguments else None
        settings = f"{arguments[said + 1]} {SMALL}" if said is not None else SMALL
        arguments = [*arguments, "--model", "tiny", "--set", settings]
    importlib.import_module(f"{room}.__main__").main.main(arguments)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data sets and JSON files that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_dataset(tmp_path / "dataset", 1, 1)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "first_frame.png")
    for name in GUIDE:
        shutil.copytree(tmp_path / "dataset", tmp_path / name, dirs_exist_ok=True)
    for path in (tmp_path / "concept").rglob("*.txt"):
        path.write_text(path.read_text().replace("zorb", "<concept>"))
    for name, text in re.findall(r"`(\w+\.json)`[^\n]*\n+```json\n(.*?)```", README, re.DOTALL):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_four_workflows_are_the_guides_json() -> None:
    blocks = {name: json.loads(text) for name, text in
              re.findall(r"`(\w+)\.json`[^\n]*\n+```json\n(.*?)```", README, re.DOTALL)}  # fmt: skip
    guide = {section.split(":")[0]: fragment for section, _, fragment in FRAGMENTS}
    assert blocks == {name: guide[section] for name, section in GUIDE.items()}


def test_every_target_the_readme_names_exists() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command.split()[1] for command in [*commands(), *inline()]}
    assert named <= known and {"ingest", "encode", "train", "publish", "workflow", "doctor"} <= named


def test_every_command_runs_with_the_tiny_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they are printed; the Hub is a stand-in on loopback."""
    run_here = [command for command in commands() if command.split()[1] not in ELSEWHERE]
    with hub_address(hub := ModelHub(place / "hub"), monkeypatch):
        for command in run_here:
            if "IMAGE=" in command:
                with pytest.raises(
                    SystemExit, match="2"
                ):  # tiny starts from no picture; tests/train/test_picture.py does
                    run(command)
            else:
                run(command)
    runs = {path.name for path in (place / "runs").iterdir() if (path / "done").is_file()}
    assert runs == {"work-16gb", "character-8gb", "style-16gb", "domain-24gb-finetune", "concept-embedding"}
    first = place / "runs" / "work-16gb"
    for name in ("work-16gb.safetensors", "work-16gb-kohya_lora.safetensors", "work-16gb-comfyui.json"):
        assert (first / name).is_file()
    assert list((first / "samples").rglob("*.mp4"))
    assert (hub.folder / "README.md").is_file() and REPO.partition("/")[2] in (hub.folder / "README.md").read_text()


def test_inline_commands_that_look_and_change_nothing_run_too(place: Path) -> None:
    """make plan, explain and doctor as the sentences have them."""
    looking = {command for command in inline() if command.split()[1] in ("plan", "explain")}
    assert looking
    for command in sorted(looking):
        run(command.replace("...", "16gb"))
    assert not (place / "runs").exists()
