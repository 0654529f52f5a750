"""What a run shows: TensorBoard says what events.jsonl says, and shows the previews; lines are plain off a terminal."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.files import write_json
from shared.models import ModelSpec, model_spec
from shared.resolve import Choice, to_json
from tests.e2e.commands import ROOT
from tests.train.make import config, listed, make_run, make_store
from train.checkpoint import latest
from train.group import ALONE
from train.log import RunLog
from train.preview import Previews, undecoded
from train.run import Run, choose_run
from train.session import start

Made = tuple[Path, ModelSpec, Path]
STEPS = 4
TIMINGS = {"seconds", "samples_per_second", "data_wait", "peak_memory_gib"}
LINE = (r"ETA 0:00:00 loss (\d\.\d{4}) lr \d\.\de-\d\d [\d.e+]+ step/s [\d.e+]+ samples/s "
        r"wait \d+% \d\.\d GiB\n")  # fmt: skip


class Watched(NamedTuple):
    run: Run
    rows: list[dict[str, Any]]  # of events.jsonl
    board: EventAccumulator
    said: str  # on stderr


def board_of(run: Run) -> EventAccumulator:
    """The run's TensorBoard events, read by TensorBoard."""
    board = EventAccumulator(str(run.folder / "tb"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return board.Reload()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A run of the shipped tiny model, whose decoder works, on drawn latents."""
    folder, spec = tmp_path_factory.mktemp("watched"), model_spec("tiny")
    held_out = listed(4, spec, (9, 64, 48), split="validation")
    samples = [*(listed(number, spec, (9, 64, 64)) for number in range(4)), held_out]
    store = make_store(folder / "s.zarr", spec, samples, ("a prompt", "another"))
    wish: dict[str, Any] = {"sample_prompts": ["a prompt", "another"], "sample_steps": 1, "max_steps": STEPS,
                            "resolution": "64x64,48x64", "validation": {"timesteps": 3}}  # fmt: skip
    run = make_run(folder / "run", config(Path("tiny"), **wish), store)
    with pytest.MonkeyPatch.context() as patch, (folder / "said").open("w") as file:
        patch.setattr("sys.stderr", file)
        start(run, finished=False)
    rows = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    return Watched(run, rows, board_of(run), (folder / "said").read_text())


def test_every_step_has_one_row_with_what_a_machine_wants_to_know(watched: Watched) -> None:
    rows = [row for row in watched.rows if row["event"] == "step"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() == {"event", "step", "expert", "lr", "loss", "grad_norm", "timing"}
        assert row["timing"].keys() == TIMINGS and 0 <= row["timing"]["data_wait"] <= 1
        assert row["timing"]["samples_per_second"] == pytest.approx(4 / row["timing"]["seconds"])


def test_tensorboard_has_every_number_of_the_rows(watched: Watched) -> None:
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in watched.rows:
        for name, value in {**row, **row.get("timing", {})}.items():
            if isinstance(value, int | float) and name != "step":
                wanted.setdefault(f"{row['event']}/{name}", []).append((row["step"], value))
    assert set(watched.board.Tags()["scalars"]) == wanted.keys() >= {"step/loss", "step/lr", "validation/loss"}
    quantiles = [name for name in wanted if re.fullmatch(r"validation/t0\d\d\d", name)]
    assert len(quantiles) == 3 and "validation/bucket 48x64x9" in wanted
    for tag, points in wanted.items():
        events = watched.board.Scalars(tag)
        assert [event.step for event in events] == [step for step, _ in points]
        assert [event.value for event in events] == pytest.approx([value for _, value in points], rel=1e-6)


def test_tensorboard_shows_the_contact_sheet_of_every_preview(watched: Watched) -> None:
    before, after = watched.board.Images("preview/single")
    assert (before.step, after.step) == (0, STEPS)
    for picture, name in ((before, "before"), (after, "after")):
        sheet = (watched.run.folder / "samples" / name / "sheet.png").read_bytes()
        assert picture.encoded_image_string == sheet
        assert picture.width > 5 * 64 and picture.height > 2 * 64  # five frames a row, two prompts
    assert before.encoded_image_string != after.encoded_image_string


def test_tensorboard_has_the_complete_config(watched: Watched) -> None:
    (text,) = watched.board.Tensors("config")
    saved = json.loads((watched.run.folder / "config.json").read_text())
    assert json.loads(text.tensor_proto.string_val[0]) == saved


def test_off_a_terminal_lines_are_plain(watched: Watched) -> None:
    assert "\x1b" not in watched.said and "\r" not in watched.said
    (shown,) = re.findall(f"step 4/4 {LINE}", watched.said)
    average, *later = (row["loss"] for row in watched.rows if row["event"] == "step")
    for loss in later:
        average += 0.05 * (loss - average)
    assert float(shown) == pytest.approx(average, abs=6e-5)


def test_what_happens_between_steps_is_said_with_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.log.PLAIN_SECONDS", -1.0)
    with RunLog(tmp_path, 3, 40) as log:
        advance = log.between("preview", 8)
        advance(2)
        assert re.fullmatch(r"preview 2/8 ETA 0:00:00\n", capsys.readouterr().err)
        log.progress.disable = False  # as on a terminal
        advance(2)
        assert log.progress.tasks[0].fields["line"] == "3/40 preview 4/8 ETA 0:00:00"
        advance(4)
        assert log.progress.tasks[0].fields["line"] == "3/40 "  # done: the next step's numbers come
        log.progress.disable = True


def test_previews_that_were_not_decoded_are_when_the_run_goes_on(watched: Watched) -> None:
    sheet = watched.run.folder / "samples" / "before" / "sheet.png"
    before = sheet.read_bytes()
    sheet.unlink()
    assert [row["step"] for row in undecoded(watched.run.folder)] == [0]
    with RunLog(watched.run.folder, STEPS, STEPS) as log:
        Previews(watched.run, log, ALONE).finish()
    assert sheet.read_bytes() == before and undecoded(watched.run.folder) == []
    assert [picture.step for picture in board_of(watched.run).Images("preview/single")] == [0, STEPS, 0]


def test_ctrl_c_on_a_terminal_says_what_is_saved_and_how_to_go_on(single: Made, tmp_path: Path) -> None:
    write_json(tmp_path / "c.json", to_json(config(single[0], max_steps=100_000)))
    folder = tmp_path / "run"
    said, code = on_a_terminal(
        ["train", "--work", tmp_path, "--store", single[2], "--config", tmp_path / "c.json", "--run", folder],
        until=b"samples/s",
    )
    saved = latest(folder)
    assert code == 130 and saved is not None
    assert re.search(rf"{saved.name}/100000 ETA \d+:\d\d:\d\d loss \d+\.\d{{4}} lr .* wait \d+% \d\.\d GiB", said), said
    assert (
        said.splitlines()[-1]
        == f"stopped after step {saved.name}; saved in {saved}; go on with: make train RUN={folder}"
    )
    again = choose_run(Choice(), Path("work"), None, folder, None)
    assert (again.stores, again.work) == ((single[2],), tmp_path) and again.config.max_steps == 100_000


def on_a_terminal(arguments: list[Any], until: bytes) -> tuple[str, int]:
    """`python -m ...` on a terminal of 100 columns, interrupted once it has said `until`: its output and exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    own_size = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")
    }  # xdist sets them
    process = subprocess.Popen([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True, env=own_size | {"TERM": "xterm"})  # fmt: skip
    os.close(theirs)
    said = b""
    while until not in said:
        said += os.read(ours, 1 << 16)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    with suppress(OSError):  # how a terminal's end is read
        while more := os.read(ours, 1 << 16):
            said += more
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode()), process.wait(60)
