"""What a run trains on: the samples its stores list, checked against model and preset before any weight is loaded.

Input: store paths, config, model facts. Output: a `Dataset`. Errors: StoreError, naming the command that mends.
"""

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.bucket import Bucket, aspect_sizes, nearest_size
from shared.concept import concept_of, text_key
from shared.config import Config, EmbeddingConfig
from shared.errors import StoreError
from shared.geometry import geometry
from shared.keys import EMPTY_CAPTION, fingerprint
from shared.listing import listed_samples
from shared.models import SPECS, ModelSpec
from shared.shards import index_path, read_index
from shared.store import DatasetList, ListedSample, Marker, open_store, read_datasets, recipe_key
from shared.store_read import StoreReader, fresh_units
from train.run import require_stores


@dataclass(frozen=True)
class Dataset:
    """Samples to train and to hold out, the reader of their rows, and what to tell the user about them."""

    train: list[ListedSample]
    validation: list[ListedSample]
    reader: StoreReader
    texts: dict[str, str]  # text key -> caption, of the captions that have the placeholder of a concept
    fingerprint: str
    remarks: tuple[str, ...]


def open_dataset(stores: list[Path], work: Path, config: Config, spec: ModelSpec) -> Dataset:
    """Load the dataset lists of all stores and make sure that every row a step may ask for exists."""
    require_stores(stores, work)
    lists = [dataset for store in stores for dataset in read_datasets(open_store(store))]
    samples = [sample for dataset in lists for sample in dataset.samples]
    if not samples:
        raise StoreError(f"{', '.join(map(str, stores))}: the store lists no samples; run: make encode")
    refuse_outdated(lists, work)
    units = fitting_units([marker for store in stores for marker in fresh_units(store)], spec, stores)
    reader = StoreReader(stores, {marker.id for marker in units})
    allowed, remarks = allowed_samples(samples, config, spec)
    texts = {key: text for dataset in lists for key, text in dataset.texts.items()}
    allowed, learned = with_concept(allowed, texts, concept_of(config))
    used = check_rows(allowed, reader, spec, learned.keys())
    name = fingerprint(datasets=[dataset.model_dump(mode="json") for dataset in lists], units=sorted(used))
    train = [sample for sample in allowed if sample.split == "train"]
    if not train:
        raise StoreError(f"{stores[0]}: all samples are held out; lower validation.fraction and run make ingest")
    held_out = [sample for sample in allowed if sample.split == "validation"]
    return Dataset(train, held_out, reader, learned, name, remarks)


def with_concept(
    samples: list[ListedSample], texts: dict[str, str], concept: EmbeddingConfig | None
) -> tuple[list[ListedSample], dict[str, str]]:
    """Samples whose captions go by text_key, and the captions (by that key) that have the placeholder of a concept."""
    if concept is None:
        return samples, {}
    named = {key: text_key(text, concept) for key, text in texts.items()}
    learned = {named[key]: text for key, text in sorted(texts.items()) if named[key] != key}
    if not learned:
        raise StoreError(
            f"embedding.placeholder={concept.placeholder!r} is in no caption; write it where the concept is meant, "
            "and run make ingest and make encode"
        )
    return [
        sample.model_copy(update={"captions": tuple(named.get(key, key) for key in sample.captions)})
        for sample in samples
    ], learned


def refuse_outdated(lists: list[DatasetList], work: Path) -> None:
    """Raise StoreError when the work folder was ingested again and encode has not followed."""
    if not index_path(work).is_file():
        return
    index = read_index(work)
    for dataset in lists:
        if dataset.id == index.dataset and dataset.samples != listed_samples(index):
            raise StoreError(f"{index_path(work)} is newer than the store: its samples changed; run: make encode")


def open_texts(stores: list[Path], spec: ModelSpec) -> StoreReader:
    """Reader of the text embeddings that fit a model."""
    markers = [marker for store in stores for marker in fresh_units(store)]
    return StoreReader(stores, {marker.id for marker in markers if marker.text_dim == spec.text_dim})


