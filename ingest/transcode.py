"""Samples -> files: one ffmpeg process of one thread for a clip's neighbouring windows, or Pillow for a still picture.

Input: a source, its facts and samples of one clip. Output: `<key>.mp4|mkv|png` and the clip's outcome in the staging
folder. Cost: decoding from the keyframe before the clip to its end once, and one scale and one encode per sample.
"""

import tempfile
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ingest import colour
from ingest.gates import GREY_SIDE, Measures, measure
from ingest.ledger import Learned, Outcome
from ingest.letterbox import bars_of, detector
from ingest.picture import load_picture
from ingest.plan import Box, Sample
from ingest.probe import Facts, Unlucky, Unusable
from ingest.runner import Runner, Stopped, compiled, source_input, time_limit
from shared.files import PART, sync, write_json

THUMBNAIL_WIDTH = 160  # pixels of the longer side
WORTH_A_SEEK = 0.5  # seconds of video that cost about as much to decode as starting a process


@dataclass(frozen=True)
class Job:
    """Samples of one clip that have to be made; `look`: name of the black-bar measurement to make, if any."""

    path: Path
    source: str  # sha256
    facts: Facts
    samples: tuple[Sample, ...]
    look: str | None = None

    @property
    def seconds(self) -> float:
        """Seconds of video that are decoded, about."""
        return max(s.window.start + s.window.duration for s in self.samples) - min(s.window.start for s in self.samples)

    @property
    def limit(self) -> float:
        """Seconds after which the clip is given up."""
        made = sum(s.scaled[0] * s.scaled[1] * s.window.count for s in self.samples)
        return time_limit(self.facts, self.seconds, made)


def transcode(job: Job, runner: Runner) -> Outcome:
    """Make a job's samples; each is in staging, whole, when this returns. A window that fails is in learned.failed.

    Raises Stopped after Runner.stop, OSError for a full disk.
    """
    outcome = Outcome(sha256=job.source, learned=attempt(job, runner))
    write_json(runner.staging / f"{job.samples[0].key}.json", outcome.model_dump(mode="json"))
    return outcome


def attempt(job: Job, runner: Runner) -> Learned:
    """Make all samples at once; where that fails, window by window: damage in one place must not cost the others."""
    try:
        return together(job, runner)
    except Unusable as problem:
        windows = list(dict.fromkeys(sample.window for sample in job.samples))
        learned = Learned(bars={job.look: None}) if job.look else Learned()
        failure = Learned.without((sample.key for sample in job.samples), problem)
        if isinstance(problem, Unlucky):
            return failure
        if len(windows) == 1:
            return learned.updated(failure)
        for window in windows:
            samples = tuple(sample for sample in job.samples if sample.window == window)
            learned = learned.updated(attempt(replace(job, samples=samples, look=None), runner))
        return learned


def together(job: Job, runner: Runner) -> Learned:
    """Make all of a job's samples in one process, check them, and move them to staging."""
    with tempfile.TemporaryDirectory(dir=runner.staging, suffix=PART) as name:
        folder = Path(name)
        if runner.stopping.is_set():
            raise Stopped
        try:
            measures = picture(job, folder) if job.samples[0].window.still else video(job, folder, runner)
        except (Unusable, OSError):
            if runner.stopping.is_set():
                raise Stopped from None
            raise
        bars = {job.look: read_bars(job, folder)} if job.look else {}
        for made in [folder / name for sample in job.samples for name in sample.files]:
            sync(made)  # the name in staging stands for whole bytes
            made.replace(runner.staging / made.name)
        return Learned(bars=bars, measures=measures)


