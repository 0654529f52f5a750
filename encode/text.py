"""From captions to token ids and embeddings with UMT5. Input: texts. Output: per text its real tokens only.

The prompt is cleaned and tokenised as diffusers' WanPipeline does (pipelines/wan/pipeline_wan.py `prompt_clean`,
`_get_t5_prompt_embeds`), with ftfy always. Rows beyond the real tokens are zeros there; they are left out here and
restored by the trainer. UMT5 masks padding, so the length a text is padded to does not change its rows.

Shape letters: B texts, S tokens of a text, d columns of an embedding.
"""

import copy
import html
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import ftfy
import numpy as np
import torch
from numpy.typing import NDArray

from encode.stored import StoredLinear
from shared.concept import Spans
from shared.config import EmbeddingConfig
from shared.errors import ConfigError, ModelError
from shared.models import TEXT_LENGTH
from shared.tensors import read
from shared.weights import text_places

TOKENS_PER_BATCH = 4096  # bounds activations: 64 heads of scores in float32 are 0.5 GB for 8 texts of 512 tokens
TOKENS_IN_FLIGHT = 2**18  # texts that pass through the blocks together: 2 GB of hidden states in bfloat16


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


class Tokens(NamedTuple):
    """A text as the encoder reads it: token ids, and where the concept's are."""

    ids: list[int]
    spans: Spans = ()


def tokenized(tokenizer: Any, texts: Sequence[str], concept: EmbeddingConfig | None) -> list[Tokens]:
    """Tokens of each text; the placeholder of a concept is the tokens of its initial text, exactly token_count."""
    plain = [text for text in texts if concept is None or concept.placeholder not in text]
    found = dict(zip(plain, map(Tokens, token_ids(tokenizer, plain)), strict=True))
    if concept is not None and len(plain) < len(texts):
        learned = concept_ids(tokenizer, concept)
        found |= {text: with_concept(tokenizer, text, concept, learned) for text in texts if text not in found}
    return [found[text] for text in texts]


def concept_ids(tokenizer: Any, concept: EmbeddingConfig) -> list[int]:
    """The tokens of initial_text, repeated or cut to token_count."""
    ids = token_ids(tokenizer, [concept.initial_text])[0][:-1]
    if not ids:
        raise ConfigError(f"embedding.initial_text={concept.initial_text!r} has no tokens; give it a word")
    return list(islice(cycle(ids), concept.token_count))


def with_concept(tokenizer: Any, text: str, concept: EmbeddingConfig, learned: list[int]) -> Tokens:
    """Tokens of a text with the placeholder. What is between placeholders is tokenised by itself, as if apart."""
    *pieces, last = token_ids(tokenizer, text.split(concept.placeholder))
    ids, spans = [], []
    for piece in pieces:
        ids += piece[:-1]
        spans.append((len(ids), len(learned)))
        ids += learned
    ids += last[:-1]
    if spans[-1][0] + len(learned) >= TEXT_LENGTH:  # the end token needs a place too
        raise ConfigError(f"caption {text!r}: {concept.placeholder!r} is beyond the {TEXT_LENGTH} tokens that are "
                          "read; move it to the front, and run make ingest and make encode")  # fmt: skip
    return Tokens([*ids[: TEXT_LENGTH - 1], last[-1]], tuple(spans))


def length_batches(ids: Sequence[list[int]]) -> list[list[int]]:
    """Positions of texts grouped into batches of similar length, shortest first, each under TOKENS_PER_BATCH padded."""
    batches: list[list[int]] = []
    for position in sorted(range(len(ids)), key=lambda position: (len(ids[position]), ids[position])):
        if not batches or (len(batches[-1]) + 1) * len(ids[position]) > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(position)
    return batches


