"""Winograd's convolution is the layer's: equal in float32 to rounding, for any size, history and number of taps."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from encode.vae import decode, encode_mode
from encode.winograd import causal_conv, fits, transformed_weight

LIMIT = 2e-5  # relative, of one layer in float32
WIDE_21: dict[str, Any] = {"base_dim": 48, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WIDE_22: dict[str, Any] = WIDE_21 | {
    "decoder_base_dim": 48, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}  # fmt: skip


def direct(hidden: Tensor, past: Tensor | None, conv: torch.nn.Conv3d) -> Tensor:
    """The layer in float64."""
    depth = conv.kernel_size[0] - 1
    front = hidden.new_zeros(*hidden.shape[:2], depth, *hidden.shape[3:]) if past is None else past
    padded = torch.cat([front, hidden], 2).double()
    return F.conv3d(padded, conv.weight.double(), conv.bias.double(), padding=(0, 1, 1))  # type: ignore[union-attr]


def random_layer(taps: int, channels: int = 48, out: int = 52) -> torch.nn.Conv3d:
    torch.manual_seed(0)
    return torch.nn.Conv3d(channels, out, (taps, 3, 3)).requires_grad_(False)


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 9, 11), (5, 16, 12), (4, 13, 7)], ids=str)
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("history", [False, True])
def test_it_equals_the_direct_convolution(size: tuple[int, int, int], taps: int, history: bool) -> None:
    conv = random_layer(taps)
    hidden = torch.randn(2, 48, *size)
    past = torch.randn(2, 48, taps - 1, *size[1:]) if history and taps > 1 else None
    with torch.no_grad():
        ours, expected = causal_conv(hidden, past, conv), direct(hidden, past, conv)
    assert ours.shape == expected.shape
    assert ((ours - expected).norm() / expected.norm()).item() < LIMIT


def test_slabs_of_any_height_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, hidden = random_layer(3), torch.randn(1, 48, 3, 40, 16)
    with torch.no_grad():
        whole = causal_conv(hidden, None, conv)
        monkeypatch.setattr("encode.winograd.SLAB_BYTES", 1)
        torch.testing.assert_close(causal_conv(hidden, None, conv), whole, rtol=1e-5, atol=1e-5)


def test_changed_weights_are_transformed_again() -> None:
    conv, hidden = random_layer(3), torch.randn(1, 48, 2, 8, 8)
    with torch.no_grad():
        before = causal_conv(hidden, None, conv)
        assert transformed_weight(conv) is transformed_weight(conv)
        conv.weight.mul_(2)
        after = causal_conv(hidden, None, conv)
    bias = conv.bias.view(1, -1, 1, 1, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(after - bias, 2 * (before - bias), rtol=1e-4, atol=1e-4)


def test_it_is_for_wide_float32_layers_without_gradients() -> None:
    conv, hidden = random_layer(3), torch.zeros(1, 48, 2, 8, 8)
    with torch.no_grad():
        assert fits(hidden, conv)
        assert not fits(hidden.bfloat16(), conv)
        assert not fits(hidden[..., :4], conv)
        assert not fits(torch.zeros(1, 12, 2, 64, 64), random_layer(3, 12))
    assert not fits(hidden, conv)


@torch.no_grad()
@pytest.mark.parametrize("config", [WIDE_21, WIDE_22], ids=["2.1", "2.2"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_whole_encode_and_decode_stay_near_stock(config: dict[str, Any], chunk: int | None) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config).eval()
    video_BCTHW = torch.rand(1, 3, 9, 64, 96) * 2 - 1
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    stock = (vae.encode(video_BCTHW).latent_dist.mode() - mean) / std
    ours = encode_mode(vae, video_BCTHW, chunk, "winograd")
    assert ((ours - stock).norm() / stock.norm()).item() <= 5e-5
    assert not torch.equal(ours, encode_mode(vae, video_BCTHW, chunk))  # it was used
    pixels = vae.decode(stock * std + mean).sample
    decoded = decode(vae, stock, chunk, kind="winograd")
    assert ((decoded - pixels).norm() / pixels.norm()).item() <= 5e-5
