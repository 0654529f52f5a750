"""Decisions -> the index, and the few lines that sum it up. Cost: none."""

from collections import Counter
from collections.abc import Iterable, Mapping

from ingest.caption import with_prefix
from ingest.decide import Decision, Source
from ingest.plan import INGEST_VERSION, Sample, in_folder
from shared.config import Config
from shared.shards import Drop, Index, SampleRecord, ShardRecord, SourceFacts, Split

EXAMPLES = 3  # remarks on captions that the terminal shows; the report has all


def build_index(
    dataset: str, config: Config, sources: list[Source], decision: Decision, shards: Iterable[ShardRecord]
) -> Index:
    """Everything that was decided, in dataset order; tars without a kept sample are left out."""
    shard_of = {key: shard for shard in shards for key in shard.keys}
    samples = tuple(
        sample_record(config, source, sample, shard_of[sample.key].name) for source, sample in decision.kept
    )
    used = dict.fromkeys(shard_of[sample.key] for sample in samples)
    return Index(
        dataset=dataset,
        ingest_version=INGEST_VERSION,
        sources=tuple(source_record(source) for source in sources),
        samples=samples,
        shards=tuple(used),
        dropped=tuple(decision.dropped),
    )


def source_record(source: Source) -> SourceFacts:
    """A source as the index names it."""
    facts = source.facts.model_dump(mode="json", exclude={"keyframes", "stream"})
    return SourceFacts(path=source.found.path, sha256=source.sha256, facts=facts)


def sample_record(config: Config, source: Source, sample: Sample, shard: str) -> SampleRecord:
    """A sample as the index names it; captions are final."""
    folder = source.found.folder
    prior = any(in_folder(folder, name) for name in config.prior.folders)
    named = [name for name in config.concepts if in_folder(folder, name)]
    return SampleRecord(
        key=sample.key,
        shard=shard,
        extension=sample.extension,
        num_frames=sample.bucket.num_frames,
        height=sample.bucket.height,
        width=sample.bucket.width,
        fps=sample.fps,
        captions=source.found.captions if prior else with_prefix(source.found.captions, config.caption_prefix),
        source=source.found.path,
        start=round(sample.window.start, 6),
        duration=round(sample.window.duration, 6),
        variant=sample.window.variant,
        clip=sample.clip_key,
        repeats=config.concepts[max(named, key=len)].repeats if named else 1,
        prior=prior,
        weight=config.prior.weight if prior else 1.0,
        split=split_of(config, source),
    )


def split_of(config: Config, source: Source) -> Split:
    """Held out by sub-folder, or by the hash of its bytes: the same choice on any machine."""
    held = config.validation
    if held.folder is not None and in_folder(source.found.folder, held.folder):
        return "validation"
    return "validation" if int(source.sha256[:8], 16) / 16**8 < held.fraction else "train"


def summary(index: Index, remarks: Mapping[str, list[str]]) -> str:
    """Kept and dropped, by bucket and by reason; captions that the lint remarks on."""
    sources = {sample.source for sample in index.samples}
    lines = [f"kept {len(index.samples)} samples of {len(sources)} files in {len(index.shards)} shards"]
    buckets = Counter(str(sample.bucket) for sample in index.samples)
    lines += [f"  {count:6} in bucket {bucket}" for bucket, count in sorted(buckets.items())]
    reasons = Counter(reason_kind(drop) for drop in index.dropped)
    if reasons:
        lines.append(f"dropped {sum(reasons.values())}:")
        lines += [f"  {count:6} {reason}" for reason, count in reasons.most_common()]
    if remarks:
        lines.append(f"{len(remarks)} captions worth another look, for example:")
        lines += [f"  {caption[:60]!r}: {found[0]}" for caption, found in list(remarks.items())[:EXAMPLES]]
    return "\n".join(lines)


def reason_kind(drop: Drop) -> str:
    """A reason without its particulars."""
    return drop.reason.split(":")[0].split(", line")[0].split(" same bytes")[0]
