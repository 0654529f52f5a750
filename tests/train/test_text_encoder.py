"""UMT5 in the trainer is stock UMT5 on the stored token ids; a concept's vectors and its weights get true gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from shared.bucket import Bucket
from shared.config import Config
from shared.errors import ConfigError
from shared.keys import caption_key
from shared.models import ModelSpec, spec_of_folder
from shared.store_read import StoreReader, Text
from tests.train.make import add_text_encoder, config, listed, make_model, make_run, make_store, trained
from train.dryrun import text_cost
from train.embedding import InputConcept, OutputConcept, first_rows
from train.memory import Room, plan_memory
from train.model import TextBank, load_model, refuse_mismatch
from train.sample import Start, first_noise, sample_range, scene_of
from train.session import export_run, sample_latents, start
from train.text_encoder import PREFIX, TextEncoder, load_encoder

Made = tuple[Path, ModelSpec, Path]
CPU = torch.device("cpu")
INPUT: dict[str, Any] = {"training_method": "EMBEDDING", "output_model_format": "SAFETENSORS",
                         "embedding": {"kind": "INPUT", "token_count": 2, "placeholder": "<zorb>"}}  # fmt: skip
WHOLE: dict[str, Any] = {"training_method": "FINE_TUNE", "output_model_format": "DIFFUSERS", "output_dtype": "FLOAT_32",
                         "text_encoder": {"train": True, "weight_dtype": "FLOAT_32"}}  # fmt: skip
TEXT = Text(np.zeros((7, 16), np.float16), np.array([9, 4, 5, 30, 4, 5, 1], np.int32), ((1, 2), (4, 2)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    model = add_text_encoder(make_model(folder / "model"))
    spec = spec_of_folder(model)
    return model, spec, make_store(folder / "s.zarr", spec, [listed(number, spec) for number in range(4)])


def stock(model: Path) -> Any:
    return UMT5EncoderModel.from_pretrained(model / "text_encoder").eval()


def encoder_of(made: Made, settings: Config, double: bool = False) -> TextEncoder:
    encoder = load_encoder(made[1], settings, CPU)
    if not double:
        return encoder
    return TextEncoder(encoder.stack.double(), encoder.table_Vd.double(), CPU, torch.float64)


@pytest.mark.parametrize("changes", [INPUT, WHOLE, WHOLE | {"gradient_checkpointing": "DEFAULT"}])
def test_a_text_is_what_stock_umt5_makes_of_its_ids(made: Made, changes: dict[str, Any]) -> None:
    wanted = stock(made[0])(torch.from_numpy(TEXT.ids_S.copy()).long()[None]).last_hidden_state[0]
    torch.testing.assert_close(encoder_of(made, config(made[0], **changes))(TEXT), wanted, rtol=1e-5, atol=1e-6)


def test_learned_vectors_are_rows_of_stock_umt5s_token_table(made: Made) -> None:
    """As if the tokenizer had tokens of its own for the concept."""
    encoder = encoder_of(made, config(made[0], **INPUT), double=True)
    rows_nd = torch.nn.Parameter(torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    ours = InputConcept(rows_nd, encoder)(TEXT)
    reference = stock(made[0]).double()
    reference.shared.weight.data[[500, 501]] = rows_nd.detach()
    ids = torch.tensor([[9, 500, 501, 30, 500, 501, 1]])
    assert ours is not None
    torch.testing.assert_close(ours, reference(ids).last_hidden_state[0], rtol=1e-12, atol=1e-12)
    torch.autograd.backward(ours.square().sum())
    torch.autograd.backward(reference(ids).last_hidden_state.square().sum())
    torch.testing.assert_close(rows_nd.grad, reference.shared.weight.grad[[500, 501]], rtol=1e-10, atol=1e-12)


def test_gradients_of_vectors_are_finite_differences(made: Made) -> None:
    encoder = encoder_of(made, config(made[0], **INPUT), double=True)
    rows_nd = first_rows([TEXT], config(made[0], **INPUT).embedding, 16, encoder.vectors).double().requires_grad_()
    assert torch.equal(rows_nd, encoder.table_Vd[[4, 5]])
    # UMT5's softmax is float32 whatever its inputs are, so that small differences drown
    small = {"eps": 1e-2, "atol": 2e-3, "rtol": 1e-2}
    assert torch.autograd.gradcheck(lambda rows: InputConcept(rows, encoder)(TEXT), [rows_nd], **small)  # type: ignore[arg-type]


def test_frozen_weights_are_stored_as_asked(made: Made) -> None:
    exact = encoder_of(made, config(made[0], **INPUT))(TEXT)
    for dtype, error in (("INT_8", 0.03), ("FLOAT_8", 0.06), ("NFLOAT_4", 0.3)):
        encoder = encoder_of(made, config(made[0], **INPUT, text_encoder={"weight_dtype": dtype}))
        linear = encoder.stack.block[0].layer[1].DenseReluDense.wo
        assert linear.codes.element_size() == 1
        found = (encoder(TEXT) - exact).norm() / exact.norm()
        assert 0 < found < error


def test_training_moves_the_encoder_and_exports_what_stock_code_loads(made: Made, tmp_path: Path) -> None:
    model, _, store = made
    run = make_run(tmp_path / "run", config(model, max_steps=2, warmup_steps=0, **WHOLE), store)
    start(run, finished=False)
    moved = {name.removeprefix(PREFIX): value for name, value in trained(run).items() if name.startswith(PREFIX)}
    before = stock(model).state_dict()
    assert len(moved) == len(before) - 2 and any(not torch.equal(value, before[name]) for name, value in moved.items())
    ours = encoder_of(made, run.config)
    ours.stack.load_state_dict({name.removeprefix("encoder."): value for name, value in moved.items()})
    exported = UMT5EncoderModel.from_pretrained(run.folder / "run" / "text_encoder").eval()
    ids = torch.from_numpy(TEXT.ids_S.copy()).long()[None]
    torch.testing.assert_close(exported(ids).last_hidden_state[0], ours(TEXT), rtol=1e-5, atol=1e-6)
    WanTransformer3DModel.from_pretrained(run.folder / "run" / "transformer")
    paths = export_run(run.folder, "SAFETENSORS", tmp_path / "out")
    assert [path.name for path in paths] == ["run-safetensors.safetensors", "run-safetensors_text_encoder.safetensors"]
    assert load_file(paths[1]).keys() == {"shared.weight", *moved}


@pytest.mark.parametrize("kind", ["OUTPUT", "INPUT"])
def test_samples_are_those_of_the_vectors_in_the_file(made: Made, tmp_path: Path, kind: str) -> None:
    model, spec, _ = made
    changes = INPUT | {"embedding": INPUT["embedding"] | {"kind": kind}, "output_dtype": "FLOAT_32"}
    settings = config(model, max_steps=3, embedding_learning_rate=1.0, warmup_steps=0, **changes)
    samples = [listed(number, spec, captions=(caption_key("a <zorb>"),)) for number in range(2)]
    store = make_store(tmp_path / "s.zarr", spec, samples, ("a <zorb>",), settings.embedding)
    run = make_run(tmp_path / "run", settings, store)
    start(run, finished=False)
    scene = replace(scene_of(settings, spec), prompts=("a <zorb>",), negative="", steps=3)
    made_again = sample_latents(run, scene, "weights")
    rows_nd = torch.nn.Parameter(
        load_file(run.folder / "run.safetensors")[{"OUTPUT": "embedding", "INPUT": "umt5xxl"}[kind]]
    )
    learned = torch.nn.Parameter(rows_nd)
    concept = OutputConcept(learned) if kind == "OUTPUT" else InputConcept(learned, load_encoder(spec, settings, CPU))
    bank = TextBank(load_model(spec, "single", settings, CPU), StoreReader([store]), concept)
    wanted, _ = sample_range(bank, spec, scene, "single", Start(first_noise(scene, spec), None))
    torch.testing.assert_close(made_again, wanted)
    assert not torch.allclose(made_again, sample_latents(run, scene, "base"), atol=1e-3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"text_encoder": {"train": True}}, "LORA leaves the text encoder"),
    (INPUT | {"text_encoder": {"train": True}}, "EMBEDDING leaves the text encoder"),
    (WHOLE | {"text_encoder": {"train": True, "weight_dtype": "INT_8"}}, "updates the weights"),
    (INPUT | {"output_model_format": "COMFY_LORA"}, "use SAFETENSORS"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(made: Made, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_mismatch(config(made[0], **changes), made[1])


def test_one_encoder_cannot_follow_two_experts(pair: Made) -> None:
    with pytest.raises(ConfigError, match="one after the other"):
        refuse_mismatch(config(pair[0], **WHOLE), pair[1])


@pytest.mark.parametrize("changes", [INPUT, INPUT | {"text_encoder": {"weight_dtype": "NFLOAT_4"}}, WHOLE])
def test_the_plan_counts_the_encoder_that_is_loaded(made: Made, changes: dict[str, Any]) -> None:
    settings = config(made[0], **changes)
    encoder, cost = load_encoder(made[1], settings, CPU), text_cost(made[1], settings)
    parts = [*encoder.stack.parameters(), *encoder.stack.buffers()]
    assert cost.weights == sum(part.nbytes for part in parts)
    assert cost.table == encoder.table_Vd.nbytes
    assert list(cost.trained) == ([part.shape for part in encoder.parameters().values()] if changes is WHOLE else [])


def test_the_plan_of_a_run_with_the_encoder_needs_more(made: Made) -> None:
    configs = [config(made[0], **INPUT | {"embedding": {"kind": kind}}) for kind in ("OUTPUT", "INPUT")]
    plans = [plan_memory(each, made[1], Bucket(9, 32, 32), Room(None)) for each in configs]
    assert plans[1].need > plans[0].need and plans[1].ram > plans[0].ram and plans[1].step_flops > plans[0].step_flops
