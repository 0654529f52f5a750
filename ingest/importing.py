"""Command `import`: another trainer's dataset file -> a folder of links that ingest reads, and a config of ours.

Output: OUT/data (links to the user's files; what is in a tar is unpacked) and OUT/config.json. Cost: next to none.
"""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ingest.discover import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ingest.foreign.ai_toolkit import toolkit
from ingest.foreign.diffusion_pipe import pipe_dataset, pipe_run
from ingest.foreign.listed import read_jsonl, read_merge, read_tars, read_videos2caption
from ingest.foreign.musubi import musubi
from ingest.foreign.reading import KINDS, Part, Reading, parsed
from shared.config import Config
from shared.errors import ConfigError, DatasetError
from shared.files import PART, atomic_write, write_json
from shared.resolve import DEFAULT_PRESET, merge, nest, preset_path, read_layer, validate
from shared.words import counted

READERS = (("datasets", musubi), ("directory", pipe_dataset), ("dataset", pipe_run), ("config", toolkit))


def import_foreign(path: Path, out: Path) -> list[str]:
    """Read a file of another trainer, write OUT, and say in lines what was understood and what was not.

    Raises DatasetError when the file is none of KINDS, names what is not there, or OUT is in use.
    """
    reading = read_foreign(path)
    reading.parts = [placed(part, reading.parts) for part in reading.parts]
    if out.exists():
        raise DatasetError(f"OUT={out} exists; remove it, or choose another with --out")
    config, refused = settings_of(reading)
    made = out.with_name(out.name + PART)
    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed
    (made / "data").mkdir(parents=True)
    for part in reading.parts:
        write_part(made / "data" / part.name, part)
    write_json(made / "config.json", config)
    made.rename(out)
    lines = [
        f"{path}: {reading.kind}, {counted(len(reading.parts), 'dataset')}: {', '.join(p.name for p in reading.parts)}"
    ]
    lines += [f"set {key}={json.dumps(value, ensure_ascii=False)}" for key, value in sorted(reading.settings.items())]
    several = [line for part in reading.parts if part.folder for line in several_lines(part.name, part.folder)]
    lines += [f"no equivalent: {line}" for line in (*reading.left, *refused, *several)]
    lines.append(f"wrote {out / 'config.json'} and {out / 'data'} ({'unpacked' if unpacked(reading) else 'links'})")
    return [*lines, f"next: make ingest DATA={out / 'data'} CONFIG={out / 'config.json'}"]


def read_foreign(path: Path) -> Reading:
    """Read any of KINDS; raises DatasetError with one line on what it cannot read."""
    if not path.exists():
        raise DatasetError(f"{path}: no such file; wanted: {KINDS}")
    if path.is_dir() or path.suffix == ".tar":
        return read_tars(path)
    if path.suffix in (".jsonl", ".txt"):
        return read_jsonl(path) if path.suffix == ".jsonl" else read_merge(path)
    value = parsed(path)
    if isinstance(value, list):
        return read_videos2caption(path, value)
    for sign, read in READERS if isinstance(value, dict) else ():
        if sign in value:
            return read(path, value)
    if path.suffix == ".json" and isinstance(value, dict) and set(value) & set(Config.model_fields):
        raise DatasetError(f"{path} is a config that needs no import: make ingest DATA=... CONFIG={path}")
    raise DatasetError(f"{path}: none of the kinds that can be read: {KINDS}")


def placed(part: Part, parts: list[Part]) -> Part:
    """A folder inside another one that is linked keeps its place there: files are found once."""
    for other in parts:
        if part.folder and other.folder and other.folder in part.folder.parents:
            return replace(part, name=f"{other.name}/{part.folder.relative_to(other.folder).as_posix()}")
    return part


def several_lines(name: str, folder: Path) -> list[str]:
    """A line on captions that are several here; other trainers take the whole text as one."""
    count = sum(len(text.read_bytes().splitlines()) > 1 for text in folder.glob("*.txt"))
    return [f"{name}: {counted(count, '.txt file')} of several lines; here each line is a caption"] if count else []