def padded(ids: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_BS padded with 0, mask_BS)."""
    longest = max(map(len, ids))
    rows = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return rows, mask


class TextEncoder:
    """UMT5 that is never in memory whole: every text passes through one block after the other, each loaded once.

    Exactly the model's own arithmetic: its stack of one block runs with that block's weights, and its final norm last.
    Memory: two blocks (0.8 GB of UMT5-XXL in bfloat16), the embedding rows of the tokens that occur, activations.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, storage: str = "") -> None:
        """`storage`: of the matrices of a block, when it is in fewer bits; the arithmetic stays `dtype`."""
        from transformers import AutoConfig, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.config = AutoConfig.from_pretrained(folder / "text_encoder", local_files_only=True)
        self.weights = Weights(folder / "text_encoder")
        self.dtype, self.device, self.storage = dtype, device, storage

    @torch.no_grad()
    def embed(self, ids: Sequence[list[int]], advance: Callable[[float], None]) -> list[NDArray[np.float32]]:
        """Embedding (S, d) of each text's real tokens; `advance` is told how many texts each block was worth."""
        batches = length_batches(ids)
        inputs = [padded([ids[position] for position in batch]) for batch in batches]
        hidden = [self._embedded(rows_BS) for rows_BS, _ in inputs]
        with ThreadPoolExecutor(1, "weights") as loader:
            coming = loader.submit(self._block, 0)
            for number in range(self.config.num_layers):
                stack = self._stack(coming.result())
                if number + 1 < self.config.num_layers:
                    coming = loader.submit(self._block, number + 1)
                for position, (_, mask_BS) in enumerate(inputs):
                    hidden[position] = self._through(stack, hidden[position], mask_BS)
                advance(len(ids) / self.config.num_layers)
        norm = self._norm()
        rows: list[Any] = [None] * len(ids)
        for batch, hidden_BSd in zip(batches, hidden, strict=True):
            final_BSd = norm(hidden_BSd.to(self.device)).float().cpu().numpy()
            for position, embedding_Sd in zip(batch, final_BSd, strict=True):
                rows[position] = embedding_Sd[: len(ids[position])]
        return rows

    def _embedded(self, rows_BS: torch.Tensor) -> torch.Tensor:
        tokens, places = torch.unique(rows_BS, return_inverse=True)
        table = self.weights.rows(("shared.weight", "encoder.embed_tokens.weight"), tokens.tolist())
        return table.to(self.dtype)[places]

    def _block(self, number: int) -> dict[str, torch.Tensor | StoredLinear]:
        """Weights of one block under the names of a stack that has only this block."""
        prefix = f"encoder.block.{number}."
        return {f"block.0.{name.removeprefix(prefix)}": self._stored(name) for name in self.weights.under(prefix)}

    def _stored(self, name: str) -> torch.Tensor | StoredLinear:
        linear = name.endswith(".weight") and ".layer_norm." not in name and "bias" not in name
        if self.storage and linear:
            return StoredLinear(self.weights.tensor(name), self.storage, self.dtype, self.device)
        return self._cast(name)

    def _cast(self, name: str) -> torch.Tensor:
        # transformers keeps these in float32 beside float16, whose range they exceed (UMT5 `_keep_in_fp32_modules`)
        wide = self.dtype == torch.float16 and ".wo." in name
        return self.weights.tensor(name).to(self.device, torch.float32 if wide else self.dtype)

    def _stack(self, weights: dict[str, torch.Tensor | StoredLinear]) -> Any:
        from transformers.models.umt5.modeling_umt5 import UMT5Stack

        config = copy.deepcopy(self.config)
        config.num_layers, config.vocab_size = 1, 2
        config.is_encoder_decoder = config.use_cache = config.is_decoder = False
        with torch.device("meta"):
            stack = UMT5Stack(config).eval()
        stack.final_layer_norm = torch.nn.Identity()
        plain = {name: part for name, part in weights.items() if not isinstance(part, StoredLinear)}
        stack.load_state_dict(plain, strict=False, assign=True)
        for name in weights.keys() - plain.keys():
            stack.set_submodule(name.removesuffix(".weight"), weights[name])
        return stack

    def _through(self, stack: Any, hidden_BSd: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        done = stack(inputs_embeds=hidden_BSd.to(self.device), attention_mask=mask_BS.to(self.device))
        return cast(torch.Tensor, done.last_hidden_state.cpu())

    def _norm(self) -> Any:
        from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

        norm = UMT5LayerNorm(self.config.d_model, eps=self.config.layer_norm_epsilon)
        norm.weight = torch.nn.Parameter(self._cast("encoder.final_layer_norm.weight"), requires_grad=False)
        return norm


class Weights:
    """Tensors of a folder of safetensors files, read one at a time; no file is loaded whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place = text_places(folder)

    def under(self, prefix: str) -> list[str]:
        """Names that start with `prefix`; raises ModelError when there are none."""
        if names := sorted(name for name in self.place if name.startswith(prefix)):
            return names
        raise ModelError(f"{self.folder} has no weights {prefix}*; it is not a complete UMT5 encoder")

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in float32 where the file has fp8."""
        return cast(torch.Tensor, read(self.place[self.under(name)[0]]))

    def rows(self, names: Sequence[str], rows: list[int]) -> torch.Tensor:
        """Some rows of the first of these tensors that is stored."""
        name = next((name for name in names if name in self.place), names[0])
        return cast(torch.Tensor, read(self.place[self.under(name)[0]], rows))
