"""What a run says: a live line, events.jsonl (one row per step), TensorBoard. Nothing here changes what is trained.

Rows of events.jsonl are equal for equal runs, except their `timing`. On resume the file is cut back to the checkpoint.
"""

import json
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter

PNG_SIZE = struct.Struct(">16xII")  # width and height lie behind signature and chunk header (PNG, 11.2.1 IHDR)
PLAIN_SECONDS = 10.0  # between lines when the output is no terminal
LINE_WIDTH = 100  # columns of the live line without its bar, at most
SMOOTH = 0.95  # decay of the loss average that is shown


def cut_events(path: Path, keep_bytes: int) -> None:
    """Drop what was logged after a checkpoint."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(keep_bytes)


def read_events(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's events.jsonl; none where it has not begun."""
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


class RunLog:
    """Writes one run's events; use as a context manager."""

    def __init__(self, folder: Path, done: int, total: int) -> None:
        self.console = Console(stderr=True)
        self.events: TextIO = (folder / "events.jsonl").open("a")
        self.board = EventFileWriter(str(folder / "tb"))
        # TensorBoard drops what an interrupted session wrote from this step on
        self.board.add_event(
            Event(step=done + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        )
        room = self.console.width - LINE_WIDTH - 1
        bar = [BarColumn(min(room, 40))] if room > 0 else []
        columns = (*bar, TextColumn("{task.fields[line]}"))
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("train", total=total, completed=done, line=f"{done}/{total} loading")
        self.total, self.loss, self.said = total, float("nan"), 0.0
        self.spent, self.waited, self.first = 0.0, 0.0, done  # seconds in steps, and those of them without data

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.board.close()
        self.events.close()

    def say(self, text: str) -> None:
        """One line for the user, above the live line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def say_last(self, text: str) -> None:
        """One line for the user, below the live line, which ends."""
        self.progress.stop()
        self.say(text)

    def row(self, row: dict[str, Any], timing: dict[str, float] | None = None) -> None:
        """Append a row to events.jsonl and its numbers to TensorBoard."""
        self.events.write(json.dumps(row | ({"timing": timing} if timing else {})) + "\n")
        self.events.flush()
        kind = row["event"]
        numbers = {
            f"{kind}/{key}": value
            for key, value in {**row, **(timing or {})}.items()
            if isinstance(value, int | float) and key != "step"
        }
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        self.board.add_event(Event(step=row["step"], wall_time=time.time(), summary=Summary(value=values)))

    def text(self, tag: str, text: str) -> None:
        """A text for TensorBoard's text page."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self.board.add_event(Event(step=0, wall_time=time.time(), summary=Summary(value=[value])))

    def picture(self, tag: str, step: int, png: bytes) -> None:
        """A picture for TensorBoard's image page, passed on as it is."""
        width, height = PNG_SIZE.unpack_from(png)
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
        value = Summary.Value(tag=tag, image=image)
        self.board.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=[value])))

    def step(self, row: dict[str, Any], samples: int, seconds: float, waited: float) -> None:
        """One update: `row` holds step, loss, lr, grad_norm; of its seconds it waited some for data."""
        self.spent, self.waited = self.spent + seconds, self.waited + waited
        timing = {
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "data_wait": waited / seconds,
            "peak_memory_gib": peak_memory(),
        }
        self.row({"event": "step", **row}, timing)
        if row["loss"] is not None:
            self.loss = row["loss"] if self.loss != self.loss else SMOOTH * self.loss + (1 - SMOOTH) * row["loss"]
        self.show(row, samples)

    def show(self, row: dict[str, Any], samples: int) -> None:
        """Refresh the live line, or print a plain one now and then."""
        rate = (row["step"] - self.first) / self.spent
        eta = hours((self.total - row["step"]) / rate)
        line = (
            f"{row['step']}/{self.total} ETA {eta} loss {self.loss:.4f} lr {row['lr']:.1e} {rate:.3g} step/s "
            f"{rate * samples:.3g} samples/s wait {self.waited / self.spent:.0%} {peak_memory():.1f} GiB"
        )
        if not self.progress.disable:
            self.progress.update(self.task, completed=row["step"], line=line)
        elif (now := time.perf_counter()) - self.said > PLAIN_SECONDS or row["step"] == self.total:
            self.said = now
            self.say(f"step {line}")

    def doing(self, text: str) -> None:
        """What happens between two steps, in place of the numbers of the live line."""
        if not self.progress.disable:
            done = self.progress.tasks[self.task].completed
            self.progress.update(self.task, line=f"{done:.0f}/{self.total} {text}")

    def between(self, name: str, total: int) -> Callable[[float], None]:
        """Show work between two steps; the function returned is told how many more of its `total` parts are done."""
        start = said = time.perf_counter()
        done = 0.0
        self.doing(name)

        def advance(count: float) -> None:
            nonlocal done, said
            done, now = done + count, time.perf_counter()
            text = f"{name} {done:.0f}/{total} ETA {hours((now - start) / done * (total - done))}"
            self.doing(text if done < total else "")
            if self.progress.disable and now - said > PLAIN_SECONDS:
                said = now
                self.say(text)

        return advance

    def length(self) -> int:
        """Bytes of events.jsonl, safely on disk."""
        self.events.flush()
        os.fsync(self.events.fileno())
        return os.fstat(self.events.fileno()).st_size


class NoLog(RunLog):
    """Says and writes nothing: the log of all processes but the first."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def __enter__(self) -> "RunLog":
        return self

    def say(self, text: str) -> None:
        """Nothing."""

    def say_last(self, text: str) -> None:
        """Nothing."""

    def row(self, row: dict[str, Any], timing: dict[str, float] | None = None) -> None:
        """Nothing."""

    def text(self, tag: str, text: str) -> None:
        """Nothing."""

    def picture(self, tag: str, step: int, png: bytes) -> None:
        """Nothing."""

    def step(self, row: dict[str, Any], samples: int, seconds: float, waited: float) -> None:
        """Nothing."""

    def doing(self, text: str) -> None:
        """Nothing."""

    def between(self, name: str, total: int) -> Callable[[float], None]:
        """Nothing."""
        return lambda count: None

    def length(self) -> int:
        """Nothing."""
        return 0


def hours(seconds: float) -> str:
    """'1:02:03'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def peak_memory() -> float:
    """GiB: of the GPU's allocator when there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
