"""Winograd's convolution is the layer's: equal in float32 to rounding, for any size, history and number of taps."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from encode.vae import decode, encode_mode
from encode.winograd import _TIME_WEIGHT, CONSTANT, OUTPUT_16_36, causal_conv, fits, transformed_weight
from shared.tiny_variants import VAE_21, VAE_22

LIMIT = 2e-5  # relative, of one layer in float32
WIDE_21 = VAE_21 | {"base_dim": 48}
WIDE_22 = VAE_22 | {"base_dim": 48, "decoder_base_dim": 48}


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


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, hidden = random_layer(3), torch.randn(1, 48, 3, 40, 36)
    with torch.no_grad():
        monkeypatch.setattr("encode.winograd.TILES_PER_CHANNEL", 1000)
        whole = causal_conv(hidden, None, conv)
        monkeypatch.setattr("encode.winograd.TILES_PER_CHANNEL", 0)
        torch.testing.assert_close(causal_conv(hidden, None, conv), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 8, 8), (4, 13, 18), (5, 40, 36)], ids=str)
@pytest.mark.parametrize("history", [False, True])
def test_norm_and_silu_on_the_way_are_those_in_front(size: tuple[int, int, int], history: bool) -> None:
    conv, gain = random_layer(3), torch.rand(48) + 0.5
    hidden, past = torch.randn(2, 48, *size), torch.randn(2, 48, 2, *size[1:]) if history else None

    def ahead(frames: Tensor) -> Tensor:
        return F.silu(F.normalize(frames.double(), dim=1) * gain.double().view(-1, 1, 1, 1))

    with torch.no_grad():
        ours = causal_conv(hidden, past, conv, gain)
        expected = direct(ahead(hidden), None if past is None else ahead(past), conv)
    assert ((ours - expected).norm() / expected.norm()).item() < LIMIT


@torch.no_grad()
def test_two_frames_share_four_products_in_time() -> None:
    generator = torch.manual_seed(0)
    taps, frames = torch.randn(3, generator=generator), torch.randn(4, generator=generator)
    direct_pair = torch.stack([taps @ frames[:3], taps @ frames[1:]])
    seen = torch.stack([frames[0] - frames[2], frames[1] + frames[2], frames[2] - frames[1], frames[3] - frames[1]])
    first, plus, minus, last = (_TIME_WEIGHT.float() @ taps) * seen
    torch.testing.assert_close(torch.stack([first + plus + minus, plus - minus + last]), direct_pair)


def test_a_constant_is_one_of_the_36_values() -> None:
    row = torch.zeros(36)
    row[CONSTANT] = 1.0
    torch.testing.assert_close(OUTPUT_16_36 @ row, torch.ones(16))


@torch.no_grad()
def test_half_precision_layers_are_computed_in_float32() -> None:
    conv, hidden = random_layer(3).bfloat16(), torch.randn(1, 48, 3, 16, 16).bfloat16()
    expected = direct(hidden, None, conv)
    ours, stock = causal_conv(hidden, None, conv), F.conv3d(F.pad(hidden, (0, 0, 0, 0, 2, 0)), conv.weight, conv.bias,
                                                            padding=(0, 1, 1))  # fmt: skip
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).norm() <= 1.01 * (stock - expected).norm()


def test_weights_that_would_fill_memory_are_not_transformed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("encode.winograd.SHARE_OF_FREE", 0.0)
    with torch.no_grad():
        assert not fits(torch.zeros(1, 48, 2, 8, 8), random_layer(3))


def test_changed_weights_are_transformed_again() -> None:
    conv, hidden = random_layer(3), torch.randn(1, 48, 2, 8, 8)
    with torch.no_grad():
        before = causal_conv(hidden, None, conv)
        assert transformed_weight(conv) is transformed_weight(conv)
        conv.weight.mul_(2)
        after = causal_conv(hidden, None, conv)
    bias = conv.bias.view(1, -1, 1, 1, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(after - bias, 2 * (before - bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bf16", "amx", "least"),
    [(False, False, (48, 64)), (True, False, (192, 512)), (True, True, (2**31, 2**31))], ids=str,
)  # fmt: skip
def test_it_is_for_wide_layers_that_the_processor_does_not_multiply_faster(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, amx: bool, least: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    with torch.no_grad():
        for dtype, (channels_least, pixels_least) in ((torch.float32, (48, 64)), (torch.bfloat16, least)):
            for channels, (height, width) in itertools.product((12, 48, 192), ((8, 7), (8, 8), (16, 31), (16, 32))):
                conv = random_layer(3, channels).to(dtype)
                wanted = channels >= channels_least and height * width >= pixels_least
                for frames in (1, 40):  # passes of one clip are alike
                    assert fits(torch.zeros(1, channels, frames, height, width, dtype=dtype), conv) == wanted
        assert not fits(torch.zeros(1, 48, 2, 8, 8, dtype=torch.float64), random_layer(3).double())
    assert not fits(torch.zeros(1, 48, 2, 8, 8), random_layer(3))  # gradients


@torch.no_grad()
@pytest.mark.parametrize("config", [WIDE_21, WIDE_22], ids=["2.1", "2.2"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_whole_encode_and_decode_stay_near_stock(config: dict[str, Any], chunk: int | None) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config).eval()
    video_BCTHW = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    stock = (vae.encode(video_BCTHW).latent_dist.mode() - mean) / std
    ours = encode_mode(vae, video_BCTHW, chunk, "winograd")
    assert ((ours - stock).norm() / stock.norm()).item() <= 5e-5
    assert not torch.equal(ours, encode_mode(vae, video_BCTHW, chunk))  # it was used
    pixels = vae.decode(stock * std + mean).sample
    decoded = decode(vae, stock, chunk, kind="winograd")
    assert ((decoded - pixels).norm() / pixels.norm()).item() <= 5e-5