def fitting_units(markers: list[Marker], spec: ModelSpec, stores: list[Path]) -> list[Marker]:
    """Units of this model's VAE kind and text width; refuses stores that have none, or mix two recipes of one kind."""
    kinds = ("latents", "cond") if spec.image_condition == "concat" else ("latents",)
    latents = [marker for marker in markers if marker.kind in kinds and marker.vae_kind == spec.vae.fingerprint]
    texts = [marker for marker in markers if marker.kind == "text" and marker.text_dim == spec.text_dim]
    where, mend = ", ".join(map(str, stores)), f"encode again with: make encode MODEL={spec.name}"
    if not any(marker.kind == "latents" for marker in latents):
        others = sorted({vae_in_words(marker) for marker in markers if marker.kind == "latents"})
        raise StoreError(
            f"{where}: no latents of {spec.name}'s VAE ({spec.vae.channels} channels); it has those of "
            f"{'; '.join(others) or 'none'}; name the model it was encoded for with MODEL=, or {mend}"
        )
    if not texts:
        dims = sorted({str(marker.text_dim) for marker in markers if marker.kind == "text"})
        held = ", ".join(dims) or "none"
        raise StoreError(
            f"{where}: no text embeddings of width {spec.text_dim} for {spec.name}; the store holds {held}; {mend}"
        )
    for kind in ("latents", "cond", "text"):
        recipes = {recipe_key(marker.recipe): marker.recipe for marker in latents + texts if marker.kind == kind}
        if len(recipes) > 1:
            odd = differing(list(recipes.values()))
            raise StoreError(f"{where}: {kind} made in {len(recipes)} ways (other {odd}) do not mix; {mend}")
    return latents + texts


def vae_in_words(marker: Marker) -> str:
    """The models that a unit of latents may be for."""
    names = [name for name, spec in SPECS.items() if spec.vae.fingerprint == marker.vae_kind]
    return f"{' or '.join(names) or 'another model'} ({marker.shape[1]} channels)"


def differing(recipes: list[dict[str, Any]]) -> str:
    """Names of what differs between recipes."""
    names = sorted({name for recipe in recipes for name in recipe})
    return ", ".join(name for name in names if len({str(recipe.get(name)) for recipe in recipes}) > 1)


def allowed_samples(
    samples: list[ListedSample], config: Config, spec: ModelSpec
) -> tuple[list[ListedSample], tuple[str, ...]]:
    """Samples whose bucket the config's geometry allows; refuses when it allows none."""
    wanted = geometry(config, spec)
    sizes: set[tuple[int, int]] = set()
    for resolution in wanted.resolutions:
        if isinstance(resolution, tuple):
            sizes.add(nearest_size(1, 1, resolution, wanted.grid))
        else:
            sizes |= set(aspect_sizes(resolution, wanted.grid))

    def fits(bucket: Bucket) -> bool:
        return bucket.num_frames in (1, wanted.num_frames) and (bucket.height, bucket.width) in sizes

    allowed = [sample for sample in samples if fits(sample.bucket)]
    others = sorted({str(sample.bucket) for sample in samples if not fits(sample.bucket)})
    if not allowed:
        asked = f"resolution={config.resolution} frames={config.frames}"
        held = ",".join(dict.fromkeys(f"{sample.bucket.width}x{sample.bucket.height}" for sample in samples))
        frames = max(sample.bucket.num_frames for sample in samples)
        raise StoreError(
            f"the store's buckets ({', '.join(others)}) are not those of {asked}; train on them with "
            f'SET="resolution={held} frames={frames}", or cut the clips anew with make ingest and make encode'
        )
    left_out = len(samples) - len(allowed)
    return allowed, (f"{left_out} samples of buckets {', '.join(others)} are left out",) if left_out else ()


def check_rows(samples: list[ListedSample], reader: StoreReader, spec: ModelSpec, learned: Set[str]) -> set[str]:
    """Every listed variant and caption, and the empty caption, has a row; so has every condition of i2v.

    Captions of a concept are left out: those that are missing are encoded at the start. Returns the units of the rest.
    """
    tables = (reader.latents, reader.cond) if spec.image_condition == "concat" else (reader.latents,)
    missing = [key for sample in samples for key in sample.keys if any(key not in table for table in tables)]
    if missing:
        raise StoreError(f"{len(missing)} listed samples are not in the store (first: {missing[0]}); run: make encode")
    captions = {key for sample in samples for key in sample.captions} - learned | {EMPTY_CAPTION}
    if unknown := sorted(captions - set(reader.texts)):
        raise StoreError(f"{len(unknown)} captions are not in the store (first: {unknown[0]}); run: make encode")
    rows = [reader.latents[key] for sample in samples for key in sample.keys] + [reader.texts[key] for key in captions]
    return {marker.id for _, marker in rows}