def unpacked(reading: Reading) -> bool:
    """Whether files were copied out of tars."""
    return any(part.tar for part in reading.parts)


def settings_of(reading: Reading) -> tuple[dict[str, Any], list[str]]:
    """The config that lies over a preset, and lines on values that the schema refuses, which are left out."""
    concepts = {part.name: {"repeats": part.repeats} for part in reading.parts if part.repeats > 1}
    priors = [part.name for part in reading.parts if part.prior]
    config: dict[str, Any] = {}
    refused = []
    wanted = reading.settings | ({"concepts": concepts} if concepts else {})
    wanted |= {"prior.folders": priors} if priors else {}
    for key, value in sorted(wanted.items()):
        layer: dict[str, Any] = nest(key, value)
        try:
            checked(layer)
        except ConfigError as error:
            refused.append(str(error).partition(" (value")[0] + f" ({key}={value!r})")
            reading.settings.pop(key, None)
        else:
            merge(config, layer)
    return config, refused


def checked(layer: dict[str, Any]) -> Config:
    """Raises ConfigError when the schema refuses a layer over the default preset."""
    values = read_layer(preset_path(DEFAULT_PRESET))
    merge(values, layer)
    return validate(values, {})


def write_part(folder: Path, part: Part) -> None:
    """One dataset as a sub-folder of data/."""
    if part.folder is not None and "/" in part.name:
        return  # it is in a linked one
    if part.folder is not None:
        folder.symlink_to(part.folder, target_is_directory=True)
    elif part.tar is not None:
        unpack(part.tar, folder)
    else:
        folder.mkdir()
        link_files(folder, part)


def link_files(folder: Path, part: Part) -> None:
    """Links, and metadata.jsonl with their captions; of two files of one name the second gets a number."""
    rows, taken = [], set()
    for number, (file, captions) in enumerate(part.files, 1):
        name = file.name if file.name not in taken else f"{file.stem}_{number}{file.suffix}"
        taken.add(name)
        (folder / name).symlink_to(file)
        rows.append({"file_name": name, "text": list(captions)})
    with atomic_write(folder / "metadata.jsonl") as table:
        for row in rows:
            table.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def unpack(tar: Path, folder: Path) -> None:
    """Videos, pictures and captions (.txt, or the caption in .json) of a tar, by base name; raises DatasetError."""
    folder.mkdir()
    wanted = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, ".txt", ".json")
    try:
        with tarfile.open(tar) as members:
            for member in members:
                name = PurePosixPath(member.name).name
                file = members.extractfile(member) if member.isfile() and name.lower().endswith(wanted) else None
                if file is not None and not name.startswith("."):
                    write_new(folder / name, file, tar)
    except tarfile.TarError as error:
        raise DatasetError(f"{tar}: not a whole tar ({str(error).splitlines()[0]}); fetch it again") from None
    for facts in folder.glob("*.json"):
        add_caption(facts)


def write_new(path: Path, content: IO[bytes], tar: Path) -> None:
    """Write a member of a tar; raises DatasetError when another one had its base name."""
    try:
        with path.open("xb") as file:
            shutil.copyfileobj(content, file)
    except FileExistsError:
        raise DatasetError(f"{tar}: {path.name} is in two of its folders; unpack it and ingest that folder") from None


def add_caption(facts: Path) -> None:
    """Turn a sample's .json into its .txt, when it has a caption and there is none."""
    try:
        value = json.loads(facts.read_bytes())
    except ValueError:
        value = None
    caption = value.get("caption") if isinstance(value, dict) else None
    if isinstance(caption, str) and caption.strip() and not facts.with_suffix(".txt").exists():
        facts.with_suffix(".txt").write_text(" ".join(caption.split()) + "\n")
    facts.unlink()
