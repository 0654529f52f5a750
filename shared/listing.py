"""From the ingest index to the samples a dataset list names: one rule, for encode that writes and train that checks."""

from shared.keys import caption_key
from shared.shards import Index, SampleRecord
from shared.store import ListedSample


def listed_samples(index: Index) -> tuple[ListedSample, ...]:
    """Live samples in order; the variants of one clip are one entry, the plain one first."""
    variants: dict[str, list[SampleRecord]] = {}
    for sample in index.samples:
        variants.setdefault(sample.clip, []).append(sample)
    return tuple(_listed(clip, records) for clip, records in variants.items())


def _listed(clip: str, records: list[SampleRecord]) -> ListedSample:
    records = sorted(records, key=lambda record: record.variant != "plain")
    first = records[0]
    return ListedSample(clip=clip, keys=tuple(record.key for record in records), num_frames=first.num_frames,
                        height=first.height, width=first.width, fps=first.fps,
                        captions=tuple(caption_key(text) for text in first.captions), source=first.source,
                        repeats=first.repeats, prior=first.prior, weight=first.weight, split=first.split)  # fmt: skip
