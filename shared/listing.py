"""From the ingest index to the samples a dataset list names: one rule, for encode that writes and train that checks."""

from shared.keys import caption_key
from shared.shards import Index, SampleFacts, SampleRecord
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
    return ListedSample(keys=tuple(record.key for record in records),
                        captions=tuple(caption_key(text) for text in first.captions),
                        **{name: getattr(first, name) for name in SampleFacts.model_fields})  # fmt: skip
