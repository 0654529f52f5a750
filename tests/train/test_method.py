"""Each method trains what it says and nothing else, lowers the held-out loss, and resumes bit-equal."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from shared.concept import text_key
from shared.config import EmbeddingConfig
from shared.errors import StoreError
from shared.keys import caption_key
from shared.models import ModelSpec, spec_of_folder
from shared.store_read import StoreReader
from shared.weights import load_transformer
from tests.train.children import child
from tests.train.make import (
    add_text_encoder,
    config,
    equal,
    events,
    listed,
    make_model,
    make_run,
    make_store,
    trained,
)
from train import checkpoint
from train.adapter import add_adapter
from train.embedding import OutputConcept, first_rows
from train.rounding import Rounded, round_stochastic
from train.session import start
from train.stores import open_dataset
from train.text_encoder import PREFIX

Made = tuple[Path, ModelSpec, Path]
CONCEPT: dict[str, Any] = {"placeholder": "<zorb>", "initial_text": "a thing", "token_count": 3}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 0.01},
    "dora": {"peft_type": "DORA", "learning_rate": 0.01, "lora_dropout": 0.2},
    "loha": {"peft_type": "LOHA", "learning_rate": 0.02},
    "lokr": {"peft_type": "LOKR", "learning_rate": 0.02},
    "8-bit": {"learning_rate": 0.01, "optimizer": {"name": "ADAMW_8BIT"}, "lora_rank": 32},
    "lion": {"learning_rate": 0.003, "optimizer": {"name": "LION"}},
    "prodigy": {"learning_rate": 1.0, "optimizer": {"name": "PRODIGY"}},
    "came": {"learning_rate": 0.003, "optimizer": {"name": "CAME"}},
    "schedule-free": {"learning_rate": 0.02, "optimizer": {"name": "SCHEDULE_FREE_ADAMW"}},
    "half": {"learning_rate": 0.01, "train_dtype": "FLOAT_16", "transformer": {"weight_dtype": "FLOAT_16"}},
    "muon": {"learning_rate": 0.05, "optimizer": {"name": "MUON"}},
    "fine-tune": {"training_method": "FINE_TUNE", "output_model_format": "SAFETENSORS", "learning_rate": 3e-3},
    "half fine-tune": {"training_method": "FINE_TUNE", "output_model_format": "SAFETENSORS", "learning_rate": 3e-3,
                       "train_dtype": "FLOAT_16", "transformer": {"weight_dtype": "FLOAT_32"}},
    "stochastic": {"training_method": "FINE_TUNE", "output_model_format": "DIFFUSERS", "learning_rate": 3e-3,
                   "transformer": {"weight_dtype": "BFLOAT_16"}, "train_dtype": "BFLOAT_16",
                   "optimizer": {"rounding": "STOCHASTIC"}},
    "kahan": {"training_method": "FINE_TUNE", "output_model_format": "DIFFUSERS", "learning_rate": 3e-3,
              "transformer": {"weight_dtype": "BFLOAT_16"}, "train_dtype": "BFLOAT_16",
              "optimizer": {"rounding": "KAHAN", "name": "ADAFACTOR"}},
    "embedding": {"training_method": "EMBEDDING", "output_model_format": "SAFETENSORS", "embedding_learning_rate": 0.1,
                  "embedding": CONCEPT, "caption_dropout_probability": 0.0},
    "input": {"training_method": "EMBEDDING", "output_model_format": "SAFETENSORS", "embedding_learning_rate": 0.1,
              "embedding": CONCEPT | {"kind": "INPUT"}, "caption_dropout_probability": 0.0},
    "text encoder alone": {"training_method": "FINE_TUNE", "output_model_format": "SAFETENSORS",
                           "transformer": {"train": False, "weight_dtype": "FLOAT_8"},
                           "text_encoder": {"train": True, "learning_rate": 1e-2, "weight_dtype": "FLOAT_32"}},
    "text encoder": {"training_method": "FINE_TUNE", "output_model_format": "SAFETENSORS", "learning_rate": 3e-3,
                     "text_encoder": {"train": True, "learning_rate": 1e-3, "weight_dtype": "FLOAT_32"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def zorbs(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Samples whose captions hold a placeholder; one held out."""
    model = add_text_encoder(make_model(tmp_path_factory.mktemp("z") / "model"))
    spec = spec_of_folder(model)
    texts = [f"<zorb> moving {way} on black" for way in ("left", "right", "up", "down")]
    samples = [listed(n, spec, captions=(caption_key(texts[n % 4]),), split="validation" if n == 5 else "train")
               for n in range(6)]  # fmt: skip
    store = make_store(tmp_path_factory.mktemp("z") / "s.zarr", spec, samples, tuple(texts), EmbeddingConfig(**CONCEPT))
    return model, spec, store


