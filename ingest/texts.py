"""Text files as users write them: UTF-8, and JSON lines. Errors: DatasetError that names file and line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import DatasetError


def text_of(path: Path) -> str:
    """A file's text; raises DatasetError when it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of the lines that are not empty; raises DatasetError for one that is not JSON."""
    for number, line in enumerate(text_of(path).splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise DatasetError(f"{path}, line {number}: not JSON ({error.msg}); mend the line") from None
