"""Scene changes of a long source. Output: their times. Cost: decoding it once, on one core; the ledger keeps them."""

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ingest.ledger import Learned, Outcome
from ingest.probe import MICRO, Facts, Unusable
from ingest.runner import Runner, Stopped, compiled, source_input, time_limit
from shared.files import PART, write_json

SIDE = 320  # pixels of width; scene changes are seen at this size
THRESHOLD = 10  # of ffmpeg's scdet, 0 to 100; its own default


@dataclass(frozen=True)
class SceneJob:
    """Find the scene changes of a source."""

    path: Path
    source: str  # sha256
    facts: Facts

    @property
    def limit(self) -> float:
        """Seconds after which it is given up."""
        return time_limit(self.facts, self.facts.end - self.facts.start)


def find_scenes(job: SceneJob, runner: Runner) -> Outcome:
    """Scene changes of a source, or why it cannot be decoded. Raises Stopped, OSError."""
    try:
        learned = Learned(scenes=scene_times(job, runner))
    except Unusable as problem:
        learned = Learned.without(["scenes"], problem)
    outcome = Outcome(sha256=job.source, learned=learned)
    write_json(runner.staging / f"scenes-{job.source}.json", outcome.model_dump(mode="json"))
    return outcome


def scene_times(job: SceneJob, runner: Runner) -> tuple[float, ...]:
    """Times of scene changes in seconds from the file's start."""
    with tempfile.TemporaryDirectory(dir=runner.staging, suffix=PART) as name:
        small = source_input(job.path, job.facts).filter("scale", SIDE, -2, flags="fast_bilinear")
        found = small.filter("scdet", threshold=THRESHOLD)
        exact = found.filter("settb", expr=f"1/{MICRO}")  # some ffmpegs print times with six digits in all
        marked = exact.filter("metadata", mode="print", key="lavfi.scd.time", file="scenes.txt")
        try:
            runner.run(compiled([marked.output("-", format="null")]), Path(name), job.limit)
        except (Unusable, OSError):
            if runner.stopping.is_set():
                raise Stopped from None
            raise
        log = Path(name, "scenes.txt")
        text = log.read_text() if log.exists() else ""
    return tuple(int(time) / MICRO for time in re.findall(r" pts:(\d+)", text))
