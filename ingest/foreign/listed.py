"""Files with captions: JSONL, videos2caption.json and merge.txt of hao-ai-lab/FastVideo, video2dataset's tars."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ingest.foreign.reading import KINDS, Part, Reading, found, parsed
from ingest.texts import json_lines, text_of
from shared.errors import DatasetError


def jsonl_rows(path: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Files and captions of a JSONL of video_path or image_path, and caption; raises DatasetError."""
    for line, row in json_lines(path):
        names = ("video_path", "image_path", "file_name")
        named_file = next((row[key] for key in names if key in row), None) if isinstance(row, dict) else None
        if named_file is None:
            raise DatasetError(f"{path}, line {line}: no video_path and no image_path; add one")
        file = found(named_file, path, f"line {line}")
        if file.is_dir():
            raise DatasetError(f"{path}, line {line}: {named_file} is a folder of frames; make a video of it")
        yield file, captions_of(row.get("caption", row.get("text", "")))


def captions_of(value: Any) -> tuple[str, ...]:
    """One caption or a list of them, those that are not empty."""
    return tuple(str(text) for text in (value if isinstance(value, list) else [value]) if text)


def read_jsonl(path: Path) -> Reading:
    """A lone JSONL."""
    reading = Reading("JSONL")
    reading.add(Part(path.stem, files=tuple(jsonl_rows(path))))
    return reading


def read_videos2caption(path: Path, rows: list[Any], videos: Path | None = None) -> Reading:
    """FastVideo's list of {path, cap}; the files are in videos/ beside it."""
    reading = Reading("FastVideo")
    folder = videos or (path.parent / "videos" if (path.parent / "videos").is_dir() else path.parent)
    files = []
    for place, row in enumerate(rows):
        if not isinstance(row, dict) or "path" not in row or "cap" not in row:
            raise DatasetError(f"{path}: entry {place} has no path and cap; it is none of: {KINDS}")
        files.append((found(folder / str(row["path"]), path, f"entry {place}"), captions_of(row["cap"])))
    reading.add(Part(path.parent.name if path.stem == "videos2caption" else path.stem, files=tuple(files)))
    return reading


def read_merge(path: Path) -> Reading:
    """FastVideo's merge.txt: lines of folder,json."""
    reading = Reading("FastVideo")
    for line, text in enumerate(text_of(path).splitlines(), 1):
        folder, comma, listed = text.strip().partition(",")
        if not comma:
            raise DatasetError(f"{path}, line {line}: not folder,file.json; it is none of: {KINDS}")
        file = found(listed, path, f"line {line}")
        rows = parsed(file)
        if not isinstance(rows, list):
            raise DatasetError(f"{file}: no list of path and cap")
        for part in read_videos2caption(file, rows, found(folder, path, f"line {line}")).parts:
            reading.add(part)
    return reading


def read_tars(path: Path) -> Reading:
    """One tar, or all of a folder."""
    tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not tars:
        raise DatasetError(
            f"{path}: a folder without .tar; a folder of videos needs no import: make ingest DATA={path}"
        )
    reading = Reading("video2dataset")
    for tar in tars:
        reading.add(Part(tar.stem, tar=tar))
    return reading
