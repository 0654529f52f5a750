"""Run the project's commands as a user does: in a process, from the repository's root."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def run(*arguments: object, expect: int = 0, **environment: str) -> str:
    """`python -m <arguments>`; returns its output (stdout and stderr) after checking the exit code."""
    command = [sys.executable, "-m", *(str(argument) for argument in arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == expect, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def refused(*arguments: object) -> str:
    """The one line with which a command refuses bad input (exit code 2, no traceback)."""
    output = run(*arguments, expect=2)
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    assert "Traceback" not in output, output
    return errors[0]


def peak_mib(process: "subprocess.Popen[Any]", field: str) -> float:
    """The most that a field of proc(5)'s status, in MiB, has been until the process ended; its children do not count.

    ru_maxrss of a child starts with what its parent holds, so it is read off the running process.
    """
    peak = 0.0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            break
        peak = max([peak, *(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))])
        time.sleep(0.003)
    return peak
