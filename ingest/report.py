"""work/report.html: what happened to every file, as one self-contained page without scripts, readable on a phone.

Input: the index, caption remarks and the tars, whose small JPEGs make the contact sheet. Cost: 0.1 ms per sample.
"""

import base64
import math
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path

from ingest.index import reason_kind
from shared.files import atomic_write
from shared.shards import Index, SampleRecord, shard_folder

BINS = 8
FEW = 20  # below this, drops are shown without being asked for
STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:1200px;margin:auto;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
table{border-collapse:collapse}td,th{padding:.1rem .8rem .1rem 0;text-align:left;vertical-align:top}
td:first-child{font-variant-numeric:tabular-nums}
.bar{background:#4a7;display:inline-block;height:.8em;min-width:1px}
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.8rem}
figure{margin:0;font-size:.8rem;content-visibility:auto;contain-intrinsic-size:auto 220px}
figure img{width:100%;height:auto;background:#8884}
small{opacity:.7}
"""


def write_report(work: Path, index: Index, remarks: Mapping[str, list[str]]) -> None:
    """Replace the report. `remarks`: the lint of each caption that has any."""
    with atomic_write(work / "report.html") as file:
        for part in page(work, index, remarks):
            file.write(part.encode())


def page(work: Path, index: Index, remarks: Mapping[str, list[str]]) -> Iterator[str]:
    """The page in pieces."""
    kept = {sample.source for sample in index.samples}
    yield (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>What ingest did</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style>'
        f"<h1>{len(index.samples)} samples of {len(kept)} files, {len(index.dropped)} dropped</h1>"
    )
    yield section("Buckets (width x height x frames)", counts(str(sample.bucket) for sample in index.samples))
    yield dropped(index)
    yield section("Captions worth another look", rows((text, "; ".join(found)) for text, found in remarks.items()))
    yield histograms(index)
    yield '<h2>Contact sheet</h2><div class="sheet">'
    pictures = thumbnails(work, index)
    for sample in index.samples:
        yield figure(sample, pictures.get(sample.key))
    yield "</div></html>\n"


def section(title: str, body: str) -> str:
    """A titled part, left out when it is empty."""
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def rows(pairs: Iterable[tuple[object, str]]) -> str:
    """A table of two columns."""
    lines = [f"<tr><td>{escape(str(left))}<td>{escape(right)}" for left, right in pairs]
    return f"<table>{''.join(lines)}</table>" if lines else ""


def counts(values: Iterable[str]) -> str:
    """How often each value occurs."""
    return rows((count, value) for value, count in sorted(Counter(values).items()))


def dropped(index: Index) -> str:
    """Reasons with their counts, and every dropped item."""
    if not index.dropped:
        return ""
    kinds = rows((count, kind) for kind, count in Counter(map(reason_kind, index.dropped)).most_common())
    every = rows(
        (drop.source if drop.start is None else f"{drop.source} at {drop.start:.2f} s", drop.reason)
        for drop in index.dropped
    )
    shown = " open" if len(index.dropped) < FEW else ""
    return section("Dropped", f"{kinds}<details{shown}><summary>every dropped item</summary>{every}</details>")


def histograms(index: Index) -> str:
    """Durations, frame rates and sizes of the sources in use."""
    kept = {sample.source for sample in index.samples}
    facts = [source.facts for source in index.sources if source.path in kept]
    moving = [fact for fact in facts if fact["end"] > fact["start"]]
    return (
        section("Durations (seconds)", histogram([fact["end"] - fact["start"] for fact in moving]))
        + section("Frame rates (frames per second)", histogram([fact["fps"] for fact in moving]))
        + section("Shorter sides (pixels)", histogram([float(min(fact["width"], fact["height"])) for fact in facts]))
    )


def histogram(values: list[float]) -> str:
    """Bars over equal steps of the logarithm; one bar when all values are nearly equal."""
    positive = [value for value in values if value > 0]
    if not positive:
        return ""
    low, high = min(positive), max(positive)
    bins = BINS if high > 1.01 * low else 1
    step = math.log(high / low) / bins if bins > 1 else 1.0
    found = Counter(min(bins - 1, int(math.log(value / low) / step)) for value in positive)
    lines = []
    for place in range(bins):
        start, end = low * math.exp(place * step), low * math.exp((place + 1) * step)
        label = f"{start:.3g} to {end:.3g}" if bins > 1 else f"{low:.3g}"
        width = 100 * found[place] / max(found.values())
        bar = f'<span class="bar" style="width:{width:.0f}px"></span>' if found[place] else ""
        lines.append(f"<tr><td>{label}<td>{found[place]}<td>{bar}")
    return f"<table>{''.join(lines)}</table>"


def thumbnails(work: Path, index: Index) -> dict[str, bytes]:
    """The small JPEG of every sample, read from the tars."""
    found = {}
    for shard in index.shards:
        with tarfile.open(shard_folder(work) / shard.name) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                if file is not None:
                    found[member.name.removesuffix(".jpg")] = file.read()
    return found


def figure(sample: SampleRecord, picture: bytes | None) -> str:
    """One clip of the contact sheet."""
    data = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}" if picture else ""
    captions = "<br>".join(escape(caption) for caption in sample.captions)
    variant = "" if sample.variant == "plain" else f", {sample.variant}"
    return (
        f'<figure><img loading="lazy" width="{sample.width}" height="{sample.height}" alt="" src="{data}"><figcaption>'
        f"{captions}<br><small>{escape(sample.source)} at {sample.start:.2f} s, {sample.bucket}{variant}</small>"
        "</figcaption></figure>"
    )
