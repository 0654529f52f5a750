"""Texts become what diffusers' WanPipeline makes of them, real tokens only."""

import html
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import load_file, save_file

from encode.text import TOKENS_PER_BATCH, TextEncoder, clean, length_batches, token_ids, tokenized
from shared.codes import SCHEMES, Stored
from shared.config import EmbeddingConfig
from shared.errors import ConfigError, ModelError
from shared.models import TEXT_LENGTH, model_spec
from shared.weights import load_text_encoder
from tests.encode.make import nano_model

AWKWARD = [
    "", " ", "a red ball", "  a\tred\n\nball  ", "caf\u00c3\u00a9 &amp;amp; tea", "\u201csmart\u201d quotes\u2026",
    "\u4e00\u53ea\u732b", "&lt;b&gt;bold&lt;/b&gt;", "zero\u200bwidth", "\ufb01ne ligature", "word " * 700,
    html.escape("<concept>"),
]  # fmt: skip


def encoder_of(model: Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
    return TextEncoder(model, dtype, torch.device("cpu"))


def embedded(model: Path, texts: list[str], dtype: torch.dtype = torch.float32) -> list[Any]:
    encoder = encoder_of(model, dtype)
    return encoder.embed(token_ids(encoder.tokenizer, texts), lambda share: None)


@pytest.mark.parametrize("prompt", AWKWARD)
def test_cleaning_is_the_pipelines(prompt: str) -> None:
    assert clean(prompt) == prompt_clean(prompt)


def test_padded_with_zeros_an_embedding_is_the_pipelines(model: Path) -> None:
    tokenizer, encoder = load_text_encoder(model_spec(str(model)), torch.float32)
    pipeline: Any = WanPipeline(tokenizer, encoder, None, None, None)
    stock_BSd = pipeline._get_t5_prompt_embeds(AWKWARD, max_sequence_length=TEXT_LENGTH)
    for row_Sd, stock_Sd in zip(embedded(model, AWKWARD), stock_BSd, strict=True):
        full_Sd = np.zeros(stock_Sd.shape, np.float32)
        full_Sd[: len(row_Sd)] = row_Sd
        np.testing.assert_allclose(full_Sd, stock_Sd.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_block_by_block_is_the_whole_model_to_the_bit(model: Path, dtype: torch.dtype) -> None:
    tokenizer, encoder = load_text_encoder(model_spec(str(model)), dtype)
    ids = token_ids(tokenizer, ["a red ball rolls", "a blue cube jumps"])
    longest = max(map(len, ids))
    rows_BS = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    with torch.no_grad():
        whole_BSd = encoder(rows_BS, (rows_BS > 0).long()).last_hidden_state.float().numpy()
    for row_Sd, whole_Sd in zip(
        embedded(model, ["a red ball rolls", "a blue cube jumps"], dtype), whole_BSd, strict=True
    ):
        np.testing.assert_array_equal(row_Sd, whole_Sd[: len(row_Sd)])


@pytest.mark.parametrize("storage", SCHEMES)
def test_stored_in_fewer_bits_it_computes_with_what_the_codes_stand_for(
    model: Path, tmp_path: Path, storage: str
) -> None:
    encoder, texts = encoder_of(model, torch.bfloat16), ["a red ball rolls left", "two dogs"]
    ids, copy, scheme = token_ids(encoder.tokenizer, texts), tmp_path / "decoded", SCHEMES[storage]
    shutil.copytree(model, copy)
    path = copy / "text_encoder/model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if ".block." in name and "layer_norm" not in name and "bias" not in name:
            codes, scale = scheme.encode(weight.float())
            weights[name] = scheme.decode(Stored(codes, scale), tuple(weight.shape), torch.bfloat16).float()
    save_file(weights, path, {"format": "pt"})
    stored = TextEncoder(model, torch.bfloat16, torch.device("cpu"), storage).embed(ids, lambda share: None)
    for row, expected, plain in zip(
        stored, embedded(copy, texts, torch.bfloat16), encoder.embed(ids, lambda share: None), strict=True
    ):
        np.testing.assert_array_equal(row, expected)
        assert 0 < np.linalg.norm(row - plain) < 0.5 * np.linalg.norm(plain)


def test_a_text_ends_with_its_end_token_and_has_at_most_512(model: Path) -> None:
    ids = token_ids(encoder_of(model).tokenizer, ["", "a red ball", "word " * 700])
    assert ids[0] == [1]
    assert all(row[-1] == 1 for row in ids)
    assert len(ids[2]) == TEXT_LENGTH


def test_every_text_is_in_one_batch_with_its_like() -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 300).tolist()
    batches = length_batches([[7] * length for length in lengths])
    assert sorted(position for batch in batches for position in batch) == list(range(300))
    spent = sum(len(batch) * max(lengths[position] for position in batch) for batch in batches)
    assert spent < 1.1 * sum(lengths)
    assert all(len(batch) * max(lengths[position] for position in batch) <= TOKENS_PER_BATCH for batch in batches)


def test_only_two_blocks_are_in_memory_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, alive, most = encoder_of(model), 0, 0
    load, run = encoder._block, encoder._stack

    def counted_load(number: int) -> Any:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return load(number)

    def counted_run(weights: Any) -> Any:
        nonlocal alive
        alive -= 1
        return run(weights)

    monkeypatch.setattr(encoder, "_block", counted_load)
    monkeypatch.setattr(encoder, "_stack", counted_run)
    encoder.embed([[5, 1]], lambda share: None)
    assert most == 1  # loaded ahead, beside the one that works


def test_an_incomplete_encoder_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = nano_model(tmp_path / "half")
    path = folder / "text_encoder/model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if ".block.1." not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"block\.1\."):
        embedded(folder, ["a"])


CONCEPT = EmbeddingConfig(placeholder="<zorb>", initial_text="a ball", token_count=3)


def test_the_placeholder_is_the_initial_texts_tokens_repeated_or_cut(model: Path) -> None:
    tokenizer = encoder_of(model).tokenizer
    ids = token_ids(tokenizer, [CONCEPT.initial_text])[0][:-1]
    for count in (1, len(ids), 2 * len(ids) + 1):
        concept = CONCEPT.model_copy(update={"token_count": count})
        (tokens,) = tokenized(tokenizer, ["red <zorb> rolls, <zorb>"], concept)
        assert [length for _, length in tokens.spans] == [count, count]
        for start, length in tokens.spans:
            assert tokens.ids[start : start + length] == (ids * count)[:count]
        assert tokens.ids[-1] == 1


@pytest.mark.parametrize("text", ["<zorb>", "a red <zorb> rolls left", "  two <zorb>\n\n run &amp; <zorb> spins"])
def test_a_placeholder_among_spaces_is_the_text_written_in_its_place(model: Path, text: str) -> None:
    tokenizer = encoder_of(model).tokenizer
    own = len(token_ids(tokenizer, [CONCEPT.initial_text])[0]) - 1
    (tokens,) = tokenized(tokenizer, [text], CONCEPT.model_copy(update={"token_count": own}))
    assert tokens.ids == token_ids(tokenizer, [text.replace("<zorb>", CONCEPT.initial_text)])[0]


def test_texts_without_the_placeholder_are_as_without_a_concept(model: Path) -> None:
    tokenizer = encoder_of(model).tokenizer
    assert tokenized(tokenizer, AWKWARD, CONCEPT) == tokenized(tokenizer, AWKWARD, None)
    assert [tokens.ids for tokens in tokenized(tokenizer, AWKWARD, None)] == token_ids(tokenizer, AWKWARD)


def test_a_placeholder_beyond_the_last_token_is_refused(model: Path) -> None:
    tokenizer = encoder_of(model).tokenizer
    with pytest.raises(ConfigError, match=r"<zorb>.*512"):
        tokenized(tokenizer, ["word " * 700 + "<zorb>"], CONCEPT)
    (tokens,) = tokenized(tokenizer, ["<zorb> " + "word " * 700], CONCEPT)
    assert len(tokens.ids) == TEXT_LENGTH and tokens.spans == ((0, 3),) and tokens.ids[-1] == 1
    with pytest.raises(ConfigError, match="initial_text"):
        tokenized(tokenizer, ["<zorb>"], CONCEPT.model_copy(update={"initial_text": " "}))
