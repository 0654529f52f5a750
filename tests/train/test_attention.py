"""Laws of attention backends: the dispatcher changes nothing; what is missing, or has no gradients, is refused."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from shared.config import Config
from shared.errors import ConfigError
from tests.train.test_lean import lean_output, make_case, trained
from train import attention
from train.attention import NATIVE, choose
from train.lean import LeanOptions

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("backend", ["_native_math"])
@pytest.mark.parametrize("temporal", [True, False])
def test_through_the_dispatcher_output_and_gradients_are_the_same(backend: str, temporal: bool) -> None:
    case = make_case("ti2v", torch.float32, lora={})
    outputs = [
        lean_output(case, LeanOptions(attention=name, temporal_attention=temporal)) for name in (NATIVE, backend)
    ]
    assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    ours, theirs = (torch.autograd.grad(output.square().mean(), list(trained(case))) for output in outputs)
    for left, right in zip(ours, theirs, strict=True):
        assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"attention": "SAGE"}, GPU, "attention=SAGE: .*no gradients"),
        ({"attention": "FLASH"}, GPU, "flash_attn is not installed; pip install flash-attn"),
        ({"attention": "XFORMERS"}, GPU, "xformers is not installed; pip install xformers"),
        ({"attention": "FLASH", "train_dtype": "FLOAT_32"}, GPU, "16 bits; set train_dtype=BFLOAT_16"),
        ({"attention": "FLEX"}, GPU, "give compile=true"),
        ({"attention": "FLASH"}, CPU, "GPU only"),
        ({"attention": "FLEX", "compile": True}, CPU, "GPU only"),
    ],
    ids=str,
)
def test_what_is_missing_or_cannot_train_is_refused_by_name(
    changes: dict[str, Any], device: torch.device, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "installed", lambda package: package == "torch")
    with pytest.raises(ConfigError, match=message):
        choose(Config(**changes), device)


def test_the_choice_follows_what_is_asked_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(Config(), CPU) == choose(Config(attention="SDPA"), CPU) == (NATIVE, "attention: torch SDPA")
    monkeypatch.setattr(attention, "installed", lambda package: package == "flash_attn")
    assert choose(Config(), GPU).name == NATIVE  # SDPA has FlashAttention 2 inside
    assert choose(Config(attention="FLASH"), GPU).said == "attention: FlashAttention 2"
    monkeypatch.setattr(attention, "installed", lambda package: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose(Config(), GPU).said == choose(Config(attention="FLASH"), GPU).said == "attention: FlashAttention 3"
    assert choose(Config(train_dtype="FLOAT_32"), GPU).name == NATIVE
    assert choose(Config(attention="XFORMERS"), GPU).name == "xformers"
    assert choose(Config(attention="FLEX", compile=True), GPU).name == "flex"
