"""Caption tables of a dataset folder: captions.txt, metadata.jsonl, metadata.csv, musubi's JSONL."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ingest.texts import json_lines, text_of
from shared.errors import DatasetError
from shared.shards import Drop

FILE_COLUMNS = ("file_name", "video_path", "image_path")
TEXT_COLUMNS = ("text", "caption")


@dataclass
class Table:
    """Captions by file path (with their origin), the files they were read from, and rows that name no file."""

    captions: dict[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    missing: list[Drop] = field(default_factory=list)

    def add(self, path: str, captions: list[str], origin: str) -> None:
        """Append captions to a file's; several rows may speak of one file."""
        known = self.captions.get(path, ((), origin))[0]
        lines = (" ".join(caption.split()) for caption in captions)
        self.captions[path] = (tuple(dict.fromkeys([*known, *(line for line in lines if line)])), origin)
        if not self.captions[path][0]:
            del self.captions[path]


def read_tables(root: Path, texts: set[str], media: list[str]) -> Table:
    """Read all caption tables below `root`; `media` in natural order. Raises DatasetError for an unclear one."""
    table, known = Table(), set(media)
    stems = {path.rpartition(".")[0] for path in media}
    for text in sorted(texts):
        name = PurePosixPath(text)
        if name.suffix == ".txt" and name.name == "captions.txt" and str(name.with_suffix("")) not in stems:
            below = [path for path in media if PurePosixPath(path).is_relative_to(name.parent)]
            read_lines(root, text, below, table)
        elif name.suffix == ".jsonl" or name.name == "metadata.csv":
            for number, row in rows_of(root, text):
                add_row(table, known, text, number, row)
    return table


def add_row(table: Table, known: set[str], text: str, number: int, row: dict[str, Any]) -> None:
    """Take one row of a JSONL or CSV table; a row without a file column makes the table no caption table."""
    names = [row[column] for column in FILE_COLUMNS if isinstance(row.get(column), str)]
    if not names:
        return
    table.files.add(text)
    path = os.path.normpath(PurePosixPath(text).parent / names[0])
    value: Any = next((row[column] for column in TEXT_COLUMNS if row.get(column)), [])
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(caption, str) for caption in captions):
        raise DatasetError(f"{text}, line {number}: the caption is not text ({value!r})")
    if path not in known:
        table.missing.append(Drop(source=path, reason=f"named in {text}, line {number}, but there is no such file"))
        return
    table.add(path, captions, PurePosixPath(text).name)


def rows_of(root: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSONL or CSV file; absolute paths below `root` become relative."""
    if text.endswith(".csv"):
        lines = text_of(root / text).splitlines()
        yield from ((number, dict(row)) for number, row in enumerate(csv.DictReader(lines), 2))
        return
    for number, row in json_lines(root / text):
        if isinstance(row, dict):
            yield (
                number,
                {key: relative(value, root, text) if key in FILE_COLUMNS else value for key, value in row.items()},
            )


def relative(value: Any, root: Path, text: str) -> Any:
    """A path as it would stand in a table: relative to the table's folder."""
    if isinstance(value, str) and value.startswith("/"):
        return os.path.relpath(value, (root / text).parent.absolute())
    return value


def read_lines(root: Path, text: str, media: list[str], table: Table) -> None:
    """captions.txt: `name<TAB>caption` in any order, or one line per file in natural order of names."""
    lines = [line for line in text_of(root / text).splitlines() if line.strip()]
    table.files.add(text)
    if lines and all("\t" in line for line in lines):
        add_named(text, [line.split("\t", 1) for line in lines], media, table)
        return
    if len(lines) != len(media):
        counts = f"{len(lines)} captions for {len(media)} files"
        raise DatasetError(f"{root / text} has {counts}; write one line per file in natural order, or name<TAB>caption")
    for path, line in zip(media, lines, strict=True):
        table.add(path, [line], "captions.txt")


def add_named(text: str, rows: list[list[str]], media: list[str], table: Table) -> None:
    """Rows (name, caption); a name may leave out its folder or suffix where that leaves no doubt."""
    names: dict[str, list[str]] = {}
    for path in media:
        name = PurePosixPath(path)
        for alias in {path, name.name, name.stem}:
            names.setdefault(alias, []).append(path)
    for number, (named, caption) in enumerate(rows, 1):
        match = names.get(named.strip(), [])
        if len(match) > 1:
            raise DatasetError(f"{text}, line {number}: {named!r} may be {match[0]} or {match[1]}; write the path")
        if match:
            table.add(match[0], [caption], "captions.txt")
        else:
            table.missing.append(
                Drop(source=named, reason=f"named in {text}, line {number}, but there is no such file")
            )
