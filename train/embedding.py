"""A concept learned as vectors of text, with the model frozen (textual inversion, Gal et al. 2022, arXiv 2208.01618).

In a caption the placeholder stands for `token_count` tokens; encode has put those of `initial_text` there and stored
where they are. OUTPUT learns the rows of these tokens in the encoder's output, so that no text encoder is needed.

Names: n tokens of the concept, S tokens of a text, d columns of an embedding.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.config import EmbeddingConfig
from shared.store_read import Text


@dataclass(frozen=True)
class OutputConcept:
    """Learned rows of the encoder's output."""

    rows_nd: nn.Parameter

    def __call__(self, text: Text) -> Tensor | None:
        """(S, d) float32 of a text with the concept, its rows in place, with their gradient; None: it is not there."""
        if not text.spans:
            return None
        return spliced(torch.from_numpy(text.embedding_Sd.copy()), text, self.rows_nd)


def spliced(values_Sd: Tensor, text: Text, rows_nd: Tensor) -> Tensor:
    """(S, d) with the concept's rows at each of its places, in the dtype and on the device of these rows."""
    values_Sd, parts, end = values_Sd.to(rows_nd), [], 0
    for start, count in text.spans:
        parts += [values_Sd[end:start], rows_nd]
        end = start + count
    return torch.cat([*parts, values_Sd[end:]])


def first_rows(texts: Iterable[Text], settings: EmbeddingConfig, width: int) -> Tensor:
    """(n, d) float32 to start from: what the encoder gave for the initial text, the mean over all its places."""
    found = [torch.from_numpy(text.embedding_Sd[start : start + count].copy()).float()
             for text in texts for start, count in text.spans]  # fmt: skip
    return torch.stack(found).mean(0) if found else torch.zeros(settings.token_count, width)
