"""A concept learned as vectors of text, with the model frozen (textual inversion, Gal et al. 2022, arXiv 2208.01618).

In a caption the placeholder stands for `token_count` tokens; encode has put those of `initial_text` there and stored
where they are. OUTPUT learns the rows of these tokens in the encoder's output, so that no text encoder is needed; INPUT
learns their vectors at its input, through the frozen encoder.

Names: n tokens of the concept, S tokens of a text, d columns of an embedding.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.config import EmbeddingConfig
from shared.store_read import Text
from train.text_encoder import TextEncoder


@dataclass(frozen=True)
class OutputConcept:
    """Learned rows of the encoder's output."""

    rows_nd: nn.Parameter

    def __call__(self, text: Text) -> Tensor | None:
        """(S, d) float32 of a text with the concept, its rows in place, with their gradient; None: it is not there."""
        if not text.spans:
            return None
        return spliced(stored(text), text, self.rows_nd)


@dataclass(frozen=True)
class InputConcept:
    """Learned vectors of the encoder's input."""

    rows_nd: nn.Parameter
    encoder: TextEncoder

    def __call__(self, text: Text) -> Tensor | None:
        """(S, d) of a text with the concept, encoded with its vectors in place; None: it is not there."""
        if not text.spans:
            return None
        return self.encoder.encode(spliced(self.encoder.vectors(text), text, self.rows_nd))


def stored(text: Text) -> Tensor:
    """(S, d) of a text as the store has it."""
    return torch.from_numpy(text.embedding_Sd.copy())


def spliced(values_Sd: Tensor, text: Text, rows_nd: Tensor) -> Tensor:
    """(S, d) with the concept's rows at each of its places, in the dtype and on the device of these rows."""
    values_Sd, parts, end = values_Sd.to(rows_nd), [], 0
    for start, count in text.spans:
        parts += [values_Sd[end:start], rows_nd]
        end = start + count
    return torch.cat([*parts, values_Sd[end:]])


def first_rows(
    texts: Iterable[Text], settings: EmbeddingConfig, width: int, values: Callable[[Text], Tensor] = stored
) -> Tensor:
    """(n, d) float32 to start from: the `values` of the initial text's tokens, the mean over all their places."""
    found = [values(text)[start : start + count].float() for text in texts for start, count in text.spans]
    return torch.stack(found).mean(0) if found else torch.zeros(settings.token_count, width)
