"""Runs in processes of their own, which may be killed: forked from a clean server that has imported torch once."""

import multiprocessing
import os
import resource
from typing import Any

from train.run import Run
from train.session import start

CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload([__name__])


def work(run: Run, file_limit: int | None) -> None:
    """Train, in silence; `file_limit`: no file may grow above so many bytes."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    start(run, finished=False)


def child(run: Run, file_limit: int | None = None) -> Any:
    """A started process that trains `run`."""
    process = CLEAN.Process(target=work, args=(run, file_limit))
    process.start()
    return process
