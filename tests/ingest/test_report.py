"""The report shows every kept clip and every reason, from one file, in a browser too."""

import base64
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ingest.report import write_report
from shared.shards import Drop, Index, SampleRecord, SourceFacts
from tests.ingest.make import make_dataset, moving_square, run_ingest, write_video

# CI installs chromium; where there is none, the tests of the page's text are all there are
BROWSERS = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))][:1]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    data = make_dataset(root / "data", {f"clip{n}.mp4": f"board <b>{n}</b> & co" for n in range(6)})
    write_video(data / "a_short_board.mp4", moving_square(1, 3))
    (data / "text_as_video.mp4").write_text("no video")
    run_ingest(data, root / "work")
    return root / "work"


def test_the_page_names_every_sample_drop_and_remark_and_needs_no_other_file(work: Path) -> None:
    page = (work / "report.html").read_text()
    assert "6 samples of 6 files, 2 dropped" in page
    assert page.count("<figure>") == 6
    assert all(f"board &lt;b&gt;{n}&lt;/b&gt; &amp; co" in page for n in range(6))
    assert "a_short_board.mp4" in page
    assert "too short: 0.19 s" in page
    assert "<details open>" in page
    assert "4 words; 10 to 50 train best" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page


def test_thumbnails_are_small_pictures_of_their_clips(work: Path) -> None:
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", (work / "report.html").read_text())
    assert len(pictures) == 6
    for data in pictures:
        raw = base64.b64decode(data)
        (work / "x.jpg").write_bytes(raw)
        shown = np.asarray(Image.open(work / "x.jpg").convert("RGB"))
        assert shown.shape == (160, 160, 3)
        assert shown.std() > 20
        assert len(raw) < 8000


def test_an_unchanged_run_leaves_the_report_alone_and_a_lost_one_is_written_again(work: Path) -> None:
    before = (work / "report.html").read_bytes()
    stamp = (work / "report.html").stat().st_mtime_ns
    run_ingest(work.parent / "data", work)
    assert (work / "report.html").stat().st_mtime_ns == stamp
    (work / "report.html").unlink()
    run_ingest(work.parent / "data", work)
    assert (work / "report.html").read_bytes() == before


def test_two_thousand_clips_are_written_at_once(tmp_path: Path) -> None:
    fact = {"start": 0.0, "end": 5.0, "fps": 24.0, "width": 640, "height": 360}
    sample = SampleRecord(key="k", shard="s", extension="mp4", num_frames=5, height=64, width=64, fps=8.0, source="a",
                          captions=("a board",), start=0, duration=1, clip="c")  # fmt: skip
    index = Index(dataset="d", ingest_version=1, sources=(SourceFacts(path="a", sha256="0", facts=fact),),
                  samples=(sample,) * 2000, dropped=(Drop(source="b", reason="too short: 1 s"),) * 2000)  # fmt: skip
    start = time.process_time()
    write_report(tmp_path, index, {})
    assert time.process_time() - start < 1
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert "<details>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("browser", BROWSERS)
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_it_on_phone_and_desk(work: Path, tmp_path: Path, browser: str, width: int) -> None:
    picture = tmp_path / "screen.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={picture}",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400"]  # fmt: skip
    subprocess.run([*command, f"file://{work / 'report.html'}"], check=True, capture_output=True, timeout=120)
    shown = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert shown.shape[1] == width
    text = (np.abs(shown - shown[0, 0]).sum(axis=2) > 150).mean(axis=1)
    assert (text > 0).sum() > 150, "no lines of text"
    colourful = np.ptp(shown, axis=2) > 40
    assert colourful.mean() > 0.02, "no thumbnails"
