"""What the rooms share. Imported before anything slow, so it also cares for Ctrl-C while a command still loads."""

import sys
from types import TracebackType


def end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line in place of the traceback of a Ctrl-C; other exceptions keep theirs."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted; the same command goes on from here", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly
