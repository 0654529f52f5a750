"""Dataset layouts -> files with captions. Input: a folder of videos, images and captions. Cost: a directory walk.

A caption comes from the first of: `clip.txt` beside the file, the same path below `captions/`, a row of a
`metadata.jsonl|csv` or of any JSONL (`video_path`, `caption`), a line of `captions.txt`, the file's name.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ingest.caption import caption_from_name
from ingest.tables import Table, read_tables
from shared.errors import DatasetError
from shared.shards import Drop
from shared.words import counted

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".webm", ".mkv", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TEXT_SUFFIXES = (".txt", ".jsonl", ".csv")
LAYOUT_FOLDERS = ("videos", "images")  # say what is in them, so they are no concept's name


@dataclass(frozen=True)
class Found:
    """A video or image file of the dataset, with what is said about it."""

    path: str  # relative to the dataset folder, POSIX
    captions: tuple[str, ...] = ()
    origin: str = ""  # where the captions are from, for people; "" where there are none

    @property
    def folder(self) -> str:
        """The concept: its sub-folder, without a leading videos/ or images/; "" at the top."""
        parts = self.path.split("/")[:-1]
        return "/".join(parts[1:] if parts and parts[0] in LAYOUT_FOLDERS else parts)

    @property
    def is_image(self) -> bool:
        """A one-frame sample."""
        return self.path.lower().endswith(IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Dataset:
    """What a dataset folder holds, in natural order of paths; `ignored` counts other files by suffix."""

    root: Path
    files: tuple[Found, ...]
    dropped: tuple[Drop, ...]
    ignored: dict[str, int]

    @property
    def layout(self) -> str:
        """For example '12 videos, 3 images; captions: 10 from .txt files, 2 from file names, 3 without'."""
        images = sum(found.is_image for found in self.files)
        origins = Counter(f"from {found.origin}" if found.origin else "without" for found in self.files)
        counts = ", ".join(f"{count} {origin}" for origin, count in sorted(origins.items()))
        skipped = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.ignored.items()))
        return (f"{counted(len(self.files) - images, 'video')}, {counted(images, 'image')}; captions: {counts}"
                + (f"; files of no use here: {skipped}" if skipped else ""))  # fmt: skip


@dataclass
class Walk:
    """Files below a folder, by relative POSIX path."""

    media: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    ignored: Counter[str] = field(default_factory=Counter)
    dropped: list[Drop] = field(default_factory=list)


def discover(root: Path, work: Path, from_file_names: bool) -> Dataset:
    """Find all videos and images below `root` (not below `work`) and their captions.

    Raises DatasetError when `root` is no folder or holds no video or image, or a caption table cannot be understood.
    """
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise DatasetError(f"DATA={root} {problem}; run: make ingest DATA=folder_of_videos/")
    walk = walk_folder(root, work.absolute())
    walk.media.sort(key=natural)
    if not walk.media:
        seen = f" (there are {sum(walk.ignored.values())} other files)" if walk.ignored else " (it is empty)"
        raise DatasetError(
            f"DATA={root} holds no video or image{seen}; wanted: {' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}"
        )
    table = read_tables(root, walk.texts, walk.media)
    files, dropped = [], [*walk.dropped, *table.missing]
    for path in walk.media:
        try:
            files.append(captioned(root, path, walk.texts, table, from_file_names))
        except UnicodeDecodeError as error:
            dropped.append(Drop(source=path, reason=f"its caption is not UTF-8 text ({error.reason})"))
        except OSError as error:
            dropped.append(Drop(source=path, reason=f"its caption cannot be read: {error.strerror}"))
    return Dataset(root, tuple(files), tuple(dropped), dict(walk.ignored))


def walk_folder(root: Path, work: Path) -> Walk:
    """List files; follows links to folders, each folder once; hidden names and the work folder are passed over."""
    walk, visited = Walk(), set()

    def unreadable(error: OSError) -> None:
        path = Path(error.filename).relative_to(root).as_posix()
        walk.dropped.append(Drop(source=path, reason=f"cannot be read: {error.strerror}"))

    for folder, names, files in os.walk(root, followlinks=True, onerror=unreadable):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in visited or Path(folder).absolute() == work:
            names.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                sort_file(walk, root, Path(folder, name).relative_to(root).as_posix())
    return walk


def sort_file(walk: Walk, root: Path, path: str) -> None:
    """Put one file where it belongs."""
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 (Path.suffix of 'a.' differs between versions)
    try:
        path.encode()
    except UnicodeEncodeError:
        walk.dropped.append(Drop(source=ascii(path), reason="its name is not valid UTF-8; rename it"))
        return
    if suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
        walk.media.append(path)
    elif suffix in TEXT_SUFFIXES and not (root / path).is_file():
        walk.dropped.append(Drop(source=path, reason="cannot be read: a link to nothing, or a pipe"))
    elif suffix in TEXT_SUFFIXES:
        walk.texts.add(path)
    else:
        walk.ignored[suffix or "without suffix"] += 1


def captioned(root: Path, path: str, texts: set[str], table: Table, from_file_names: bool) -> Found:
    """The file with the captions of the first place that has any; raises UnicodeDecodeError."""
    stem = path.rpartition(".")[0]
    inside = stem.partition("/")[2] if stem.split("/")[0] in LAYOUT_FOLDERS else stem
    for text, origin in ((f"{stem}.txt", ".txt files"), (f"captions/{inside}.txt", "captions/")):
        if text in texts and text not in table.files and (lines := caption_lines((root / text).read_bytes())):
            return Found(path, lines, origin)
    if path in table.captions:
        return Found(path, *table.captions[path])
    name = caption_from_name(stem.rpartition("/")[2]) if from_file_names else None
    return Found(path, (name,), "file names") if name else Found(path)


def caption_lines(text: bytes) -> tuple[str, ...]:
    """One caption per line that is not blank, each once; raises UnicodeDecodeError."""
    lines = (" ".join(line.split()) for line in text.decode("utf-8-sig").splitlines())
    return tuple(dict.fromkeys(line for line in lines if line))


def natural(path: str) -> tuple[list[tuple[int, str | int]], str]:
    """Sort key in which clip2 comes before clip10."""
    parts = re.split(r"(\d+)", path.casefold())
    return [(1, int(part)) if part.isdecimal() and part.isascii() else (0, part) for part in parts], path
