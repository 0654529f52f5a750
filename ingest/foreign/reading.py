"""What was understood of another trainer's file, and how its values are converted. Cost: none."""

import json
import math
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ingest.discover import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from ingest.texts import text_of
from shared.errors import DatasetError

Table = dict[str, Any]
Rule = tuple[str, str, Callable[[Any], Any]]  # dotted path of theirs, dotted key of ours, conversion (None: impossible)
KINDS = (
    "musubi-tuner or diffusion-pipe TOML, ai-toolkit YAML, JSONL of video_path and caption, FastVideo's "
    "videos2caption.json or merge.txt, a video2dataset tar or a folder of them"
)
OPTIMIZERS = {
    **{"adamw": "ADAMW", "adamwoptimi": "ADAMW", "adamw8bit": "ADAMW_8BIT", "adamw8bitkahan": "ADAMW_8BIT"},
    **{"adafactor": "ADAFACTOR", "prodigy": "PRODIGY", "came": "CAME", "lion": "LION", "muon": "MUON"},
    **{"schedulefreeadamw": "SCHEDULE_FREE_ADAMW", "adamwschedulefree": "SCHEDULE_FREE_ADAMW"},
}
DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16"), "BFLOAT_16"),
    **dict.fromkeys(("float16", "fp16"), "FLOAT_16"),
    **dict.fromkeys(("float32", "fp32"), "FLOAT_32"),
}
STORED = {**DTYPES, **dict.fromkeys(("float8", "qfloat8", "float8_e4m3fn", "fp8"), "FLOAT_8")}
MODELS = (
    (r"ti2v.?5b|22_5b", "ti2v-5b"),
    (r"i2v.?a14b|22_14b_i2v", "i2v-a14b"),
    (r"t2v.?a14b|22_14b", "t2v-a14b"),
    (r"t2v.?1[._]?3b|21:1b", "t2v-1.3b"),
    (r"t2v.?14b|21:14b", "t2v-14b"),
)
# last word of a key -> why it is not needed or cannot be had
NOTES = {
    "cache_directory": "latents are kept in the store",
    "source_fps": "each file's own times are measured",
    "shrink_video_to_frames": "it speeds motion up; video_config.stretch=true does the same",
    "blocks_to_swap": "layer_offload_fraction=AUTO streams as many blocks as memory asks",
    "cache_latents_to_disk": "latents are always kept",
    "cache_text_embeddings": "text embeddings are always kept",
    "switch_boundary_every": "the experts are trained one after the other",
    "qtype": "transformer.weight_dtype=NFLOAT_4 is the nearest",
    "low_vram": "layer_offload_fraction=AUTO fits the card",
}


@dataclass(frozen=True)
class Part:
    """One dataset of theirs: a folder, or files with their captions, or a tar; `repeats` and `prior` as in Config."""

    name: str
    folder: Path | None = None
    files: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    tar: Path | None = None
    repeats: int = 1
    prior: bool = False


@dataclass
class Reading:
    """What was understood: settings by dotted key, datasets, and lines on what has no equivalent."""

    kind: str
    settings: Table = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any, where: str) -> None:
        """A setting; the first word counts, because there is one value here for all datasets."""
        if self.settings.setdefault(key, value) != value:
            self.left.append(f"{where} gives {key}={value!r}, but {self.settings[key]!r} holds for all datasets")

    def take(self, table: Table, rules: tuple[Rule, ...], where: str = "") -> None:
        """Move values out of a table; what cannot be converted is named."""
        for path, key, convert in rules:
            value = pop(table, path)
            if value is None:
                continue
            ours = convert(value)
            if ours is None:
                self.leave(where + path, value)
            else:
                self.set(key, ours, where + path)

    def same(self, table: Table, values: Table) -> None:
        """Take away what says what is done here anyway."""
        for path, value in values.items():
            if (said := pop(table, path)) is not None and said != value:
                self.leave(path, said)

    def counts(self, value: Any, where: str) -> list[int]:
        """Whole numbers above 0, one or a list of them, ascending; anything else is named."""
        given = listing(value)
        counts = sorted(filter(None, map(whole, given)))
        if len(counts) < len(given):
            self.leave(where, value)
        return counts

    def leave(self, path: str, value: Any) -> None:
        """Name what has no equivalent; what is off or empty needs none."""
        if isinstance(value, dict):
            for key, inner in value.items():
                self.leave(f"{path}.{key}" if path else str(key), inner)
        elif value not in (None, False, "", [], 0):
            note = NOTES.get(path.rpartition(".")[2])
            self.left.append(f"{path} = {value!r}" + (f" ({note})" if note else ""))

    def add(self, part: Part) -> None:
        """A dataset, under a name of its own that is no layout's; a folder is taken once."""
        twin = next((other for other in self.parts if other.folder and other.folder == part.folder), None)
        if twin is not None:
            self.left.append(f"{part.folder} is named twice; its files are taken once, as {twin.name} says")
            return
        taken = {other.name for other in self.parts}
        plain = re.sub(r"[^\w.-]+", "_", part.name).strip("._") or "set"
        name = f"set_{plain}" if plain in ("videos", "images", "captions") else plain
        names = [name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))]
        unique = next(other for other in names if other not in taken)
        self.parts.append(replace(part, name=unique))


