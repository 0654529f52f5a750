"""The picture that a video starts from: cropped to the video's size and encoded as the model's condition.

Input: picture files. Output: per picture, for i2v (concat) the latents of a clip of the picture followed by grey, for
ti2v (first_frame) those of the picture alone: diffusers pipeline_wan_i2v.py `prepare_latents`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.bucket import Bucket
from shared.config import Config
from shared.errors import DatasetError, ModelError
from shared.geometry import geometry
from shared.models import ModelSpec


def open_picture(path: Path) -> Image.Image:
    """A picture as it is meant to be seen, RGB; raises DatasetError when the file is none."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a picture that can be read"
        raise DatasetError(f"IMAGE={path}: {reason}; give a PNG, JPEG or WebP file") from None


def bucket_of(picture: Image.Image, config: Config, spec: ModelSpec) -> Bucket:
    """Size of the video that a picture starts, by the rule that gives a clip of its shape its size."""
    wanted = geometry(config, spec)
    return wanted.bucket(picture.height, picture.width, wanted.resolutions[0])


def encode_pictures(vae: Any, spec: ModelSpec, pictures: Sequence[Image.Image], bucket: Bucket) -> list[Any]:
    """Condition latents (C, t, h, w) of each picture, scaled to cover the bucket and cropped to its centre."""
    import torch

    from encode.budget import choose_effort, encode_within_memory
    from encode.worker import to_video

    if spec.image_condition == "none":
        raise ModelError(f"{spec.name} starts from no picture; leave IMAGE out, or train ti2v-5b or i2v-a14b")
    latents = []
    for picture in pictures:
        fitted = ImageOps.fit(picture, (bucket.width, bucket.height), Image.Resampling.LANCZOS)
        frame_BTHWC = torch.from_numpy(np.array(fitted))[None, None]
        video_BCTHW = to_video(frame_BTHWC, vae.dtype, vae.device)
        if spec.image_condition == "concat":
            grey = video_BCTHW.new_zeros(1, 3, bucket.num_frames - 1, bucket.height, bucket.width)
            video_BCTHW = torch.cat([video_BCTHW, grey], 2)
        latent_BCthw, _ = encode_within_memory(vae, video_BCTHW, choose_effort(vae, bucket, vae.device))
        latents.append(latent_BCthw[0].float().cpu().contiguous())
    return latents
