"""shared/CONFIG.md is what the schema says, and names every setting once."""

from pathlib import Path

import shared
from shared.config import Config, leaf_keys
from shared.reference import reference

FILE = Path(shared.__path__[0]) / "CONFIG.md"


def test_the_reference_is_generated_from_the_schema() -> None:
    assert FILE.read_text() == reference(), "run: .venv/bin/python -m shared.reference > shared/CONFIG.md"


def test_every_setting_is_in_the_reference_with_its_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(leaf_keys())
    assert len(rows) == len(leaf_keys())
    assert all(
        len(row.replace("\\|", "").split("|")) == 6 and row.rstrip(" |").rpartition("|")[2].strip() for row in rows
    )
    assert str(Config.model_fields["ema"].description) in reference()
