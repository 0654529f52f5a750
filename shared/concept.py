"""A learned concept in texts: its placeholder stands for tokens of its own, so such a text has a key of its own.

With training_method EMBEDDING, encode puts the tokens of initial_text, repeated or cut to exactly token_count, where
the placeholder is, and stores where they are. A text without the placeholder is any other text.
"""

from shared.config import Config, EmbeddingConfig
from shared.keys import caption_key, fingerprint

Spans = tuple[tuple[int, int], ...]  # (first token, number of tokens) of each placeholder of a text


def concept_of(config: Config) -> EmbeddingConfig | None:
    """What the placeholder means to this config; None: it is a word like any other."""
    return config.embedding if config.training_method == "EMBEDDING" else None


def text_key(text: str, concept: EmbeddingConfig | None) -> str:
    """Name under which the embedding of a text is stored."""
    if concept is None or concept.placeholder not in text:
        return caption_key(text)
    return fingerprint(caption=text, placeholder=concept.placeholder, initial_text=concept.initial_text,
                       token_count=concept.token_count)  # fmt: skip
