"""Decisions -> the index, and the few lines that sum it up. Cost: none."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from ingest.caption import with_prefix
from ingest.decide import Decision, Source
from ingest.plan import INGEST_VERSION, Sample, in_folder
from shared.config import Config
from shared.shards import Drop, Index, SampleRecord, ShardRecord, SourceFacts, Split
from shared.words import counted

FEW_DROPS = 5  # up to so many are named on the terminal; the report names all


def build_index(
    dataset: str, config: Config, sources: list[Source], decision: Decision, shards: Iterable[ShardRecord]
) -> Index:
    """Everything that was decided, in dataset order; tars without a kept sample are left out."""
    shard_of = {key: shard for shard in shards for key in shard.keys}
    held = held_out(config, [source for source, _ in decision.kept])
    samples = tuple(
        sample_record(
            config, source, sample, shard_of[sample.key].name, "validation" if source.sha256 in held else "train"
        )
        for source, sample in decision.kept
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


def sample_record(config: Config, source: Source, sample: Sample, shard: str, split: Split) -> SampleRecord:
    """A sample as the index names it; captions are final."""
    folder = source.found.folder
    prior = is_prior(config, folder)
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
        split=split,
    )


def held_out(config: Config, sources: Iterable[Source]) -> set[str]:
    """sha256 of the sources that are for validation, by sub-folder or by hash: the same on any machine.

    A hash that is a share of 1 below `validation.fraction` is held out. Where nothing is held out so, the lowest hash
    of two or more sources that are no prior is: of a few sources it may be another one when some are added.
    """
    folder, fraction = config.validation.folder, config.validation.fraction
    folders = {source.sha256: source.found.folder for source in sources}
    held = {name for name, place in folders.items() if folder is not None and in_folder(place, folder)}
    held |= {name for name in folders if int(name[:8], 16) / 16**8 < fraction}
    plain = sorted(name for name, place in folders.items() if not is_prior(config, place))
    return held or set(plain[:1] if fraction and len(plain) > 1 else ())


def is_prior(config: Config, folder: str) -> bool:
    """Whether a sub-folder is of ordinary clips that keep what the model knew."""
    return any(in_folder(folder, name) for name in config.prior.folders)


def scaled_up(decision: Decision) -> int:
    """How many files a kept sample shows larger than they are."""
    return len({source.found.path for source, sample in decision.kept if sample.enlarges(source.facts.pixel_aspect)})


def summary(index: Index, remarks: Mapping[str, list[str]], small: int, report: Path) -> str:
    """Kept and dropped, by bucket and by reason. `small`: files that are scaled up; `remarks`: of the caption lint."""
    count = len({sample.source for sample in index.samples})
    kept = f"{counted(len(index.samples), 'sample')} of {counted(count, 'file')}"
    lines = [f"kept {kept} in {counted(len(index.shards), 'shard')}"]
    buckets = Counter(str(sample.bucket) for sample in index.samples)
    lines += [f"  {number:6} in bucket {bucket}" for bucket, number in sorted(buckets.items())]
    if held := sum(sample.split == "validation" for sample in index.samples):
        lines.append(f"  {held:6} of them held out for validation")
    if small:
        are = "is smaller than its bucket and is" if small == 1 else "are smaller than their bucket and are"
        lines.append(f"{small} of {counted(count, 'file')} {are} scaled up")
    lines += drop_lines(index.dropped)
    if remarks:
        caption, found = next(iter(remarks.items()))
        lines.append(f"{counted(len(remarks), 'caption')} worth another look, such as {caption[:60]!r}: {found[0]}")
    return "\n".join([*lines, f"report: {report}" + ("; next: make encode" if index.samples else "")])


def drop_lines(dropped: tuple[Drop, ...]) -> list[str]:
    """A few drops by file; many by kind, each with the first as example, which says what to do."""
    if len(dropped) <= FEW_DROPS:
        lines = [f"{place(drop)}: {drop.reason}" for drop in dropped]
    else:
        kinds: dict[str, list[Drop]] = {}
        for drop in dropped:
            kinds.setdefault(reason_kind(drop), []).append(drop)
        most = sorted(kinds.values(), key=len, reverse=True)
        lines = [f"{len(drops):6} such as {place(drops[0])}: {drops[0].reason}" for drops in most]
    return [f"dropped {len(dropped)}:", *(f"  {line}" for line in lines)] if lines else []


def place(drop: Drop) -> str:
    """The file, and where a clip that was cut from it starts: other clips of it may be kept."""
    return drop.source if drop.start is None else f"{drop.source} at {drop.start:.3g} s"


def reason_kind(drop: Drop) -> str:
    """A reason without its particulars."""
    return drop.reason.split(":")[0].split(", line")[0].split(" same bytes")[0]
