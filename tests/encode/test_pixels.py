"""Frames read from shards against BT.709 written out in float64."""

import io

import av
import numpy as np
import pytest

from encode.pixels import decode_video

KR, KB = 0.2126, 0.0722  # ITU-R BT.709


@pytest.mark.parametrize("seed", range(4))
def test_frames_are_bt709_rounded_not_cut_off(seed: int) -> None:
    """Every luma of the legal range under a random flat chroma: within rounding of the formula, without a bias."""
    rng = np.random.default_rng(seed)
    luma = np.tile(np.linspace(16, 235, 64).round(), (64, 1))
    chroma = rng.integers(112, 145, 2)
    planes = np.stack([luma, *(np.full_like(luma, value) for value in chroma)]).astype(np.uint8)
    (frame,) = decode_video(lossless(planes)).astype(float)
    bright, blue, red = (luma - 16) / 219, *((chroma - 128.0) / 224)
    r, b = bright + 2 * (1 - KR) * red, bright + 2 * (1 - KB) * blue
    g = (bright - KR * r - KB * b) / (1 - KR - KB)
    difference = frame - np.clip(np.stack([r, g, b], axis=-1) * 255, 0, 255)
    assert np.abs(difference).max() <= 1
    assert abs(difference.mean()) < 0.25


def lossless(planes: np.ndarray) -> bytes:
    """One frame of Y, Cb, Cr as an H.264 file without loss, tagged as ingest tags its shards."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.height, stream.width = planes.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        stream.codec_context.color_range = 1
        stacked = np.concatenate([planes[0].ravel(), planes[1][::2, ::2].ravel(), planes[2][::2, ::2].ravel()])
        frame = av.VideoFrame.from_ndarray(stacked.reshape(-1, planes.shape[2]), format="yuv420p")
        frame.colorspace, frame.color_range = 1, 1
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    return file.getvalue()