def parsed(path: Path) -> Any:
    """The content of a TOML, JSON or YAML file; raises DatasetError."""
    import yaml  # type: ignore[import-untyped]

    try:
        text = text_of(path)
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix in (".yaml", ".yml", ".json"):
            return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise DatasetError(f"{path}: not {path.suffix[1:].upper()}: {' '.join(str(error).split())[:200]}") from None
    raise DatasetError(f"{path}: {path.suffix or 'a file without suffix'} is none of: {KINDS}")


def pop(table: Table, path: str) -> Any:
    """Remove and return the value at a dotted path; None when there is none."""
    *parents, last = path.split(".")
    for name in parents:
        inner = table.get(name)
        if not isinstance(inner, dict):
            return None
        table = inner
    return table.pop(last, None)


def tables(value: Any, path: Path, key: str) -> list[Table]:
    """A list of tables; raises DatasetError for anything else."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [dict(item) for item in value]
    raise DatasetError(f"{path}: {key} is no list of tables; write it as its own program has it")


def inside(table: Table, key: str, path: Path) -> Table:
    """A table in a table, an empty one where there is none; raises DatasetError for anything else."""
    value = table.get(key)
    if value is not None and not isinstance(value, dict):
        raise DatasetError(f"{path}: {key} is no table; write it as its own program has it")
    return value or {}


def listing(value: Any) -> list[Any]:
    """A list as it is, nothing as an empty one, anything else as its only item."""
    return value if isinstance(value, list) else [] if value is None else [value]


def found(value: Any, path: Path, key: str) -> Path:
    """A file or folder that a file names: as it stands, or beside the file; raises DatasetError when there is none."""
    for candidate in (Path(str(value)).expanduser(), path.parent / str(value)):
        if value and candidate.exists():
            return Path(os.path.abspath(candidate))  # noqa: PTH100 (Path.absolute keeps ..)
    raise DatasetError(f"{path}: {key}: {value!r}: no such file or folder; mend the path and run it again")


def found_folder(value: Any, path: Path, key: str) -> Path:
    """Likewise, a folder."""
    folder = found(value, path, key)
    if not folder.is_dir():
        raise DatasetError(f"{path}: {key}: {value!r} is a file; a folder is wanted")
    return folder


def number(value: Any) -> float | None:
    """A number; YAML reads 1e-4 as text."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def whole(value: Any) -> int | None:
    """A whole number above 0."""
    amount = integer(value)
    return amount if amount and amount >= 1 else None


def integer(value: Any) -> int | None:
    """A whole number, 0 too."""
    amount = number(value)
    return int(amount) if amount is not None and amount.is_integer() else None


def named(names: Table) -> Callable[[Any], Any]:
    """Look a name up, whatever its case and punctuation."""
    return lambda value: names.get(str(value).lower()) or names.get(re.sub(r"[^a-z0-9]", "", str(value).lower()))


def model_of(value: Any) -> str | None:
    """A diffusers folder that is there, else the short name of the model that a path, Hub id or arch speaks of."""
    if Path(str(value), "model_index.json").is_file():
        return str(Path(str(value)).absolute())
    text = str(value).lower().rstrip("/").rpartition("/")[2]
    return next((name for pattern, name in MODELS if re.search(pattern, text)), None)


def areas(value: Any) -> str | None:
    """[512, 768] or [[1280, 720]] -> '512,768' or '960': sides of squares of the same area."""
    pairs = [size if isinstance(size, list) else [size, size] for size in listing(value)]
    sides = [[side for side in map(whole, pair) if side] for pair in pairs]
    if not sides or any(len(pair) != 2 or len(given) != 2 for pair, given in zip(sides, pairs, strict=True)):
        return None
    return ",".join(str(round(math.sqrt(math.prod(pair)))) for pair in sides)


def folder_part(folder: Path, extension: str, repeats: int, prior: bool = False) -> Part:
    """A folder; when its captions are not in .txt files, its videos and pictures with what is in those others."""
    suffix = f".{extension.lstrip('.')}"
    if suffix == ".txt":
        return Part(folder.name, folder=folder, repeats=repeats, prior=prior)
    media = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES]
    texts = [(file, file.with_suffix(suffix)) for file in media]
    files = tuple((file, (text_of(text).strip(),) if text.is_file() else ()) for file, text in texts)
    return Part(folder.name, files=files, repeats=repeats, prior=prior)
