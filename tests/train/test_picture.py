"""A video that starts from a picture is what stock diffusers makes of it, for both ways in which Wan takes one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image

from encode.picture import bucket_of
from shared.bucket import Bucket
from shared.errors import RunError
from shared.keys import caption_key
from shared.models import ModelSpec, model_spec
from shared.store_read import StoreReader
from tests.train.make import config, listed, make_run, make_store
from train.run import Run, start_folder
from train.sample import Scene, encode_pictures, first_noise, sigma_grid
from train.session import sample_latents, wished_scene

WISH = {"prompts": (), "size": None, "guidance": None, "negative": None, "seed": None, "steps": None}


class OurGrid(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
    """diffusers' Euler steps at our sigmas."""

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=sigma_grid(steps, 1.0)[:-1], device=device)


def picture(folder: Path, width: int, height: int) -> Path:
    """A colourful PNG."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * rows / height, 255 * columns / width, 128 + 127 * np.sin(rows / 5)], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "picture.png")
    return folder / "picture.png"


def run_of(name: str, folder: Path, resolution: str) -> Run:
    """A run that was started, of a tiny model, with one sample."""
    spec = model_spec(name)
    width, height = map(int, resolution.split("x"))
    store = make_store(folder / "s.zarr", spec, [listed(0, spec, (9, height, width))], ("a prompt",))
    settings = config(Path(name), resolution=resolution, sample_prompts=["a prompt"], sample_steps=4,
                      first_frame_conditioning_probability=0.0)  # fmt: skip
    run = make_run(folder / "run", settings, store)
    start_folder(run, "data")
    return run


def stock_video(spec: ModelSpec, scene: Scene, store: Path, image: Path) -> torch.Tensor:
    """Latents of the stock pipeline, from the same noise and text embeddings."""
    folder, reader = Path(spec.repo), StoreReader([store])
    parts = {"transformer": WanTransformer3DModel.from_pretrained(folder / "transformer"),
             "vae": AutoencoderKLWan.from_pretrained(folder / "vae")}  # fmt: skip
    pipeline = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, scheduler=OurGrid(), **parts,
                                       expand_timesteps=spec.image_condition == "first_frame")  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    rows = [torch.from_numpy(reader.text(caption_key(text)).embedding_Sd.copy()).float() for text in scene.texts]
    wanted, unwanted = (torch.cat([row, row.new_zeros(512 - len(row), row.shape[1])])[None] for row in rows)
    size = scene.bucket
    return pipeline(
        Image.open(image), prompt_embeds=wanted, negative_prompt_embeds=unwanted, latents=first_noise(scene, spec),
        height=size.height, width=size.width, num_frames=size.num_frames, num_inference_steps=scene.steps,
        guidance_scale=scene.guidance[0], output_type="latent",
    ).frames[0]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "resolution", "size"), [("tiny-i2v", "64x48", "64x48x9"), ("tiny-ti2v", "64x96", None)]
)
def test_a_video_from_a_picture_is_that_of_the_stock_pipeline(
    name: str, resolution: str, size: str | None, tmp_path: Path
) -> None:
    run = run_of(name, tmp_path, resolution)
    width, height = map(int, resolution.split("x"))
    image = picture(tmp_path, width, height)
    pictures = encode_pictures([image], size, run)
    scene = wished_scene(run, WISH, pictures)
    assert scene.bucket == pictures.bucket == Bucket(9, height, width)
    (ours,) = sample_latents(run, scene, "base", pictures)
    stock = stock_video(run.spec, scene, run.stores[0], image)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3)
    (plain,) = first_noise(scene, run.spec)
    assert (ours - plain).abs().max() > 0.1 and (stock - ours).abs().mean() < 1e-4


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    run = run_of("tiny-ti2v", tmp_path, "64x96")
    (tmp_path / "bad.png").write_text("no picture")
    for name, reason in (("bad.png", "not a picture"), ("none.png", "no such file")):
        with pytest.raises(RunError, match=rf"^IMAGE=.*{name}: {reason}"):
            encode_pictures([tmp_path / name], None, run)


def test_a_picture_gets_the_size_of_a_clip_of_its_shape() -> None:
    settings, spec = config(Path("tiny"), resolution="64"), model_spec("tiny")
    assert bucket_of(Image.new("RGB", (200, 100)), settings, spec) == Bucket(9, 48, 80)
    assert bucket_of(Image.new("RGB", (100, 200)), settings, spec) == Bucket(9, 96, 48)


def test_a_model_without_pictures_refuses_them(tmp_path: Path) -> None:
    run = run_of("tiny", tmp_path, "64x64")
    with pytest.raises(RunError, match=r"tiny starts from no picture; leave IMAGE out"):
        encode_pictures([tmp_path / "any.png"], None, run)
