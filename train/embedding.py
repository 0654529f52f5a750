"""A concept learned as rows of text embeddings, with the model frozen (textual inversion, Gal et al. 2022,
arXiv 2208.01618, moved from the encoder's input to its output, so that no text encoder is needed).

In a caption the placeholder stands for `token_count` learned rows. The rows around it are those that the encoder gives
with `initial_text` in its place; the span of that text is found by its token ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.config import EmbeddingConfig
from shared.errors import ConfigError, RunError
from shared.keys import caption_key
from shared.store_read import StoreReader


@dataclass(frozen=True)
class Concept:
    """The learned rows, and where they go in which caption."""

    rows_nd: nn.Parameter
    places: dict[
        str, tuple[str, tuple[int, ...], int]
    ]  # caption key -> (stored key, starts of spans, tokens of a span)

    def embedding(self, key: str, reader: StoreReader) -> Tensor:
        """(S, text_dim) float32 of a caption with the placeholder, the learned rows in place, with their gradient."""
        stored_key, starts, count = self.places[key]
        stored = torch.from_numpy(reader.text(stored_key).embedding_Sd.copy()).float().to(self.rows_nd.device)
        parts, end = [], 0
        for start in starts:
            parts += [stored[end:start], self.rows_nd]
            end = start + count
        return torch.cat([*parts, stored[end:]])


def initial_texts(texts: Iterable[str], settings: EmbeddingConfig) -> dict[str, str]:
    """Caption key -> text with initial_text in the placeholder's place, of the captions that have the placeholder."""
    found = {
        caption_key(text): text.replace(settings.placeholder, settings.initial_text)
        for text in texts
        if settings.placeholder in text
    }
    if not found:
        raise ConfigError(
            f"embedding.placeholder={settings.placeholder!r} is in no caption; write it where the concept "
            "is meant, and run make ingest and make encode"
        )
    return found


def make_concept(
    replaced: dict[str, str], settings: EmbeddingConfig, reader: StoreReader, device: torch.device
) -> Concept:
    """A concept that starts as its initial text; every text of `replaced`, and initial_text, must be in the store."""
    initial = reader.text(caption_key(settings.initial_text))
    needle = initial.ids_S[:-1].tolist()  # without the end token
    places = {
        key: (caption_key(text), spans(reader, text, needle, settings), len(needle)) for key, text in replaced.items()
    }
    index = [number * len(needle) // settings.token_count for number in range(settings.token_count)]
    rows = torch.from_numpy(initial.embedding_Sd[:-1].copy()).float()[index]
    return Concept(nn.Parameter(rows.to(device)), places)


def spans(reader: StoreReader, text: str, needle: Sequence[int], settings: EmbeddingConfig) -> tuple[int, ...]:
    """Where the tokens of initial_text start in a text; they do not overlap."""
    ids, found, place = reader.text(caption_key(text)).ids_S.tolist(), [], 0
    while place + len(needle) <= len(ids):
        if ids[place : place + len(needle)] == list(needle):
            found.append(place)
            place += len(needle)
        else:
            place += 1
    if not found:
        raise RunError(
            f"caption {text!r}: the tokens of {settings.initial_text!r} are not in it; put spaces around "
            f"{settings.placeholder!r} in the caption, or choose another embedding.initial_text"
        )
    return tuple(found)
