"""What a store holds against what is wanted: counts, bytes, missing, stale, recipes. Reads markers and index only."""

from collections.abc import Iterator
from pathlib import Path

from encode.plan import Plan, Recipe
from shared.store import DatasetList, Kind, Marker

KINDS: tuple[Kind, ...] = ("latents", "cond", "text")


def describe(store: Path, markers: list[Marker], datasets: list[DatasetList], plan: Plan | None) -> Iterator[str]:
    """Lines of `encode status`."""
    yield f"{store}"
    for kind in KINDS:
        units = [marker for marker in markers if marker.kind == kind]
        if units:
            rows = {row for unit in units for row in (unit.captions if kind == "text" else unit.rows)}
            size = sum(file.size for unit in units for file in unit.files)
            yield f"  {kind}: {len(rows)} rows in {len(units)} units, {size / 1e6:.1f} MB"
            yield from (f"    {line}" for line in sorted({recipe_line(unit.recipe) for unit in units}))
    for dataset in datasets:
        yield f"  dataset {dataset.id}: {len(dataset.samples)} samples, {len(dataset.texts)} captions"
    if plan is not None:
        for (wanted, reason), count in sorted(plan.reasons.items()):
            yield f"  to do: {count} {wanted}: {reason}"
        yield "  next: make encode" if plan.rows else "  complete and fresh; next: make train"


def recipe_line(recipe: Recipe) -> str:
    """A recipe in one line, hashes shortened."""
    return ", ".join(f"{name} {str(value)[:12]}" for name, value in sorted(recipe.items()))