def video(job: Job, folder: Path, runner: Runner) -> dict[str, Measures]:
    """Run ffmpeg for a job and measure what it made; raises Unusable when frames are missing."""
    import numpy as np

    for samples in runs(job):
        runner.run(arguments(replace(job, samples=samples)), folder, job.limit)
    measures = {}
    for sample in job.samples:
        width, height = grey_size(sample.scaled)
        grey = np.fromfile(folder / f"{sample.key}.gray", dtype=np.uint8).reshape(-1, height, width)
        if len(grey) != sample.window.count:
            raise Unusable(
                f"only {len(grey)} of {sample.window.count} frames can be decoded at {sample.window.start:.2f} s"
            )
        measures[sample.key] = measure(grey)
    return measures


def read_bars(job: Job, folder: Path) -> Box | None:
    """The picture without its black bars, from all windows of the clip; None when there are no bars."""
    import numpy as np

    plain = [sample for sample in job.samples if sample.window.variant == "plain"]
    windows = {sample.window: sample for sample in reversed(plain)}  # the log is named by a window's first sample
    greys = []
    for sample in windows.values():
        width, height = grey_size(sample.scaled)
        greys.append(np.fromfile(folder / f"{sample.key}.gray", dtype=np.uint8).reshape(-1, height, width))
    logs = [(folder / f"{sample.key}.bars").read_text() for sample in windows.values()]
    return bars_of(logs, greys, (job.facts.width, job.facts.height))


def runs(job: Job) -> list[tuple[Sample, ...]]:
    """Samples in groups that one process decodes: where seeking over a gap saves decoding, a new one begins."""
    groups: list[list[Sample]] = []
    end = 0.0
    for sample in sorted(job.samples, key=lambda sample: sample.window.start):
        start = sample.window.start
        keyframe = max((time for time in job.facts.keyframes if time <= start), default=0.0)
        if not groups or keyframe > end + WORTH_A_SEEK:
            groups.append([])
        groups[-1].append(sample)
        end = max(end, start + sample.window.duration)
    return [tuple(group) for group in groups]


def arguments(job: Job) -> list[str]:
    """ffmpeg's arguments, without the program; output files are named by key in the current folder."""
    start = min(sample.window.start for sample in job.samples)
    keyframe = max((time for time in job.facts.keyframes if time <= start), default=0.0)
    stream = source_input(job.path, job.facts, keyframe)
    if job.facts.interlaced:
        stream = stream.filter("bwdif", mode="send_frame")
    outputs = [output for sample, branch in branches(stream, job) for output in encoded(sample, branch)]
    return compiled(outputs)


def branches(stream: Any, job: Job) -> list[tuple[Sample, Any]]:
    """One filter branch per sample: its window's frames, scaled, in BT.709. Shared work is done once."""
    done = []
    rates = list(dict.fromkeys(sample.window.rate for sample in job.samples))
    for rate, at_rate in zip(rates, split(stream, len(rates)), strict=True):
        resampled = at_rate.filter("fps", fps=str(rate), round="near")
        windows = list(dict.fromkeys(sample.window for sample in job.samples if sample.window.rate == rate))
        for window, copy in zip(windows, split(resampled, len(windows)), strict=True):
            samples = [sample for sample in job.samples if sample.window == window]
            frames = copy.filter("trim", start_pts=window.first, end_pts=window.first + window.count)
            seen = detector(frames, job.facts, f"{samples[0].key}.bars") if job.look else frames
            parts = split(seen, len(samples))
            done += [(sample, scaled(sample, part, job.facts)) for sample, part in zip(samples, parts, strict=True)]
    return done


def split(stream: Any, count: int) -> list[Any]:
    """`count` copies of a stream."""
    if count == 1:
        return [stream]
    copies = stream.filter_multi_output("split", count)
    return [copies[index] for index in range(count)]


def scaled(sample: Sample, stream: Any, facts: Facts) -> Any:
    """Cut black bars away, scale, convert to BT.709 limited range (RGB for lossless)."""
    box = sample.content
    if (box.width, box.height) != (facts.width, facts.height):
        stream = stream.filter("crop", box.width, box.height, box.left, box.top, exact=1)
    return colour.converted(stream, facts, sample.scaled, rgb=sample.extension == "mkv")


