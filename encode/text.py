"""From captions to token ids and embeddings with UMT5. Input: texts. Output: per text its real tokens only.

The prompt is cleaned and tokenised as diffusers' WanPipeline does (pipelines/wan/pipeline_wan.py `prompt_clean`,
`_get_t5_prompt_embeds`), with ftfy always. Rows beyond the real tokens are zeros there; they are left out here and
restored by the trainer. UMT5 masks padding, so the length a text is padded to does not change its rows.

Shape letters: B texts, S tokens of a text, d columns of an embedding.
"""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ftfy
import numpy as np
import torch
from numpy.typing import NDArray

from shared.models import TEXT_LENGTH

TOKENS_PER_BATCH = 4096  # bounds activations: 64 heads of scores in float32 stay below 1 GB at 512 tokens a text


@dataclass(frozen=True)
class Embedded:
    """A caption's token ids and their embedding (S, d), float32."""

    ids: list[int]
    embedding_Sd: NDArray[np.float32]


def clean(prompt: str) -> str:
    """The text that is tokenised: mended Unicode, entities resolved twice, whitespace runs made one space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()).strip()


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text with the end token, at most 512; the empty text is its end token alone."""
    cleaned = [clean(text) for text in texts]
    rows = (
        tokenizer(cleaned, truncation=True, max_length=TEXT_LENGTH, add_special_tokens=True).input_ids if texts else []
    )
    return [list(map(int, row)) for row in rows]


def length_batches(ids: Sequence[list[int]]) -> list[list[int]]:
    """Positions of texts grouped into batches of similar length, shortest first, each under TOKENS_PER_BATCH padded."""
    batches: list[list[int]] = []
    for position in sorted(range(len(ids)), key=lambda position: (len(ids[position]), ids[position])):
        if not batches or (len(batches[-1]) + 1) * len(ids[position]) > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(position)
    return batches


def padded(ids: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_BS padded with 0, mask_BS)."""
    longest = max(map(len, ids))
    rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
    return rows, mask


@torch.no_grad()
def embed(encoder: Any, ids: Sequence[list[int]], device: torch.device) -> Iterator[tuple[int, Embedded]]:
    """Yield (position, Embedded) of each text, one encoder pass per text, in batches of similar length."""
    for batch in length_batches(ids):
        rows_BS, mask_BS = padded([ids[position] for position in batch], device)
        hidden_BSd = encoder(rows_BS, mask_BS).last_hidden_state.float().cpu().numpy()
        for position, embedding_Sd in zip(batch, hidden_BSd, strict=True):
            yield position, Embedded(ids[position], embedding_Sd[: len(ids[position])])
