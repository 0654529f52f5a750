"""The one-pass VAE equals diffusers' chunked one: both kinds, every number of frames, every chunk length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AvgDown3D,
    DupUp3D,
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
)
from torch import Tensor
from torch.testing import assert_close

from encode import vae as subject
from encode.vae import Trip, decode, denormalise, encode_mode, encode_moments, normalise
from shared.tiny_variants import VAE_21, VAE_22

WAN_21 = VAE_21 | {"z_dim": 4, "dim_mult": [1, 2, 2, 2],
                   "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 3.0]}  # fmt: skip
WAN_22 = VAE_22 | {"decoder_base_dim": 6, "z_dim": 6, "dim_mult": [1, 2, 4, 4],
                   "latents_mean": [0.1] * 6, "latents_std": [0.5] * 6}  # fmt: skip
KINDS = pytest.mark.parametrize("config", [WAN_21, WAN_22], ids=["wan21", "wan22"])
FRAMES = pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
CHUNKS = (None, 1, 2, 3)


def make_vae(config: dict[str, Any], dtype: torch.dtype) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**config).to(dtype).eval()


def make_video(frames: int, dtype: torch.dtype, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, 32, 48, generator=generator, dtype=dtype) * 2 - 1


@KINDS
@FRAMES
@torch.no_grad()
def test_encoding_in_any_chunks_equals_stock(config: dict[str, Any], frames: int) -> None:
    vae, video_BCTHW = make_vae(config, torch.float64), make_video(frames, torch.float64)
    expected = vae.encode(video_BCTHW).latent_dist.parameters
    for chunk in CHUNKS:
        assert_close(encode_moments(vae, video_BCTHW, chunk), expected, rtol=0, atol=1e-12)


@KINDS
@FRAMES
@torch.no_grad()
def test_decoding_in_any_chunks_equals_stock(config: dict[str, Any], frames: int) -> None:
    vae = make_vae(config, torch.float32)
    latent_BCthw = encode_mode(vae, make_video(frames, torch.float32))
    expected = vae.decode(denormalise(vae, latent_BCthw)).sample
    for chunk in CHUNKS:
        assert_close(decode(vae, latent_BCthw, chunk), expected, rtol=0, atol=1e-5)


@KINDS
@torch.no_grad()
def test_decoding_differs_in_float64_only_by_the_float32_cast_in_stock_upsampling(config: dict[str, Any]) -> None:
    vae = make_vae(config, torch.float64)
    latent_BCthw = encode_mode(vae, make_video(9, torch.float64))
    expected = vae.decode(denormalise(vae, latent_BCthw)).sample
    assert_close(decode(vae, latent_BCthw), expected, rtol=0, atol=1e-6)


@KINDS
def test_gradients_equal_those_of_stock(config: dict[str, Any]) -> None:
    vae, video_BCTHW = make_vae(config, torch.float64), make_video(5, torch.float64, batch=1)
    weights = [parameter for name, parameter in vae.named_parameters() if name.startswith(("encoder", "quant_conv"))]
    generator = torch.Generator().manual_seed(1)
    expected = vae.encode(video_BCTHW).latent_dist.parameters
    pull = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    stock = torch.autograd.grad((expected * pull).sum(), weights)
    ours = torch.autograd.grad((encode_moments(vae, video_BCTHW) * pull).sum(), weights)
    for left, right in zip(ours, stock, strict=True):
        assert_close(left, right, rtol=1e-9, atol=1e-9)


@KINDS
def test_decoder_gradients_reach_the_latents_as_in_stock(config: dict[str, Any]) -> None:
    vae = make_vae(config, torch.float32)
    latent_BCthw = encode_mode(vae, make_video(5, torch.float32, batch=1)).detach().requires_grad_()
    (stock,) = torch.autograd.grad(vae.decode(denormalise(vae, latent_BCthw)).sample.square().mean(), latent_BCthw)
    (ours,) = torch.autograd.grad(decode(vae, latent_BCthw).square().mean(), latent_BCthw)
    assert_close(ours, stock, rtol=1e-4, atol=1e-7)


@KINDS
@torch.no_grad()
def test_frames_beyond_4n_plus_1_are_ignored_as_in_stock(config: dict[str, Any]) -> None:
    vae, video_BCTHW = make_vae(config, torch.float64), make_video(7, torch.float64)
    expected = vae.encode(video_BCTHW).latent_dist.parameters
    assert_close(encode_moments(vae, video_BCTHW), expected, rtol=0, atol=1e-12)
    assert_close(encode_moments(vae, video_BCTHW[:, :, :5]), expected, rtol=0, atol=1e-12)


@KINDS
@torch.no_grad()
def test_a_shorter_clip_is_a_prefix_of_the_latents(config: dict[str, Any]) -> None:
    vae, video_BCTHW = make_vae(config, torch.float64), make_video(13, torch.float64)
    whole = encode_mode(vae, video_BCTHW)
    assert_close(encode_mode(vae, video_BCTHW[:, :, :5]), whole[:, :, :2], rtol=0, atol=1e-12)


@torch.no_grad()
def test_normalising_uses_each_channels_statistics_and_comes_back() -> None:
    vae = make_vae(WAN_21, torch.float64)
    mean_BCthw = vae.encode(make_video(5, torch.float64)).latent_dist.mode()
    latent_BCthw = normalise(vae, mean_BCthw)
    assert_close(latent_BCthw[:, 3], mean_BCthw[:, 3] / 3.0)
    assert_close(denormalise(vae, latent_BCthw), mean_BCthw)


@torch.no_grad()
def test_inputs_are_left_as_they_were() -> None:
    vae, video_BCTHW = make_vae(WAN_22, torch.float32), make_video(5, torch.float32)
    before = video_BCTHW.clone()
    latent_BCthw = encode_mode(vae, video_BCTHW)
    latent_before = latent_BCthw.clone()
    decode(vae, latent_BCthw)
    assert_close(video_BCTHW, before, rtol=0, atol=0)
    assert_close(latent_BCthw, latent_before, rtol=0, atol=0)


def features(frames: int, channels: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(2, channels, frames, 6, 8, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_identity_1_chunks_with_a_two_frame_history_are_one_causal_convolution() -> None:
    torch.manual_seed(0)
    conv, hidden = WanCausalConv3d(4, 5, 3, padding=1).double(), features(9)
    whole = conv(hidden)
    chunks = [conv(hidden[:, :, :1])]
    chunks += [conv(hidden[:, :, start : start + 4], hidden[:, :, max(0, start - 2) : start]) for start in (1, 5)]
    assert_close(torch.cat(chunks, 2), whole)
    assert_close(subject._causal_conv(hidden, conv, Trip()), whole)


@torch.no_grad()
def test_identity_2_temporal_downsampling_keeps_frame_0_and_convolves_all_frames() -> None:
    torch.manual_seed(0)
    layer, hidden = WanResample(4, mode="downsample3d").double(), features(9)
    cache: list[Any] = [None]
    stock = [layer(part, feat_cache=cache, feat_idx=[0]) for part in torch.split(hidden, [1, 4, 4], dim=2)]
    assert_close(subject._resample(hidden, layer, Trip()), torch.cat(stock, 2))


@torch.no_grad()
def test_identity_3_average_pooling_pads_in_front_so_groups_do_not_depend_on_chunks() -> None:
    layer, hidden = AvgDown3D(4, 8, factor_t=2, factor_s=2), features(9)
    chunks = [layer(part) for part in torch.split(hidden, [1, 4, 4], dim=2)]
    assert_close(layer(hidden), torch.cat(chunks, 2))


@torch.no_grad()
def test_identity_4_temporal_upsampling_passes_frame_0_by_and_starts_from_zeros() -> None:
    torch.manual_seed(0)
    layer, hidden = WanResample(4, mode="upsample3d", upsample_out_dim=4).double(), features(5)
    cache: list[Any] = [None]
    stock = [layer(frame, feat_cache=cache, feat_idx=[0]) for frame in torch.split(hidden, 1, dim=2)]
    assert_close(subject._resample(hidden, layer, Trip()), torch.cat(stock, 2), rtol=0, atol=1e-6)


@torch.no_grad()
def test_identity_5_duplication_drops_leading_frames_once_per_clip() -> None:
    layer, hidden = DupUp3D(4, 4, factor_t=2, factor_s=2), features(5)
    chunks = [layer(frame, first_chunk=index == 0) for index, frame in enumerate(torch.split(hidden, 1, dim=2))]
    assert_close(layer(hidden, first_chunk=True), torch.cat(chunks, 2))


@torch.no_grad()
def test_time_convolutions_are_products_over_three_frames_channels() -> None:
    torch.manual_seed(0)
    conv, hidden = WanCausalConv3d(4, 5, (3, 1, 1)).double(), features(9)
    for stride in (1, 2):
        expected = torch.nn.functional.conv3d(hidden, conv.weight, conv.bias, stride=(stride, 1, 1))
        assert_close(subject._time_conv(hidden, conv, stride), expected)


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("history", [False, True])
@torch.no_grad()
def test_one_convolution_in_the_plane_per_tap_adds_up(frames: int, history: bool) -> None:
    torch.manual_seed(0)
    conv, hidden = WanCausalConv3d(4, 5, 3, padding=1).double(), features(frames + 2)
    past, hidden = (hidden[:, :, :2], hidden[:, :, 2:]) if history else (None, hidden)
    assert_close(subject._plane_convs(hidden, past, conv), conv(hidden, past))


@torch.no_grad()
def test_the_norm_in_blocks_is_that_of_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    norm = WanRMS_norm(4, images=False).double()
    torch.nn.init.uniform_(norm.gamma)
    for values in (1, 100, 2**17):
        monkeypatch.setattr(subject, "NORM_VALUES", values)
        assert_close(subject._norm(features(5), norm), norm(features(5)))
        assert_close(subject._norm_silu(features(5), norm), torch.nn.functional.silu(norm(features(5))))


@KINDS
@torch.no_grad()
def test_bfloat16_is_no_farther_from_float32_than_stock(config: dict[str, Any]) -> None:
    config = config | {"base_dim": 32}
    vae = make_vae(config, torch.float32)
    half = AutoencoderKLWan(**config).bfloat16().eval()
    half.load_state_dict(vae.state_dict())
    vae.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    video_BCTHW = make_video(9, torch.bfloat16)
    exact = vae.encode(video_BCTHW.float()).latent_dist.parameters
    stock = (half.encode(video_BCTHW).latent_dist.parameters - exact).norm()
    for chunk in (None, 1):
        assert (encode_moments(half, video_BCTHW, chunk, "winograd") - exact).norm() <= stock
