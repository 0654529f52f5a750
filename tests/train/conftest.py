"""Models and stores that the tests of this room share; made once, never written to."""

from pathlib import Path

import pytest

from shared.models import ModelSpec
from tests.train.make import listed, make_all, make_store

Made = tuple[Path, ModelSpec, Path]


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(model folder, facts, store of 10 samples)."""
    return make_all(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Likewise with two experts."""
    return make_all(tmp_path_factory.mktemp("pair"), pair=True)


@pytest.fixture(scope="session")
def mixed(single: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two video buckets and images; two prior samples, two held out; embedded prompts."""
    model, spec, _ = single
    sizes = [(9, 32, 32)] * 5 + [(9, 32, 48)] * 3 + [(1, 32, 32)] * 2
    samples = [listed(number, spec, size, prior=number in (3, 4), split="validation" if number in (2, 7) else "train")
               for number, size in enumerate(sizes)]  # fmt: skip
    return model, spec, make_store(tmp_path_factory.mktemp("mixed") / "s.zarr", spec, samples, ("a prompt", "another"))
