"""Dataset lists: every fact of a sample that training needs is in its entry, the variants of a clip are one entry."""

from shared.keys import caption_key
from shared.listing import listed_samples
from shared.shards import Index, SampleRecord
from shared.store import ListedSample

RECORD = SampleRecord(key="k", shard="s.tar", extension="mp4", num_frames=9, height=32, width=48, fps=8.0,
                      captions=("a", "b"), source="x.mp4", start=0.5, duration=1.0, clip="c", repeats=3, prior=True,
                      weight=0.5, split="validation")  # fmt: skip


def listed(*records: SampleRecord) -> tuple[ListedSample, ...]:
    return listed_samples(Index(dataset="d", ingest_version=1, samples=records))


def test_an_entry_has_every_fact_of_its_sample() -> None:
    (entry,) = listed(RECORD)
    facts = ListedSample.model_fields.keys() & SampleRecord.model_fields.keys() - {"captions"}
    assert {"repeats", "prior", "weight", "split", "clip", "source", "fps"} <= facts
    for name in facts:
        assert getattr(entry, name) == getattr(RECORD, name) != ListedSample.model_fields[name].default
    assert entry.captions == (caption_key("a"), caption_key("b")) and entry.bucket == RECORD.bucket


def test_variants_of_a_clip_are_one_entry_the_plain_one_first() -> None:
    slow = RECORD.model_copy(update={"key": "slow", "variant": "slow"})
    other = RECORD.model_copy(update={"key": "other", "clip": "other"})
    assert [entry.keys for entry in listed(slow, RECORD, other)] == [("k", "slow"), ("other",)]
