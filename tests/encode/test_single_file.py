"""Repackaged text encoders give the embeddings of the model they were made from, block by block."""

from pathlib import Path
from typing import Any

import pytest
import torch

from encode.text import TextEncoder
from shared.models import TINY_FOLDER, model_spec
from shared.weights import load_text_encoder, model_folder, with_parts
from tests.shared.originals import save_text
from train.quantize import SCHEMES, store


@pytest.mark.parametrize("scaled", [False, True])
def test_a_text_encoder_file_embeds_as_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled: bool) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tokenizer").symlink_to(TINY_FOLDER / "tokenizer")
    _, tiny = load_text_encoder(model_spec("tiny"), torch.float32)
    file = save_text(tmp_path / "umt5.safetensors", tiny, scaled)
    spec = with_parts(model_spec("tiny"), None, str(file))
    _, encoder = load_text_encoder(spec, torch.float32)
    ids = [[3, 7, 9, 1], [5, 1]]
    ours = TextEncoder(model_folder(spec, ("text_encoder", "tokenizer")), torch.float32, torch.device("cpu"))
    for row, embedded in zip(ids, ours.embed(ids, lambda _: None), strict=True):
        with torch.no_grad():
            wanted = encoder(torch.tensor([row])).last_hidden_state[0]
        torch.testing.assert_close(torch.from_numpy(embedded), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", ["FLOAT_8", "INT_8", "NFLOAT_4"])
def test_fewer_bits_are_the_model_with_its_matrices_rounded(storage: Any) -> None:
    """text_encoder.weight_dtype: every matrix of the blocks stored as train stores it, and nothing else."""
    tokenizer, exact = load_text_encoder(model_spec("tiny"), torch.float32)
    ids = [tokenizer("a red ball rolls").input_ids]
    for name, part in exact.named_parameters():
        if ".block." in name and part.ndim == 2 and "relative" not in name:
            shape = (part.shape[0], part.shape[1])
            part.data = SCHEMES[storage].decode(store(part.detach(), storage), shape, torch.float32)
    folder = model_folder(model_spec("tiny"), ("text_encoder", "tokenizer"))
    (found,) = TextEncoder(folder, torch.float32, torch.device("cpu"), storage).embed(ids, lambda _: None)
    with torch.no_grad():
        wanted = exact(torch.tensor(ids)).last_hidden_state[0]
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)
    (plain,) = TextEncoder(folder, torch.float32, torch.device("cpu")).embed(ids, lambda _: None)
    assert 1e-4 < abs(plain - found).max() < (2.0 if storage == "NFLOAT_4" else 0.5)
