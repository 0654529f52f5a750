"""kohya-ss/musubi-tuner: dataset TOML and JSONL (key names: its docs/dataset_config.md)."""

from pathlib import Path
from typing import Any

from ingest.foreign.listed import jsonl_rows
from ingest.foreign.reading import Part, Reading, Table, areas, folder_part, found, found_folder, inside, tables, whole
from shared.errors import DatasetError


def musubi(path: Path, value: Table) -> Reading:
    """A dataset config of musubi-tuner; also that of sd-scripts style [general] and [[datasets]]."""
    reading = Reading("musubi-tuner")
    general = inside(value, "general", path)
    value.pop("general", None)
    for place, own in enumerate(tables(value.pop("datasets"), path, "datasets")):
        where, table = f"datasets[{place}].", {**general, **own}
        reading.add(musubi_part(path, table, where))
        musubi_size(reading, table, where)
        musubi_frames(reading, table, where)
        reading.take(table, (("batch_size", "batch_size", whole),), where)
        reading.leave(where.rstrip("."), table)
    reading.leave("", value)
    return reading


def musubi_part(path: Path, table: Table, where: str) -> Part:
    """The files of one dataset of musubi-tuner."""
    repeats = whole(table.pop("num_repeats", 1)) or 1
    extension = str(table.pop("caption_extension", None) or ".txt")
    for key in ("video_directory", "image_directory"):
        if key in table:
            folder = found_folder(table.pop(key), path, where + key)
            return folder_part(folder, extension, repeats)
    for key in ("video_jsonl_file", "image_jsonl_file"):
        if key in table:
            listed = found(table.pop(key), path, where + key)
            return Part(listed.stem, files=tuple(jsonl_rows(listed)), repeats=repeats)
    raise DatasetError(f"{path}: {where.rstrip('.')} names no video_directory, video_jsonl_file, image_directory or "
                       "image_jsonl_file; add one")  # fmt: skip


def musubi_size(reading: Reading, table: Table, where: str) -> None:
    """resolution = [width, height] with or without buckets."""
    size, buckets = table.pop("resolution", None), table.pop("enable_bucket", False)
    pair = size if isinstance(size, list) and len(size) == 2 else [size, size]
    side = areas([pair])
    if side is not None:
        reading.set("resolution", side if buckets else f"{pair[0]}x{pair[1]}", where + "resolution")
    elif size is not None:
        reading.leave(where + "resolution", size)


def musubi_frames(reading: Reading, table: Table, where: str) -> None:
    """target_frames and frame_extraction -> frames and windows."""
    how = str(table.pop("frame_extraction", "head"))
    counts = reading.counts(table.pop("target_frames", None), where + "target_frames")
    longest = table.pop("max_frames", None) if how == "full" else None
    if counts or longest:
        reading.set("frames", longest or counts[-1], where + "target_frames")
    reading.left += [f"{where}target_frames: {count}; only the longest is made" for count in counts[:-1]]
    windows: Any = {"head": 1, "full": 1, "uniform": table.pop("frame_sample", 1) if how == "uniform" else 1}.get(how)
    if counts or longest:
        reading.set("windows_per_clip", windows or "AUTO", where + "frame_extraction")
    if how in ("chunk", "slide", "full"):
        meant = {"chunk": "windows one after the other, at most 4 per clip",
                 "slide": "windows without overlap, at most 4 per clip",
                 "full": "the first frames; a clip that has fewer is dropped, not shortened"}  # fmt: skip
        reading.left.append(f"{where}frame_extraction = {how!r}: here {meant[how]}")
