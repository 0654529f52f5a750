"""What an encode has to do: index + store -> tasks, each with its reason. Pure functions: nothing is read.

A row is fresh when a unit made by the wanted recipe holds it; stale when only units of other recipes do; else missing.
Units are never rewritten: a task makes new units that hold exactly the rows that are not fresh.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.concept import concept_of, text_key
from shared.config import Config
from shared.errors import ConfigError
from shared.keys import caption_key
from shared.listing import listed_samples
from shared.shards import Index, SampleRecord, ShardRecord
from shared.store import DatasetList, Kind, Marker, recipe_key

ENCODE_VERSION = 2  # raised when the same weights would give other numbers
CAPTIONS_PER_UNIT = 512  # what a crash can cost; about 0.4 GB of embeddings at 100 tokens a caption

Recipe = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Share of the work this process does: SHARD=i/n takes every n-th shard and caption, from the i-th."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """'2/4' -> the second of four; '' -> everything."""
        number, slash, count = (text or "1/1").partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ConfigError(f"SHARD={text}: give i/n with i from 1 to n, as 1/4 for the first of four parts")
        return cls(int(number), int(count))

    def owns(self, position: int) -> bool:
        """Whether the position-th (from 0) of all shards or captions belongs to this part."""
        return position % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class ShardTask:
    """Rows of one kind to make from one shard."""

    kind: Kind
    shard: ShardRecord
    samples: tuple[SampleRecord, ...]  # in the order of the tar


@dataclass(frozen=True)
class TextTask:
    """Captions of one unit to make."""

    captions: dict[str, str]  # text key -> text


@dataclass(frozen=True)
class Plan:
    """Everything to do, and why: `reasons` counts rows per (kind, reason)."""

    shards: tuple[ShardTask, ...]
    texts: tuple[TextTask, ...]
    reasons: dict[tuple[Kind, str], int]

    @property
    def rows(self) -> int:
        """Rows to make."""
        return sum(self.reasons.values())


def wanted_captions(index: Index, config: Config) -> dict[str, str]:
    """Text key -> text: captions of live samples, the empty one, negative and sample prompts."""
    texts = ["", config.sample_negative_prompt, *config.sample_prompts]
    texts += [caption for sample in index.samples for caption in sample.captions]
    return keyed(texts, config)


def keyed(texts: Iterable[str], config: Config) -> dict[str, str]:
    """Text key -> text."""
    concept = concept_of(config)
    return {text_key(text, concept): text for text in texts}


def make_plan(index: Index, captions: Mapping[str, str], recipes: Mapping[Kind, Recipe], markers: Iterable[Marker],
              part: Part) -> Plan:  # fmt: skip
    """Tasks of this part. `recipes` names the kinds that are wanted and how each is made."""
    why = {kind: Freshness(kind, recipe) for kind, recipe in recipes.items()}
    for marker in markers:
        if marker.kind in why:
            why[marker.kind].add(marker)
    shards = [task for kind in recipes if kind != "text" for task in _shard_tasks(index, why[kind], part)]
    missing = [key for number, key in enumerate(sorted(captions)) if part.owns(number) and why["text"].reason(key)]
    chunks = [missing[start : start + CAPTIONS_PER_UNIT] for start in range(0, len(missing), CAPTIONS_PER_UNIT)]
    texts = [TextTask({key: captions[key] for key in chunk}) for chunk in chunks]
    reasons: dict[tuple[Kind, str], int] = {}
    rows = [(task.kind, sample.key) for task in shards for sample in task.samples]
    for kind, key in rows + [("text", key) for key in missing]:
        cause = (kind, why[kind].reason(key))
        reasons[cause] = reasons.get(cause, 0) + 1
    return Plan(tuple(shards), tuple(texts), reasons)


class Freshness:
    """Which rows of a kind a store has: made by the wanted recipe, or by which other one."""

    def __init__(self, kind: Kind, recipe: Recipe) -> None:
        self.kind, self.recipe = kind, recipe
        self.fresh: set[str] = set()
        self.stale: dict[str, str] = {}  # and why

    def add(self, marker: Marker) -> None:
        """Take a unit into account."""
        rows = marker.captions if marker.kind == "text" else marker.rows
        if marker.recipe == self.recipe:
            self.fresh.update(rows)
        else:
            self.stale.update(dict.fromkeys(rows, f"stale ({difference(marker.recipe, self.recipe)})"))

    def reason(self, key: str) -> str:
        """Why a row has to be made; empty when it is fresh."""
        return "" if key in self.fresh else self.stale.get(key, "missing")


def difference(old: Recipe, new: Recipe) -> str:
    """What changed between two recipes, in words: 'precision BFLOAT_16 -> FLOAT_32'."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"{name} {_short(old.get(name))} -> {_short(new.get(name))}" for name in names)


def _short(value: Any) -> str:
    return str(value)[:12]


def _shard_tasks(index: Index, freshness: Freshness, part: Part) -> list[ShardTask]:
    of_shard: dict[str, dict[str, SampleRecord]] = {}
    for sample in index.samples:
        of_shard.setdefault(sample.shard, {})[sample.key] = sample
    tasks = []
    for number, shard in enumerate(sorted(index.shards, key=lambda shard: shard.name)):
        live = of_shard.get(shard.name, {})
        samples = tuple(live[key] for key in shard.keys if key in live and freshness.reason(key))
        if samples and part.owns(number):
            tasks.append(ShardTask(freshness.kind, shard, samples))
    return tasks


def dataset_list(index: Index, recipes: Mapping[Kind, Recipe]) -> DatasetList:
    """What is trained: a pure function of the index and of how rows are wanted to be made."""
    texts = {caption_key(text): text for sample in index.samples for text in sample.captions}
    return DatasetList(id=index.dataset, samples=listed_samples(index), texts=dict(sorted(texts.items())),
                       recipes={kind: recipe_key(recipe) for kind, recipe in recipes.items()})  # fmt: skip
