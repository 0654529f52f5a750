"""What a store holds against what is wanted: counts, bytes, missing, stale, recipes. Reads markers and index only."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from encode.plan import Plan, Recipe
from shared.store import DatasetList, Kind, Marker
from shared.words import counted

KINDS: tuple[Kind, ...] = ("latents", "cond", "text")
NOUNS: dict[Kind, str] = {"latents": "latent", "cond": "image condition", "text": "caption"}


@dataclass(frozen=True)
class Wanted:
    """What encode would make of the index, and the dataset list that it would write."""

    plan: Plan
    listed: DatasetList

    def relisted(self, datasets: Iterable[DatasetList]) -> bool:
        """Whether the store's list is another one; the samples alone are compared while rows are to be made."""
        old = next((dataset for dataset in datasets if dataset.id == self.listed.id), None)
        if old is None or not self.plan.rows:
            return old != self.listed and not (old is None and self.plan.rows)
        return old.samples != self.listed.samples


def describe(store: Path, markers: list[Marker], datasets: list[DatasetList], wanted: Wanted | None) -> Iterator[str]:
    """Lines of `encode status`; `wanted` is None where nothing was ingested."""
    yield f"{store}"
    for kind in KINDS:
        units = [marker for marker in markers if marker.kind == kind]
        if units:
            rows = {row for unit in units for row in (unit.captions if kind == "text" else unit.rows)}
            size = sum(file.size for unit in units for file in unit.files)
            yield f"  {kind}: {counted(len(rows), 'row')} in {counted(len(units), 'unit')}, {size / 1e6:.1f} MB"
            yield from (f"    {line}" for line in sorted({recipe_line(unit.recipe) for unit in units}))
    for dataset in datasets:
        samples, texts = counted(len(dataset.samples), "sample"), counted(len(dataset.texts), "caption")
        yield f"  dataset {dataset.id}: {samples}, {texts}"
    if wanted is not None:
        yield from (f"  {line}" for line in to_do(wanted, datasets))


def to_do(wanted: Wanted, datasets: Iterable[DatasetList]) -> Iterator[str]:
    """What is not as wanted, and the next command."""
    relisted = wanted.relisted(datasets)
    if wanted.plan.rows:
        yield to_encode(wanted.plan)
    if relisted:
        yield "to do: the list of samples changed; next: make encode"
    elif wanted.plan.rows:
        yield "next: make encode"
    else:
        yield "complete and fresh; next: make train"


def to_encode(plan: Plan) -> str:
    """The rows to make: 'to encode: 9 new latents, 1 stale caption (precision FLOAT_32 -> BFLOAT_16)'."""
    reasons = sorted(plan.reasons.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1]))
    return f"to encode: {', '.join(rows_in_words(kind, reason, count) for (kind, reason), count in reasons)}"


def rows_in_words(kind: Kind, reason: str, count: int) -> str:
    """Rows of one kind that are to be made for one reason."""
    state, _, changed = ("new" if reason == "missing" else reason).partition(" ")
    return f"{counted(count, f'{state} {NOUNS[kind]}')} {changed}".strip()


def recipe_line(recipe: Recipe) -> str:
    """A recipe in one line, hashes shortened."""
    return ", ".join(f"{name} {str(value)[:12]}" for name, value in sorted(recipe.items()))
