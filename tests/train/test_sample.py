"""Previews are what Wan's sampler gives; experts hand over at the boundary; the decoder is another process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors import safe_open

from shared.bucket import Bucket, parse_bucket
from shared.keys import caption_key
from shared.models import ModelSpec
from shared.store_read import StoreReader
from tests.train.make import config, events, make_run
from train.model import TextBank, load_model
from train.run import open_run
from train.sample import Scene, Start, first_noise, read_latents, sample_range, scene_of, sigma_grid, write_latents
from train.session import sample_latents, start

Made = tuple[Path, ModelSpec, Path]
CPU = torch.device("cpu")
SCENE = Scene(("a prompt", "another"), "", Bucket(9, 32, 32), seed=3, steps=5, guidance=(3.0, 2.0))


@torch.no_grad()
def stock_sampler(folder: Path, spec: ModelSpec, reader: StoreReader, prompt: str, noise: torch.Tensor) -> torch.Tensor:
    """diffusers' Euler scheduler and transformers, with the pipeline's guidance and choice of expert."""
    parts = [WanTransformer3DModel.from_pretrained(folder / part) for part in dict(spec.expert_folders).values()]
    scheduler = FlowMatchEulerDiscreteScheduler()
    # the shift is ours: set_timesteps would shift the ends of its own table a second time
    scheduler.set_timesteps(sigmas=sigma_grid(SCENE.steps, spec.sample_shift)[:-1])
    texts = []
    for text in (prompt, SCENE.negative):
        rows = torch.from_numpy(reader.text(caption_key(text)).embedding_Sd.copy()).float()
        texts.append(torch.cat([rows, rows.new_zeros(512 - len(rows), rows.shape[1])])[None])
    state = noise[None]
    for timestep in scheduler.timesteps:
        low = spec.boundary is not None and timestep < 1000 * spec.boundary
        wanted, unwanted = (parts[low](state, timestep[None], text).sample for text in texts)
        scale = SCENE.guidance[0] if spec.boundary is not None and not low else SCENE.guidance[1]
        state = scheduler.step(unwanted + scale * (wanted - unwanted), timestep, state, return_dict=False)[0]
    return state[0]


@pytest.mark.parametrize("kind", ["mixed", "pair"])
def test_samples_are_those_of_the_stock_sampler(kind: str, request: pytest.FixtureRequest) -> None:
    folder, spec, _ = request.getfixturevalue(kind)
    reader = StoreReader([request.getfixturevalue("mixed")[2]])
    state = first_noise(SCENE, spec)
    for expert in spec.experts:
        model = load_model(spec, expert, config(folder), CPU)
        state, clean = sample_range(TextBank(model, reader), spec, SCENE, expert, Start(state, None))
    torch.testing.assert_close(state, clean, rtol=1e-4, atol=1e-4)  # the last step ends in the prediction
    for prompt, noise, latent in zip(SCENE.prompts, first_noise(SCENE, spec), state, strict=True):
        torch.testing.assert_close(latent, stock_sampler(folder, spec, reader, prompt, noise), rtol=2e-4, atol=2e-4)


def test_a_prompts_noise_does_not_depend_on_the_others(single: Made) -> None:
    one = replace(SCENE, prompts=SCENE.prompts[:1])
    assert torch.equal(first_noise(one, single[1])[0], first_noise(SCENE, single[1])[0])
    assert not torch.equal(first_noise(replace(SCENE, seed=4), single[1]), first_noise(SCENE, single[1]))


def test_guidance_1_asks_for_no_negative_prompt(mixed: Made) -> None:
    folder, spec, store = mixed
    scene = replace(SCENE, guidance=(1.0, 1.0), negative="never embedded")
    bank = TextBank(load_model(spec, "single", config(folder), CPU), StoreReader([store]))
    sample_range(bank, spec, scene, "single", Start(first_noise(scene, spec), None))
    assert caption_key("never embedded") not in bank.known


def test_latents_keep_their_prompts(single: Made, tmp_path: Path) -> None:
    latents = torch.randn(12, 16, 3, 4, 4)
    path = tmp_path / "deep" / "a.safetensors"
    write_latents(path, latents, [f"prompt {number}" for number in range(12)], single[1], config(single[0]))
    assert torch.equal(read_latents(path), latents)
    with safe_open(path, "pt") as file:
        assert file.metadata()["labels"].startswith('["prompt 0", "prompt 1"')


def test_a_run_samples_before_and_after_and_outlives_its_decoders(mixed: Made, tmp_path: Path, capfd: Any) -> None:
    """The made model has no VAE weights, so every decoder fails: the run ends well and keeps the latents."""
    folder, spec, store = mixed
    wish: dict[str, Any] = {"sample_prompts": ["a prompt"], "sample_steps": 2, "learning_rate": 0.1, "max_steps": 3}
    run = make_run(tmp_path / "run", config(folder, resolution="32x32,48x32", **wish), store)
    start(run, finished=False)
    before, after = (read_latents(run.folder / "samples" / f"{name}.safetensors") for name in ("before", "after"))
    assert before.shape == (1, *spec.latent_shape(9, 32, 32)) and not torch.equal(before, after)
    files = [row["file"] for row in events(run) if row["event"] == "preview"]
    assert files == ["samples/before.safetensors", "samples/after.safetensors"]
    assert capfd.readouterr().err.count("could not be decoded") == 2 and (run.folder / "done").exists()
    scene = scene_of(run.config, spec)
    torch.testing.assert_close(sample_latents(open_run(run.folder), scene, "weights"), after)
    torch.testing.assert_close(sample_latents(open_run(run.folder), scene, "base"), before)


def test_scenes_follow_the_config_and_sizes_the_grid(single: Made) -> None:
    wish = {"sample_guidance_scale": 4.5, "sample_steps": 7, "sample_seed": 9, "sample_negative_prompt": "blurred"}
    scene = scene_of(config(single[0], **wish), single[1])
    assert (scene.guidance, scene.steps, scene.seed, scene.bucket) == ((4.5, 4.5), 7, 9, Bucket(9, 32, 32))
    assert scene.negative == "blurred"
    assert parse_bucket("100x50x8", 16) == Bucket(9, 48, 96)
    with pytest.raises(Exception, match="832x480x81"):
        parse_bucket("100x50", 16)
