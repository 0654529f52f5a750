"""`train embed`: a prompt's embedding with what a run has learned of text, as a file for diffusers.

The text is embedded by a child process (`python -m encode prompts`) where the store lacks it; the DiT is not loaded,
and UMT5 only for runs that trained it, or a concept at its input. Output: prompt_embeds and negative_prompt_embeds,
(1, 512, d) with zeros after the real tokens, as diffusers' WanPipeline pads them (pipelines/wan/pipeline_wan.py).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.concept import concept_of, text_key
from shared.models import expert_end
from shared.store_read import Text
from train import checkpoint
from train.embedding import InputConcept, OutputConcept, stored
from train.export import in_dtype, write_file
from train.lean import TEXT_ROWS
from train.model import Embed, pick_device
from train.optim import EMBEDDING
from train.run import Run, open_run
from train.sample import ensure_texts
from train.session import latest_of
from train.text_encoder import load_encoder, needs_encoder


@torch.no_grad()
def embed_run(folder: Path, prompt: str, negative: str | None, out: Path | None) -> list[Path]:
    """Write the prompt's file, one for each expert that was trained; returns the files."""
    run, target, number, paths = open_run(folder), out or folder / "prompts", 1, []
    saved, concept = latest_of(run), concept_of(run.config)
    texts = {"prompt_embeds": prompt, "negative_prompt_embeds": negative or run.config.sample_negative_prompt}
    reader = ensure_texts(list(texts.values()), run)
    found = {name: reader.text(text_key(text, concept)) for name, text in texts.items()}
    while list(target.glob(f"prompt-{number}*.safetensors")):
        number += 1
    for expert in run.spec.experts:
        if not (saved / f"weights_{expert}.safetensors").is_file():
            continue
        embed = learned(run, checkpoint.read_tensors(saved, f"weights_{expert}"))
        rows = {name: padded(embedded(text, embed)) for name, text in found.items()}
        paths.append(target / f"prompt-{number}{expert_end(expert)}.safetensors")
        write_file(paths[-1], in_dtype(rows, run.config), {"format": "pt", **texts})
    return paths


def learned(run: Run, tensors: Mapping[str, Tensor]) -> Embed | None:
    """What a run's trained tensors make of a text; None: what the store has."""
    encoder = load_encoder(run.spec, run.config, pick_device()) if needs_encoder(run.config) else None
    if EMBEDDING in tensors:
        rows_nd = nn.Parameter(tensors[EMBEDDING])
        return OutputConcept(rows_nd) if encoder is None else InputConcept(rows_nd, encoder)
    if encoder is not None:
        for name, part in encoder.parameters().items():
            part.copy_(tensors[name])
    return encoder


def embedded(text: Text, embed: Embed | None) -> Tensor:
    """(S, d) of a text, as learned or as stored."""
    rows_Sd = None if embed is None else embed(text)
    return stored(text) if rows_Sd is None else rows_Sd


def padded(rows_Sd: Tensor) -> Tensor:
    """(1, 512, d)."""
    return F.pad(rows_Sd, (0, 0, 0, TEXT_ROWS - len(rows_Sd)))[None]
