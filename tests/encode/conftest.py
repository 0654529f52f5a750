"""Fixtures of the encode room: a random Wan of nano size, and shards drawn and encoded on the spot."""

from pathlib import Path

import pytest

from tests.encode.make import nano_model, shards


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.1 kind model in diffusers layout."""
    return nano_model(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A work folder as ingest leaves it: two shards of 5-frame clips and one of images, 32x48."""
    return shards(tmp_path / "work")
