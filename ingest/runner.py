"""ffmpeg processes: how a source is opened, how they are started, limited and stopped. Cost: 0.03 s to start one."""

import errno
import os
import re
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingest.probe import FORMATS, Facts, Unlucky, Unusable
from shared.errors import ConfigError

# time stamps stay those of the source, so that the grid of cut.py is the same wherever decoding begins
GLOBAL = ("-v", "error", "-nostdin", "-xerror", "-copyts", "-start_at_zero", "-filter_complex_threads", "1")
BASE_LIMIT = 120.0  # seconds a clip may always take
PIXEL_RATE = 1.5e6  # pixels per second that the slowest machine is expected to work through
# ffmpeg's own decoders of these leave transparency out
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class Stopped(Exception):
    """The user interrupted."""


@dataclass
class Runner:
    """Starts ffmpeg, and stops all of them when the user interrupts."""

    ffmpeg: str
    staging: Path
    stopping: threading.Event = field(default_factory=threading.Event)
    running: set["subprocess.Popen[bytes]"] = field(default_factory=set)

    def run(self, arguments: list[str], folder: Path, limit: float) -> None:
        """Run ffmpeg in `folder`; raises Unusable with its complaint, OSError for a full disk."""
        process = subprocess.Popen(
            [self.ffmpeg, *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; stop() ends these
        )
        self.running.add(process)
        try:
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Unlucky(f"took longer than {limit:.0f} s") from None
        finally:
            self.running.discard(process)
        if process.returncode == -signal.SIGXFSZ:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # the shell's limit (ulimit -f)
        if process.returncode < 0:
            raise Unlucky(f"ffmpeg was killed: {signal.Signals(-process.returncode).name} (out of memory?)")
        if process.returncode:
            raise complaint(errors.decode(errors="replace"))

    def stop(self) -> None:
        """Kill what runs; their outcomes are not recorded."""
        self.stopping.set()
        for process in list(self.running):
            process.kill()


def time_limit(facts: Facts, seconds: float, made: float = 0.0) -> float:
    """Seconds after which work on `seconds` of a source is given up; `made`: pixels that are encoded."""
    return BASE_LIMIT + (seconds * facts.fps * facts.width * facts.height + made) / PIXEL_RATE


def ffmpeg_version(program: str) -> str:
    """For example 'n9.0.2-17-g2a571b6068-20260930'."""
    said = subprocess.run([program, "-version"], capture_output=True, text=True, check=True).stdout
    return said.split()[2]


def found_program(program: str) -> str:
    """Absolute path of a program, which runs in other folders; raises ConfigError when there is none."""
    found = shutil.which(program)
    if found is None:
        raise ConfigError(f"FFMPEG={program}: no such program; leave FFMPEG unset to use the bundled one")
    return str(Path(found).absolute())


def complaint(errors: str) -> Exception:
    """What to raise for ffmpeg's error output."""
    if missing := re.search(r"No such filter: '(\w+)'|Unknown encoder '(\w+)'", errors):
        raise ConfigError(
            f"FFMPEG: this ffmpeg lacks {missing[1] or missing[2]}; leave FFMPEG unset to use the bundled one"
        )
    if os.strerror(errno.ENOSPC) in errors:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.partition("] ")[2] or line for line in errors.splitlines() if line.strip()]
    return Unusable(f"damaged: {lines[0][:200]}" if lines else "ffmpeg failed without a word")


def source_input(path: Path, facts: Facts, seek: float = 0.0) -> Any:
    """The video stream of a source, decoded on one thread from the keyframe at `seek` seconds.

    The prefix file: and the white lists keep a file's name or content from being taken for an option, a protocol or a
    playlist of other files.
    """
    import ffmpeg

    options: dict[str, Any] = {}
    if facts.alpha and facts.codec in ALPHA_DECODERS:
        options["vcodec"] = ALPHA_DECODERS[facts.codec]
    options |= {"threads": 1, "protocol_whitelist": "file", "format_whitelist": FORMATS}
    if seek > facts.start:
        options |= {"noaccurate_seek": None, "ss": f"{seek:.6f}"}
    return ffmpeg.input(f"file:{path.absolute()}", **options)[str(facts.stream)]


def compiled(outputs: list[Any]) -> list[str]:
    """Arguments of a graph with these outputs, without the program."""
    import ffmpeg

    graph = ffmpeg.merge_outputs(*outputs) if len(outputs) > 1 else outputs[0]
    return list(graph.global_args(*GLOBAL).get_args())
