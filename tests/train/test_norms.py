"""The norm whose backward is written out, against torch's and against finite differences."""

import pytest
import torch
import torch.nn.functional as F

from train.norms import RmsNorm, rms_norm


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_are_those_of_finite_differences(trained: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=trained)
    assert torch.autograd.gradcheck(lambda *values: RmsNorm.apply(*values, 1e-2), (hidden, weight))


def test_a_wider_weight_computes_wide_and_answers_narrow() -> None:
    torch.manual_seed(0)
    norm, hidden = torch.nn.RMSNorm(64, eps=1e-6), torch.randn(2, 7, 64).bfloat16()
    norm.weight.data = torch.randn(64)
    expected = F.rms_norm(hidden.float(), (64,), norm.weight, norm.eps).bfloat16()
    torch.testing.assert_close(rms_norm(hidden, norm), expected)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 0)])
def test_it_is_torchs_norm_at_any_scale(dtype: torch.dtype, within: float) -> None:
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(64, eps=1e-6).to(dtype)
    norm.weight.data = torch.randn(64).to(dtype)
    for scale in (1e-4, 1.0, 1e4):
        hidden = (torch.randn(2, 7, 64) * scale).to(dtype)
        expected = F.rms_norm(hidden, (64,), norm.weight, norm.eps)
        torch.testing.assert_close(rms_norm(hidden, norm), expected, rtol=within, atol=within)
