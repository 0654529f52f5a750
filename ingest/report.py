"""work/report.html: one self-contained page that says what happened to every file."""

from pathlib import Path

from shared.files import atomic_write
from shared.shards import Index


def write_report(work: Path, index: Index) -> None:
    """Replace the report."""
    with atomic_write(work / "report.html") as file:
        file.write(f"<!doctype html><title>ingest</title><p>{len(index.samples)} samples".encode())