@pytest.mark.parametrize("method", METHODS)
def test_a_method_lowers_the_held_out_loss_and_resumes_bit_equal(zorbs: Made, tmp_path: Path, method: str) -> None:
    model, _, store = zorbs
    settings = config(model, max_steps=12, backup_after=4, warmup_steps=0, lr_scheduler="CONSTANT", **METHODS[method])
    whole, broken = (make_run(tmp_path / name, settings, store) for name in ("whole", "broken"))
    began = time.monotonic()
    start(whole, finished=False)
    losses = [row["loss"] for row in events(whole) if row["event"] == "validation"]
    # a random model hardly listens to its text, so what changes text alone does little; Prodigy still finds its rate
    little = ("embedding", "input", "text encoder alone", "prodigy")
    assert losses[1] < (1 if method in little else 0.98) * losses[0]
    if method == "text encoder alone":
        assert all(name.startswith(PREFIX) for name in trained(whole))
        assert [path.name for path in whole.folder.glob("whole*")] == ["whole_text_encoder.safetensors"]
    process = child(broken)
    time.sleep(random.Random(method).uniform(0.3, 0.9) * (time.monotonic() - began))
    process.kill()
    process.join()
    start(broken, finished=False)
    assert equal(trained(whole), trained(broken))
    states = [checkpoint.read_optimizer(checkpoint.latest(run.folder) or Path()) for run in (whole, broken)]
    assert states[0] and equal(*states)
    assert events(whole) == events(broken)
    assert list(whole.folder.glob("whole*"))


def test_looking_at_a_schedule_free_run_changes_nothing_and_its_results_are_the_averages(
    zorbs: Made, tmp_path: Path
) -> None:
    model, _, store = zorbs
    base = METHODS["schedule-free"] | {"max_steps": 6, "lr_scheduler": "CONSTANT", "output_dtype": "FLOAT_32"}
    seldom, often = (make_run(tmp_path / name, config(model, **base, validate_after=every, backup_after=every), store)
                     for name, every in (("seldom", 6), ("often", 1)))  # fmt: skip
    for run in (seldom, often):
        start(run, finished=False)
    for kind in ("weights", "training"):
        ours, theirs = trained(seldom, kind=kind), trained(often, kind=kind)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = checkpoint.read_optimizer(checkpoint.latest(often.folder) or Path())["state"]
    result = load_file(often.folder / "often.safetensors")
    names = list(add_adapter(load_transformer(often.spec, "single", torch.float32), often.config, 0))
    for number, name in enumerate(names):  # y = (1 - beta1) z + beta1 x (arXiv 2405.15682, equation 3)
        expected = 0.1 * state[number]["z"] + 0.9 * trained(often)[name]
        torch.testing.assert_close(trained(often, kind="training")[name], expected, rtol=1e-4, atol=1e-6)
    assert any(torch.equal(value, used) for value in result.values() for used in trained(often).values())


