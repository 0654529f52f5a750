"""A random DiT in diffusers layout and a store drawn from a seed: enough to train on in milliseconds."""

import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from numpy.typing import NDArray
from transformers import UMT5Config, UMT5EncoderModel

from shared.concept import Spans, text_key
from shared.config import Config, EmbeddingConfig, leaf_keys
from shared.keys import caption_key
from shared.models import ModelSpec, spec_of_folder
from shared.resolve import PRESETS, Resolved, read_layer
from shared.store import DatasetList, ListedSample, create_store, recipe_key, write_dataset
from shared.store_write import UnitDraft, text_origin, write_latents, write_texts
from train.checkpoint import latest, read_tensors
from train.run import Run

TEXT_DIM = 16
DIT = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": TEXT_DIM,
       "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}  # fmt: skip
RECIPE = {"encode_version": 1, "vae": "some weights", "precision": "FLOAT_32", "tiling": False}
TEXT_RECIPE = {"encode_version": 1, "text_encoder": "some weights", "tokenizer": "t", "precision": "FLOAT_32"}
SIZE = (9, 32, 32)


def make_model(folder: Path, pair: bool = False, first_frame: bool = False, **changes: Any) -> Path:
    """Random weights, large enough that the text and the timestep matter; the pair differs."""
    for number, part in enumerate(("transformer", "transformer_2") if pair else ("transformer",)):
        torch.manual_seed(number)
        dit = WanTransformer3DModel(**DIT | changes)
        with torch.no_grad():
            for parameter in dit.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5)
        dit.save_pretrained(folder / part)
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    index = {"expand_timesteps": first_frame, "boundary_ratio": 0.875 if pair else None}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def add_text_encoder(model: Path) -> Path:
    """A random UMT5 that knows the ids of made stores, with dropout, which must not matter."""
    torch.manual_seed(5)
    sizes = {"d_model": TEXT_DIM, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.2}
    UMT5EncoderModel(UMT5Config(vocab_size=1002, **sizes)).save_pretrained(model / "text_encoder")
    return model


def listed(number: int, spec: ModelSpec, size: tuple[int, int, int] = SIZE, **changes: Any) -> ListedSample:
    """Sample `number`, with a caption of its own."""
    frames, height, width = size
    facts: dict[str, Any] = {"clip": f"clip{number}", "keys": (f"sample{number}",), "num_frames": frames, "fps": 8.0,
                             "height": height, "width": width, "captions": (caption_key(caption(number)),),
                             "source": f"{number}.mp4"}  # fmt: skip
    return ListedSample(**facts | changes)


def caption(number: int) -> str:
    """Caption of sample `number`; they differ in length."""
    return "a thing that is " + "very " * (number % 3) + str(number)


def make_store(path: Path, spec: ModelSpec, samples: list[ListedSample], texts: tuple[str, ...] = (),
               concept: EmbeddingConfig | None = None) -> Path:  # fmt: skip
    """Latents that follow from the sample's name, one unit per bucket, and all captions, encoded for a concept or not.

    Captions without the concept are stored as they are too, so that such a store can be trained with any method.
    """
    create_store(path)
    rng = np.random.default_rng(0)
    for bucket in sorted({sample.bucket for sample in samples}):
        keys = [key for sample in samples if sample.bucket == bucket for key in sample.keys]
        shape = spec.latent_shape(bucket.num_frames, bucket.height, bucket.width)
        rows = np.stack([smooth(rng, shape) for _ in keys])
        write_latents(UnitDraft(path, "latents", {"bucket": str(bucket)}, RECIPE), keys, rows, spec.vae.fingerprint)
        if spec.image_condition == "concat":
            draft = UnitDraft(path, "cond", {"bucket": str(bucket)}, RECIPE)
            write_latents(draft, keys, rows[:, :, ::-1] * 0.5, spec.vae.fingerprint)
    captions = ["", *(caption(number) for number in range(len(samples))), *texts]
    named = {caption_key(text): text for text in captions}
    spelt = {key: (text.split(), ()) for key, text in named.items()}
    if concept is not None:
        spelt |= {text_key(text, concept): spell(text, concept) for text in captions if concept.placeholder in text}
    rows = [rng.standard_normal((1 + len(words), spec.text_dim)).astype(np.float32) for words, _ in spelt.values()]
    ids = [[2 + crc32(word.encode()) % 1000 for word in words] + [1] for words, _ in spelt.values()]
    draft = UnitDraft(path, "text", text_origin({key: spans for key, (_, spans) in spelt.items()}), TEXT_RECIPE)
    write_texts(draft, {key: " ".join(words) for key, (words, _) in spelt.items()}, rows, ids)
    recipes: Any = {"latents": recipe_key(RECIPE), "text": recipe_key(TEXT_RECIPE)}
    write_dataset(path, DatasetList(id="made", samples=tuple(samples), texts=named, recipes=recipes))
    return path


def spell(text: str, concept: EmbeddingConfig) -> tuple[list[str], Spans]:
    """Words of a text with the concept's initial words in its place, and where these are."""
    words: list[str] = []
    spans = []
    for word in text.split():
        if word == concept.placeholder:
            spans.append((len(words), concept.token_count))
            words += islice(cycle(concept.initial_text.split()), concept.token_count)
        else:
            words.append(word)
    return words, tuple(spans)


def smooth(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> NDArray[np.float32]:
    """A latent with structure that can be learned: one value per channel, and some noise."""
    base = rng.standard_normal((shape[0], 1, 1, 1)) * np.ones(shape)
    return (base + 0.2 * rng.standard_normal(shape)).astype(np.float32)


def config(model: Path, **changes: Any) -> Config:
    """The demo preset on a made model, small: float32, 32x32x9, rank 4."""
    small = {"base_model_name": str(model), "resolution": "32x32", "frames": 9, "batch_size": 4, "lora_rank": 4,
             "lora_alpha": 4.0, "max_steps": 6, "warmup_steps": 2, "sample_prompts": []}  # fmt: skip
    return Config.model_validate(read_layer(PRESETS / "demo.json") | small | changes)


def make_run(folder: Path, settings: Config, store: Path) -> Run:
    """A run in a folder of its own, not started."""
    return Run(folder, Resolved(settings, dict.fromkeys(leaf_keys(), "test")), (store,), folder.parent)


def events(run: Run) -> list[dict[str, Any]]:
    """Rows of the event log without their timing."""
    rows = [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def trained(run: Run, expert: str = "single", kind: str = "weights") -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint."""
    return read_tensors(latest(run.folder) or Path(), f"{kind}_{expert}")


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two states (tensors in dicts and lists) are equal bit for bit."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(value, theirs[name]) for name, value in ours.items())
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return bool(ours == theirs)


def make_all(folder: Path, count: int = 10, pair: bool = False) -> tuple[Path, ModelSpec, Path]:
    """(model folder, its facts, store of `count` samples)."""
    model = make_model(folder / "model", pair)
    spec = spec_of_folder(model)
    return model, spec, make_store(folder / "store.zarr", spec, [listed(number, spec) for number in range(count)])