def encoded(sample: Sample, stream: Any) -> list[Any]:
    """Three outputs: the sample, its thumbnail, and a small grey copy of the whole picture that the gates look at."""
    whole, copy = split(stream, 2)
    cropped = whole.filter("crop", sample.bucket.width, sample.bucket.height, *sample.crop)
    shown, middle = split(cropped.filter("reverse") if sample.window.reverse else cropped, 2)
    width, height = grey_size(sample.scaled)
    grey = copy.filter("scale", width, height, flags="area", out_range="pc").filter("format", "gray")
    return [
        sample_output(sample, shown),
        thumbnail_output(sample, middle),
        grey.output(f"{sample.key}.gray", format="rawvideo", fps_mode="passthrough"),
    ]


def sample_output(sample: Sample, stream: Any) -> Any:
    """The sample's file, with the same bytes each time."""
    rate = Fraction(sample.fps).limit_denominator(10_000)
    played = stream.filter("settb", expr=str(1 / rate)).filter("setpts", "N")
    stream = played.filter("fps", fps=str(rate)).filter("setsar", 1)  # for the frame rate in the header
    common = {"frames:v": sample.window.count, "fps_mode": "passthrough", "threads": 1}
    common |= {"map_metadata": -1, "fflags": "+bitexact", "flags:v": "+bitexact"}
    if sample.extension == "mkv":
        return stream.output(f"{sample.key}.mkv", vcodec="ffv1", level=3, pix_fmt="bgr0", **common)
    tags = {**colour.TAGS, "color_range": "tv"}
    codec = {"vcodec": "libx264", "preset": "veryfast", "crf": 12, "pix_fmt": "yuv420p", "movflags": "+faststart"}
    tagged = stream.filter("setparams", **colour.TAGS, range="tv")
    return tagged.output(f"{sample.key}.mp4", **codec, **tags, **common)


def thumbnail_output(sample: Sample, stream: Any) -> Any:
    """The middle frame as a small JPEG (full-range BT.601, as JFIF has it)."""
    middle = stream.filter("select", f"eq(n,{sample.window.count // 2})")
    width, height = thumbnail_size(sample)
    small = middle.filter("scale", width, height, flags="area", out_color_matrix="bt601", out_range="pc")
    options = {"frames:v": 1, "update": 1, "vcodec": "mjpeg", "q:v": 5, "threads": 1, "fflags": "+bitexact"}
    return small.filter("format", "yuvj420p").output(f"{sample.key}.jpg", **options, **{"flags:v": "+bitexact"})


def thumbnail_size(sample: Sample) -> tuple[int, int]:
    """(width, height) of a sample's thumbnail, even."""
    factor = THUMBNAIL_WIDTH / max(sample.bucket.width, sample.bucket.height)
    return max(2, 2 * round(sample.bucket.width * factor / 2)), max(2, 2 * round(sample.bucket.height * factor / 2))


def grey_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the grey copy."""
    factor = min(1.0, GREY_SIDE / max(size))
    return max(4, round(size[0] * factor)), max(4, round(size[1] * factor))


def picture(job: Job, folder: Path) -> dict[str, Measures]:
    """Make the PNGs of a still picture, with Lanczos; and measure them."""
    import numpy as np
    from PIL import Image

    measures, image = {}, load_picture(job.path)
    for sample in job.samples:
        left, top = sample.crop
        whole = image.resize(sample.scaled, Image.Resampling.LANCZOS)
        cut = whole.crop((left, top, left + sample.bucket.width, top + sample.bucket.height))
        cut.save(folder / f"{sample.key}.png")
        cut.resize(thumbnail_size(sample), Image.Resampling.BOX).save(folder / f"{sample.key}.jpg")
        grey = whole.convert("L").resize(grey_size(sample.scaled), Image.Resampling.BOX)
        measures[sample.key] = measure(np.asarray(grey)[None])
    return measures