def test_an_embedding_file_says_how_to_use_it(zorbs: Made, tmp_path: Path) -> None:
    model, spec, store = zorbs
    run = make_run(tmp_path / "run", config(model, max_steps=2, **METHODS["embedding"]), store)
    start(run, finished=False)
    path = run.folder / "run.safetensors"
    assert load_file(path)["embedding"].shape == (3, spec.text_dim)
    with safe_open(path, "pt") as file:
        said = file.metadata()
    assert {name: said[name] for name in CONCEPT} == CONCEPT | {"token_count": "3"}


def test_learned_rows_take_the_placeholders_place(zorbs: Made) -> None:
    reader, settings = StoreReader([zorbs[2]]), EmbeddingConfig(**CONCEPT)
    texts = [reader.text(text_key(f"<zorb> moving {way} on black", settings)) for way in ("left", "up")]
    rows = first_rows(texts, settings, 16)
    torch.testing.assert_close(rows, sum(torch.tensor(text.embedding_Sd[:3]).float() for text in texts) / 2)
    concept = OutputConcept(torch.nn.Parameter(rows + 1))
    embedding = concept(texts[0])
    assert embedding is not None and torch.equal(embedding[3:], torch.tensor(texts[0].embedding_Sd[3:]).float())
    assert torch.equal(embedding[:3], concept.rows_nd)
    embedding.sum().backward()
    assert torch.equal(concept.rows_nd.grad, torch.ones_like(concept.rows_nd))
    assert concept(reader.text(caption_key(""))) is None


def test_a_placeholder_that_no_caption_has_is_refused(single: Made, tmp_path: Path) -> None:
    model, spec, store = single
    with pytest.raises(StoreError, match=r"<zorb>.*in no caption"):
        open_dataset([store], tmp_path, config(model, **METHODS["embedding"]), spec)


def test_stochastic_rounding_keeps_the_mean() -> None:
    value = torch.full((100_000,), 1.0 + 1 / 512)  # a quarter of the way between two bfloat16 neighbours
    rounded = round_stochastic(value, torch.Generator().manual_seed(0))
    assert set(rounded.float().tolist()) == {1.0, 1.0078125}
    assert abs(float(rounded.float().mean()) - (1 + 1 / 512)) < 1e-4


@pytest.mark.parametrize("kahan", [True, False])
def test_small_updates_are_not_lost_in_bfloat16(kahan: bool) -> None:
    """2000 steps of 1e-4 move a weight of 1 by 0.2; rounded to nearest it would never move."""
    part = torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16))
    optimizer = Rounded(lambda _, wide: torch.optim.SGD([wide], lr=1e-4), {"part": part}, kahan, seed=0)
    for _ in range(2000):
        part.grad = torch.ones_like(part)
        optimizer.step()
    assert abs(float(part.detach().float().mean()) - 0.8) < 0.01
    lost = torch.ones(1, dtype=torch.bfloat16)
    assert all(lost.sub_(1e-4) == 1 for _ in range(100))


def test_what_two_processes_hold_alike_they_round_alike() -> None:
    """Undivided tensors stay equal, whatever part of the divided ones a process has; its own part has its own dice."""

    def rounded(rank: int, rows: int) -> dict[str, torch.nn.Parameter]:
        named = {"own": torch.nn.Parameter(torch.ones(rows, 64, dtype=torch.bfloat16)),
                 "shared": torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))}  # fmt: skip
        optimizer = Rounded(lambda _, wide: torch.optim.SGD([wide], lr=1e-3), named, False, 0, {"own": rank})
        for _ in range(3):
            for part in named.values():
                part.grad = torch.ones_like(part)
            optimizer.step()
        return named

    first, second, third = rounded(0, 64), rounded(1, 64), rounded(1, 1)
    assert torch.equal(first["shared"], second["shared"]) and torch.equal(first["shared"], third["shared"])
    assert not torch.equal(first["own"], second["own"]) and first["shared"].unique().numel() > 1
