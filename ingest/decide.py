"""Sources -> kept samples, drops, and the jobs that are still to do. Cost: none; all that is measured is in the ledger.

A pure function of dataset, config and ledger, asked again after every round of jobs until no job is left.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ingest.caption import names_direction
from ingest.discover import Found
from ingest.focus import FocusJob
from ingest.gates import Duplicates, Measures, refusal
from ingest.ledger import FileEntry, Learned, Ledger
from ingest.plan import ClipPlan, Footage, Planner, Sample, focus_name
from ingest.probe import Facts, Unusable
from ingest.scenes import SceneJob
from ingest.transcode import Job
from shared.shards import Drop

AnyJob = Job | SceneJob | FocusJob


@dataclass(frozen=True)
class Source:
    """A file of the dataset that can be read."""

    found: Found
    path: Path
    sha256: str
    facts: Facts

    def footage(self, known: Learned) -> Footage:
        """What plans need to know of it."""
        return Footage(self.sha256, self.facts, known.focus)


@dataclass
class Decision:
    """What becomes of the sources: kept samples in dataset order, drops, jobs to do before this is final."""

    kept: list[tuple[Source, Sample]] = field(default_factory=list)
    dropped: list[Drop] = field(default_factory=list)
    jobs: list[AnyJob] = field(default_factory=list)

    def drop(self, source: Source, reason: str, start: float | None = None, value: float | None = None) -> None:
        """Note a drop."""
        self.dropped.append(Drop(source=source.found.path, reason=reason, start=start, value=value))


def usable(root: Path, files: Iterable[Found], ledger: Ledger) -> tuple[list[Source], list[Drop]]:
    """Sources that can be used, each content once; the others with the reason."""
    sources: list[Source] = []
    dropped = []
    first: dict[str, str] = {}
    for found in files:
        entry: FileEntry | None = ledger.files.get(found.path)
        if entry is None:
            continue  # it could not be read; said where that was found
        reason = entry.problem
        if entry.sha256 in first:
            reason = f"same bytes as {first[entry.sha256]}"
        elif reason is None and not found.captions:
            reason = "no caption: write it to a .txt file of the same name, or set caption.model"
        if reason is None and entry.facts is not None:
            first[entry.sha256] = found.path
            sources.append(Source(found, root / found.path, entry.sha256, entry.facts))
        else:
            dropped.append(Drop(source=found.path, reason=reason or "unknown"))
    return sources, dropped


def decide(sources: list[Source], planner: Planner, ledger: Ledger, present: set[str]) -> Decision:
    """Judge every sample by what is known. `present`: keys whose pixels are in a tar or in staging."""
    decision = Decision()
    bits = planner.config.gates.near_duplicate
    judge = Judge(planner, present, None if bits is None else Duplicates(bits), decision)
    for source in sources:
        known = ledger.of(source.sha256)
        for plan in clip_plans(source, planner, known, decision):
            judge.clip(source, plan, known)
    return decision


def clip_plans(source: Source, planner: Planner, known: Learned, decision: Decision) -> list[ClipPlan]:
    """Plans of a source's clips; none when its scenes are still to be found or it is unusable."""
    facts, longest = source.facts, planner.config.video_config.max_duration
    long = not source.found.is_image and longest is not None and facts.end - facts.start > longest
    if long and known.scenes is None:
        if problem := known.problem("scenes"):
            decision.drop(source, problem)
        else:
            decision.jobs.append(SceneJob(source.path, source.sha256, facts))
        return []
    try:
        if source.found.is_image:
            return planner.image(source.footage(known))
        reversible = not any(names_direction(caption) for caption in source.found.captions)
        return planner.video(source.footage(known), known.scenes or (), reversible)
    except Unusable as problem:
        decision.drop(source, str(problem), value=problem.value)
        return []


@dataclass
class Judge:
    """Puts samples into the decision: kept, dropped, or to be made first."""

    planner: Planner
    present: set[str]
    twins: Duplicates | None
    decision: Decision

    def clip(self, source: Source, plan: ClipPlan, known: Learned) -> None:
        """All samples of one clip."""
        if not plan.samples:
            self.decision.drop(source, self.planner.too_short(source.facts, plan.clip), plan.clip.start)
        elif plan.samples[0].key in known.unlucky:
            self.decision.drop(source, known.unlucky[plan.samples[0].key], plan.clip.start)
        elif self.waits(source, plan, known):
            return
        elif plan.look and plan.look not in known.bars:
            self.decision.jobs.append(Job(source.path, source.sha256, source.facts, plan.samples, plan.look))
        else:
            if plan.look:
                plan = self.planner.cropped(source.footage(known), plan, known.bars[plan.look])
                if self.waits(source, plan, known):
                    return
            missing = tuple(sample for sample in plan.samples if self.lacks(source, sample, known))
            if missing:
                self.decision.jobs.append(Job(source.path, source.sha256, source.facts, missing))

    def waits(self, source: Source, plan: ClipPlan, known: Learned) -> bool:
        """Whether the clip's crop is not known yet; then it is to be found, or the clip is dropped."""
        undecided = dict.fromkeys(sample.window.plain for sample in plan.samples if sample.undecided)
        problems = [known.problem(focus_name(source.sha256, window)) for window in undecided]
        if any(problems):
            self.decision.drop(source, next(filter(None, problems)), plan.clip.start)
        elif undecided:
            self.decision.jobs.append(FocusJob(source.path, source.sha256, source.facts, tuple(undecided)))
        return bool(undecided)

    def lacks(self, source: Source, sample: Sample, known: Learned) -> bool:
        """Keep or drop one sample; True when it has to be made before that can be said, or because it is kept."""
        if problem := known.problem(sample.key):
            self.decision.drop(source, problem, sample.window.start)
            return False
        if sample.key not in known.measures:
            return True
        fault = self.fault(source, sample, known.measures[sample.key])
        if fault:
            self.decision.drop(source, fault[0], sample.window.start, fault[1])
            return False
        self.decision.kept.append((source, sample))
        return sample.key not in self.present

    def fault(self, source: Source, sample: Sample, measures: Measures) -> tuple[str, float] | None:
        """(reason, value) of the first gate that a measured sample fails."""
        window = sample.window
        still = window.count == 1  # a lone frame of a video moves as little as a picture
        fault = refusal(measures, self.planner.config.gates, float(window.rate), still)
        if fault is None and self.twins is not None:
            twin = self.twins.twin_of(source.found.path, (sample.bucket, window.variant), measures.hashes)
            if twin:
                apart = f"{twin[1]} of 64 bits apart, gates.near_duplicate asks for more than {self.twins.bits}"
                return f"looks like {twin[0]}: {apart}", float(twin[1])
        return fault
