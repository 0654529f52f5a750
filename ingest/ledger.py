"""What ingest knows of every source, so that nothing is read, decoded or measured twice: work/sources.json.

A file is known by path, size, mtime and inode; everything learned by decoding is kept under its sha256. Every job
leaves its outcome as a small file in work/staging; it is folded in here at the end, or at the next start after a crash.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from ingest.crop import Focus
from ingest.gates import Measures
from ingest.plan import INGEST_VERSION, Box
from ingest.probe import Facts, Unlucky, Unusable
from shared.files import read_json, write_json
from shared.shards import Record


class FileEntry(Record):
    """A file as it was when it was last read; `problem` says why it is unusable, else `facts` describes it."""

    size: int
    mtime_ns: int
    inode: int
    sha256: str
    facts: Facts | None = None
    problem: str | None = None


class Learned(Record):
    """What decoding a source has shown, by the names that plan.py gives."""

    scenes: tuple[float, ...] | None = None
    bars: dict[str, Box | None] = Field({})
    focus: dict[str, Focus] = Field({})
    measures: dict[str, Measures] = Field({})
    failed: dict[str, str] = Field({})  # sample key, name of a focus, or "scenes" -> reason
    unlucky: dict[str, str] = Field({}, exclude=True)  # likewise, to be tried again by the next run

    def problem(self, name: str) -> str | None:
        """Why a sample, or the scenes, could not be made."""
        return self.failed.get(name) or self.unlucky.get(name)

    @classmethod
    def without(cls, names: Iterable[str], problem: Unusable) -> "Learned":
        """What a failure teaches."""
        reasons = dict.fromkeys(names, str(problem))
        return cls(unlucky=reasons) if isinstance(problem, Unlucky) else cls(failed=reasons)

    def updated(self, other: "Learned") -> "Learned":
        """Both, the other's word counting more."""
        return Learned(
            scenes=self.scenes if other.scenes is None else other.scenes,
            bars=self.bars | other.bars,
            focus=self.focus | other.focus,
            measures=self.measures | other.measures,
            failed=self.failed | other.failed,
            unlucky=self.unlucky | other.unlucky,
        )


class Outcome(Record):
    """What one job showed about a source."""

    sha256: str
    learned: Learned


@dataclass
class Ledger:
    """The content of sources.json."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    learned: dict[str, Learned] = field(default_factory=dict)

    def of(self, sha256: str) -> Learned:
        """What is known of a source's bytes."""
        return self.learned.get(sha256, Learned())

    def unread(self) -> "Ledger":
        """Knowing no file, and no failure, of what was learned: every file is read again, and what failed is tried."""
        learned = {sha: known.model_copy(update={"failed": {}}) for sha, known in self.learned.items()}
        return Ledger(learned=learned)

    def forget_absent(self) -> None:
        """Drop what is known of bytes that no file has any more."""
        live = {entry.sha256 for entry in self.files.values()}
        self.learned = {sha: known for sha, known in self.learned.items() if sha in live}

    def learn(self, sha256: str, news: Learned) -> None:
        """Add what a decode has shown."""
        self.learned[sha256] = self.of(sha256).updated(news)


def ledger_path(work: Path) -> Path:
    """Where the ledger is kept."""
    return work / "sources.json"


def read_ledger(work: Path) -> Ledger:
    """The ledger of a work folder; an empty one when there is none, or it is damaged or of another version."""
    try:
        value = read_json(ledger_path(work))
        if value["version"] != INGEST_VERSION:
            return Ledger()
        return Ledger({path: FileEntry.model_validate(entry) for path, entry in value["files"].items()},
                      {sha: Learned.model_validate(known) for sha, known in value["learned"].items()})  # fmt: skip
    except (FileNotFoundError, ValueError, ValidationError, KeyError, TypeError):
        return Ledger()  # all of it can be learned again


def write_ledger(work: Path, ledger: Ledger) -> None:
    """Replace the ledger, atomically."""
    value: dict[str, Any] = {
        "version": INGEST_VERSION,
        "files": {path: entry.model_dump(mode="json") for path, entry in ledger.files.items()},
        "learned": {sha: known.model_dump(mode="json", exclude_defaults=True) for sha, known in ledger.learned.items()},
    }
    write_json(ledger_path(work), value)


def fold_outcomes(work: Path, ledger: Ledger) -> list[Path]:
    """Learn what an interrupted run left in staging; returns the files, to be removed once the ledger is written."""
    paths = sorted((work / "staging").glob("*.json"))
    for path in paths:
        outcome = Outcome.model_validate(read_json(path))
        ledger.learn(outcome.sha256, outcome.learned)
    return paths
