"""Is the store what it says, and do its latents show the clips? Checksums of every file, finite rows, PSNR of a few.

Input: a store, and the shards when they are there. Output: lines for people and a contact sheet, pixels beside what
the VAE decodes from the stored latents. Errors: StoreError naming the damaged file or the clip.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encode.pixels import Frames, read_samples
from encode.preview import contact_sheet, write_sheet
from shared.errors import StoreError
from shared.files import sha256_of
from shared.shards import Index, SampleRecord, shard_folder
from shared.store import Kind, Marker
from shared.store_read import StoreReader

Decoder = Callable[[NDArray[np.float16]], Frames]


@dataclass(frozen=True)
class Compared:
    """A sample, its pixels and what its latent decodes to."""

    sample: SampleRecord
    pixels: Frames
    decoded: Frames

    @property
    def psnr(self) -> float:
        """Peak signal to noise ratio, dB, over all pixels of the clip."""
        error = np.mean((self.pixels.astype(np.float64) - self.decoded) ** 2)
        return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def check_files(store: Path, markers: Sequence[Marker], advance: Callable[[float], None]) -> None:
    """Raise StoreError naming the first file that is missing or whose bytes are not those of its marker."""
    for marker in markers:
        for record in marker.files:
            path = store / record.path
            if not path.is_file():
                raise StoreError(f"{path} is missing; delete {store}/units/{marker.id}.json and run: make encode")
            if path.stat().st_size != record.size or sha256_of(path) != record.sha256:
                raise StoreError(f"{path} is damaged: its sha256 is not its marker's; delete it and "
                                 f"{store}/units/{marker.id}.json, then run: make encode")  # fmt: skip
        advance(1)


def check_finite(reader: StoreReader, clips: dict[str, str]) -> None:
    """Raise StoreError naming the clip of a row with NaN or infinite values; `clips` maps sample key -> its name."""
    tables: dict[Kind, dict[str, tuple[Path, Marker]]] = {"latents": reader.latents, "cond": reader.cond}
    for kind, table in tables.items():
        for key in table:
            if not np.isfinite(reader.latent(key, kind)).all():
                raise StoreError(f"{clips.get(key, key)}: its {kind} row has NaN or infinite values: encoder or "
                                 f"weights are broken; delete unit {table[key][1].id}, run: make encode")  # fmt: skip


def compare(work: Path, index: Index, reader: StoreReader, decode: Decoder, count: int) -> Iterator[Compared]:
    """Decode `count` samples spread evenly over the index."""
    stored = [sample for sample in index.samples if sample.key in reader.latents]
    chosen = [stored[i] for i in sorted(set(np.linspace(0, len(stored) - 1, min(count, len(stored))).astype(int)))]
    for shard in dict.fromkeys(sample.shard for sample in chosen):
        path = shard_folder(work) / shard
        for sample, pixels in read_samples(path, [sample for sample in chosen if sample.shard == shard]):
            yield Compared(sample, pixels, decode(reader.latent(sample.key)))


def write_report(path: Path, compared: Sequence[Compared]) -> None:
    """Contact sheet: pixels and decoded latents side by side."""
    labels = [f"{pair.sample.source}  {pair.psnr:.1f} dB" for pair in compared]
    columns = {"pixels": [pair.pixels for pair in compared], "decoded": [pair.decoded for pair in compared]}
    write_sheet(path, contact_sheet(columns, labels))


def decoder_of(vae: Any) -> Decoder:
    """Decode stored rows with a VAE."""
    import torch

    from encode.preview import decode_latent

    return lambda latent_CThw: decode_latent(vae, torch.tensor(latent_CThw.astype(np.float32)))
