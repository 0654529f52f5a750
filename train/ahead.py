"""The files a run reads, in the order in which it needs them: what a store at a URL fetches ahead of the steps.

Input: data, plan. Output: paths. The walk ends when every file that any sample may need has been named.
"""

from collections.abc import Iterator
from pathlib import Path

from shared.keys import EMPTY_CAPTION
from shared.store import ListedSample
from shared.store_copy import is_copy
from shared.store_read import StoreReader
from train.data import Plan
from train.group import Group
from train.stores import Dataset


def files_in_order(data: Dataset, plan: Plan, span: tuple[int, int], group: Group) -> Iterator[Path]:
    """Files that are not here yet: of held-out samples, which are measured first, then of steps first..stop-1."""
    if not any(map(is_copy, data.reader.stores)):
        return
    samples = data.validation + data.train
    left = {path for sample in samples for key in sample.keys for path in files_of(data.reader, sample, key)}
    left = {path for path in left if not path.exists()}
    own = Plan(plan.samples, plan.config, plan.batch_size)  # another thread walks the run's
    for path in wanted(data, own, span, group) if left else ():
        if path in left:
            left.discard(path)
            yield path
        if not left:
            return


def wanted(data: Dataset, plan: Plan, span: tuple[int, int], group: Group) -> Iterator[Path]:
    """Files in the order of use, each as often as it is used."""
    for sample in data.validation:
        yield from files_of(data.reader, sample, sample.keys[0])
    for step in range(*span):
        for draw in plan.batch(step)[group.rank :: group.world]:
            yield from files_of(data.reader, draw.sample, draw.key)


def files_of(reader: StoreReader, sample: ListedSample, key: str) -> Iterator[Path]:
    """Files of a variant of a sample: its latent, its condition, every caption it may be given."""
    yield from reader.files(key, "latents")
    if key in reader.cond:
        yield from reader.files(key, "cond")
    for caption in (*sample.captions, EMPTY_CAPTION):
        if caption in reader.texts:  # a concept's captions have keys of their own; they are in the same units
            yield from reader.files(caption, "text")
