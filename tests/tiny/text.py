"""A tokenizer of whole words and a frozen, random UMT5: enough to tell captions apart.

Words of the captions and some common ones are pieces of their own; any other word falls apart into characters, so an
unseen word (the concept's) has an embedding too. Output: a `T5Tokenizer` and a two-layer `UMT5EncoderModel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tests.tiny.draw import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES

TEXT_DIM = 64
TEXT_SEED = 7
OTHER_WORDS = (
    "a an the is are on in of at to and with from over moving moves move slowly fast background video clip photo "
    "pink orange cyan brown star ring heart cross striped texture small large big tiny bright dark blurry low quality "
    "distorted static style person cat dog car tree water sky hand light"
)


def new_tokenizer() -> T5Tokenizer:
    """Pieces with unigram scores; ids 0, 1, 2 are padding, end and unknown, as in UMT5's own tokenizer."""
    space = "\u2581"
    words = dict.fromkeys([*OTHER_WORDS.split(), *COLORS, *SHAPES, *DIRECTIONS, *BACKGROUNDS])
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (space, -4.0)]
    pieces += [(space + word, -2.0) for word in words]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def new_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """Random weights from a fixed seed; never trained."""
    torch.manual_seed(TEXT_SEED)
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    encoder: UMT5EncoderModel = UMT5EncoderModel(config).eval().requires_grad_(False)
    return encoder


@torch.no_grad()
def embed(tokenizer: T5Tokenizer, encoder: UMT5EncoderModel, captions: Sequence[str]) -> list[Tensor]:
    """Token embeddings (S, 64) of each caption, real tokens only."""
    ids = (tokenizer(caption, return_tensors="pt").input_ids for caption in captions)
    return [encoder(row).last_hidden_state[0] for row in ids]
