"""Encoding a work folder: what is stored, what is encoded again and why, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from encode.__main__ import encode
from encode.budget import Effort
from encode.pixels import read_samples
from encode.plan import Part
from encode.recipe import recipes
from shared.concept import text_key
from shared.errors import ConfigError, DatasetError, ModelError, StoreError
from shared.keys import caption_key
from shared.resolve import Choice, Resolved, resolve
from shared.shards import Index, read_index, shard_folder, write_index
from shared.store import read_datasets, read_markers
from shared.store_read import StoreReader, fresh_units
from shared.tiny_variants import VAE_22
from shared.weights import load_vae
from tests.encode.make import add_shard, index_of, nano_model

NEGATIVE, PROMPT = "blurry, static", "a square rolls"
SAID = f'sample_negative_prompt="{NEGATIVE}" sample_prompts=["{PROMPT}"]'


def settings(model: Path, more: str = "") -> Resolved:
    return resolve(Choice(preset="demo", model=str(model), set=f"{SAID} {more}"))


def run(work: Path, model: Path, more: str = "", part: str = "") -> Path:
    store = work / "latents.zarr"
    encode(work, store, Part.parse(part), settings(model, more))
    return store


def made(store: Path, before: set[str]) -> list[Any]:
    """Units that were not there before."""
    return [marker for marker in read_markers(store) if marker.id not in before]


def ids(store: Path) -> set[str]:
    return {marker.id for marker in read_markers(store)}


def stock_latent(model: Path, frames_THWC: NDArray[np.uint8]) -> torch.Tensor:
    """Posterior mode of diffusers' own encode, normalised, float64."""
    vae = load_vae(settings(model).spec, torch.float64)
    video_BCTHW = torch.tensor(frames_THWC).permute(3, 0, 1, 2)[None].double() / 127.5 - 1
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        return (vae.encode(video_BCTHW).latent_dist.mode()[0] - mean) / std


def frames_of(work: Path, index: Index) -> dict[str, NDArray[np.uint8]]:
    found = {}
    for shard in index.shards:
        of_shard = [sample for sample in index.samples if sample.shard == shard.name]
        found |= {sample.key: frames for sample, frames in read_samples(shard_folder(work) / shard.name, of_shard)}
    return found


def test_every_sample_is_stock_diffusers_latent(work: Path, model: Path) -> None:
    reader = StoreReader([run(work, model)])
    for key, frames_THWC in frames_of(work, read_index(work)).items():
        latent = torch.tensor(reader.latent(key)).double()
        assert latent.shape[1] == 1 + (len(frames_THWC) - 1) // 4
        torch.testing.assert_close(latent, stock_latent(model, frames_THWC), rtol=2e-3, atol=2e-3)


def test_the_wan22_kind_is_encoded_too(tmp_path: Path) -> None:
    model = nano_model(tmp_path / "model", VAE_22)
    index = index_of(tmp_path, [add_shard(tmp_path, "a.tar", (1, 2), size=(9, 64, 32))])
    reader = StoreReader([run(tmp_path, model)])
    for key, frames_THWC in frames_of(tmp_path, index).items():
        latent = torch.tensor(reader.latent(key)).double()
        torch.testing.assert_close(latent, stock_latent(model, frames_THWC), rtol=2e-3, atol=2e-3)


def test_condition_latents_are_those_of_the_first_frame_then_grey(tmp_path: Path) -> None:
    model = nano_model(tmp_path / "model", in_channels=36)
    index = index_of(tmp_path, [add_shard(tmp_path, "a.tar", (1, 2), size=(9, 32, 32))])
    reader = StoreReader([run(tmp_path, model)])
    vae = load_vae(settings(model).spec, torch.float64)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    for key, frames_THWC in frames_of(tmp_path, index).items():
        video_BCTHW = torch.zeros(1, 3, *frames_THWC.shape[:3], dtype=torch.float64)
        video_BCTHW[0, :, 0] = torch.from_numpy(frames_THWC[0]).permute(2, 0, 1).double() / 127.5 - 1
        with torch.no_grad():
            expected = (vae.encode(video_BCTHW).latent_dist.mode()[0] - mean) / std
        cond = torch.tensor(reader.latent(key, "cond")).double()
        torch.testing.assert_close(cond, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(cond[:, 0], torch.tensor(reader.latent(key)).double()[:, 0], rtol=2e-3, atol=2e-3)


def test_every_text_that_training_or_sampling_needs_is_there(work: Path, model: Path) -> None:
    reader = StoreReader([run(work, model)])
    wanted = {caption for sample in read_index(work).samples for caption in sample.captions}
    for text in wanted | {"", NEGATIVE, PROMPT}:
        assert len(reader.text(caption_key(text)).ids_S) == len(reader.text(caption_key(text)).embedding_Sd) >= 1
    assert len(reader.texts) == len(wanted) + 3


def test_nothing_is_done_twice(work: Path, model: Path) -> None:
    store = run(work, model)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.json") if path.parent.name == "units"}
    bytes_before = (store / "datasets/testset.json").read_bytes()
    run(work, model)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*.json") if path.parent.name == "units"} == before
    assert (store / "datasets/testset.json").read_bytes() == bytes_before


def test_new_clips_alone_are_encoded(work: Path, model: Path) -> None:
    store, index = run(work, model), read_index(work)
    before = ids(store)
    shard, samples = add_shard(work, "d.tar", (20, 21, 22))
    write_index(work, index.model_copy(update={"shards": (*index.shards, shard),
                                               "samples": (*index.samples, *samples)}))  # fmt: skip
    run(work, model)
    rows = [key for marker in made(store, before) for key in marker.rows]
    assert sorted(rows) == sorted(sample.key for sample in samples)


def test_an_edited_caption_costs_one_caption_and_no_latent(work: Path, model: Path) -> None:
    store, index = run(work, model), read_index(work)
    before, edited = ids(store), index.samples[0].model_copy(update={"captions": ("a square, seen anew",)})
    write_index(work, index.model_copy(update={"samples": (edited, *index.samples[1:])}))
    run(work, model)
    (unit,) = made(store, before)
    assert [row.text for row in unit.captions.values()] == ["a square, seen anew"]
    assert read_datasets(store)[0].samples[0].captions == (caption_key("a square, seen anew"),)


def test_a_removed_clip_leaves_the_list_and_no_unit_is_touched(work: Path, model: Path) -> None:
    store, index = run(work, model), read_index(work)
    before = ids(store)
    write_index(work, index.model_copy(update={"samples": index.samples[1:]}))
    run(work, model)
    assert ids(store) == before
    assert {key for sample in read_datasets(store)[0].samples for key in sample.keys} == {
        sample.key for sample in index.samples[1:]
    }


@pytest.mark.parametrize(
    ("change", "kinds", "why"),
    [
        ("vae.weight_dtype=BFLOAT_16", {"latents"}, "7 stale latents (precision FLOAT_32 -> BFLOAT_16)"),
        ("text_encoder.weight_dtype=BFLOAT_16", {"text"}, "stale captions (precision FLOAT_32 -> BFLOAT_16)"),
        ("vae.tiling=true", {"latents"}, "7 stale latents (tiling False -> True)"),
    ],
)
def test_a_changed_setting_makes_exactly_its_part_stale(
    work: Path, model: Path, capsys: pytest.CaptureFixture[str], change: str, kinds: set[str], why: str
) -> None:
    store = run(work, model)
    before = ids(store)
    capsys.readouterr()
    run(work, model, change)
    assert {marker.kind for marker in made(store, before)} == kinds
    assert why in capsys.readouterr().out
    assert {marker.id for marker in fresh_units(store)} == (
        {marker.id for marker in made(store, before)}
        | {marker.id for marker in read_markers(store) if marker.id in before and marker.kind not in kinds}
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_are_used_in_the_precision_that_is_set(work: Path, model: Path, tmp_path: Path, part: str) -> None:
    """Weights that were rounded to bfloat16 give the same rows where bfloat16 is set, and others in float32."""
    copy = tmp_path / "rounded"
    shutil.copytree(model, copy)
    for path in (copy / part).glob("*.safetensors"):
        save_file({name: weight.bfloat16().float() for name, weight in load_file(path).items()}, path, {"format": "pt"})

    def rows(folder: Path, dtype: str) -> bytes:
        reader = StoreReader([run(work, folder, f"{part}.weight_dtype={dtype}")])
        sample = read_index(work).samples[0]
        latent, text = reader.latent(sample.key), reader.text(caption_key(sample.captions[0])).embedding_Sd
        return latent.tobytes() if part == "vae" else text.tobytes()

    assert rows(copy, "BFLOAT_16") == rows(model, "BFLOAT_16")
    assert rows(copy, "FLOAT_32") != rows(model, "FLOAT_32")


def test_tiles_are_encoded_where_they_are_asked_for(tmp_path: Path, model: Path) -> None:
    """diffusers' tiles have 256 pixels a side: a frame of 288 is cut, one of 64 is not."""
    index = index_of(tmp_path, [add_shard(tmp_path, f"{side}.tar", (1,), True, (1, side, side)) for side in (288, 64)])
    whole, tiled = (
        [StoreReader([store]).latent(sample.key) for sample in index.samples]
        for store in (run(tmp_path, model).rename(tmp_path / "whole.zarr"), run(tmp_path, model, "vae.tiling=true"))
    )
    assert not np.allclose(whole[0], tiled[0], atol=0.01)
    np.testing.assert_allclose(whole[1].astype(np.float32), tiled[1], rtol=2e-3, atol=2e-3)


def test_other_vae_weights_make_latents_stale_and_keep_texts(
    work: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = run(work, model)
    old = StoreReader([store]).latent(read_index(work).samples[0].key)
    before, other = ids(store), nano_model(tmp_path / "other", seed=1)
    for part in ("text_encoder", "tokenizer"):
        for path in (model / part).iterdir():
            (other / part / path.name).write_bytes(path.read_bytes())
    run(work, other)
    assert "7 stale latents (vae " in capsys.readouterr().out
    assert {marker.kind for marker in made(store, before)} == {"latents"}
    assert not np.array_equal(StoreReader([store]).latent(read_index(work).samples[0].key), old)


def test_encoding_again_gives_the_same_bytes(work: Path, model: Path) -> None:
    store = run(work, model)
    first = {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    store.rename(work / "old.zarr")
    run(work, model)
    assert {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()} == first


def test_encoding_in_other_batches_and_chunks_moves_a_value_by_one_float16_step_at_most(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(tmp_path, [add_shard(tmp_path, "a.tar", range(3), size=(13, 32, 48))])
    rows = []
    for effort in (Effort(3, None), Effort(2, 1), Effort(1, 2)):
        monkeypatch.setattr("encode.worker.choose_effort", lambda *_, effort=effort: effort)
        reader = StoreReader([run(tmp_path, model)])
        rows.append(np.stack([reader.latent(sample.key) for sample in index.samples]))
        shutil.rmtree(tmp_path / "latents.zarr")
    step = np.spacing(np.maximum(np.abs(rows[0]), np.float16(2**-6)))  # next to zero float32 rounds more coarsely
    for other in rows[1:]:
        assert (np.abs(other.astype(np.float64) - rows[0]) <= step).all()


def test_parts_make_together_what_one_makes_alone(work: Path, model: Path) -> None:
    whole = run(work, model)
    rows = {marker.id: marker.rows for marker in read_markers(whole) if marker.kind == "latents"}
    whole.rename(work / "whole.zarr")
    for part in ("1/2", "2/2"):
        store = run(work, model, part=part)
    assert {marker.id: marker.rows for marker in read_markers(store) if marker.kind == "latents"} == rows
    one, two = StoreReader([work / "whole.zarr"]), StoreReader([store])
    for key in one.texts:
        np.testing.assert_allclose(one.text(key).embedding_Sd, two.text(key).embedding_Sd, rtol=2e-3, atol=2e-3)
    assert set(one.texts) == set(two.texts)


def test_variants_of_a_clip_are_one_listed_sample(work: Path, model: Path) -> None:
    index = read_index(work)
    pair = [sample.model_copy(update={"clip": "window", "variant": variant})
            for sample, variant in zip(index.samples[:2], ("slow", "plain"), strict=True)]  # fmt: skip
    write_index(work, index.model_copy(update={"samples": (*pair, *index.samples[2:])}))
    listed = read_datasets(run(work, model))[0].samples[0]
    assert listed.keys == (pair[1].key, pair[0].key)


def test_encode_before_ingest_names_ingest(tmp_path: Path, model: Path) -> None:
    with pytest.raises(DatasetError, match="make ingest"):
        run(tmp_path, model)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_corrupt_shard_is_refused_by_name(work: Path, model: Path, damage: str) -> None:
    path = shard_folder(work) / "b.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    damaged = {"flip": bytes(data), "truncate": bytes(data[:2000]), "remove": None}[damage]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(DatasetError, match=r"b\.tar.*make ingest"):
        run(work, model)


def test_a_clip_of_other_length_than_listed_is_refused(work: Path, model: Path) -> None:
    index = read_index(work)
    wrong = tuple(sample.model_copy(update={"num_frames": 9}) if sample.shard == "a.tar" else sample
                  for sample in index.samples)  # fmt: skip
    write_index(work, index.model_copy(update={"samples": wrong}))
    with pytest.raises(DatasetError, match="has frames"):
        run(work, model)


def test_sizes_the_model_cannot_take_are_refused(tmp_path: Path) -> None:
    index_of(tmp_path, [add_shard(tmp_path, "a.tar", (1,), size=(5, 48, 48))])
    with pytest.raises(DatasetError, match="multiples of 32"):
        run(tmp_path, nano_model(tmp_path / "model", VAE_22))


def test_weights_that_give_nan_are_an_error_naming_the_clip(work: Path, tmp_path: Path) -> None:
    broken = nano_model(tmp_path / "broken")
    path = broken / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["quant_conv.bias"][:] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(StoreError, match=r"clip0\.mp4 at 0 s"):
        run(work, broken)


def test_a_model_without_its_vae_is_refused(work: Path, tmp_path: Path) -> None:
    folder = nano_model(tmp_path / "half")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae/config.json").rename(folder / "config.json")
    (folder / "vae").rmdir()
    with pytest.raises(ModelError, match="vae"):
        run(work, folder)


@pytest.mark.parametrize("text", ["0/2", "3/2", "x", "1", "1/0"])
def test_an_impossible_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="SHARD="):
        Part.parse(text)


def test_a_recipe_follows_the_weights_and_not_the_folder(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in model.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(model)).write_bytes(path.read_bytes())
    one, two = settings(model), settings(copy)
    assert recipes(one.config, one.spec) == recipes(two.config, two.spec)
    config = json.loads((copy / "vae/config.json").read_text())
    (copy / "vae/config.json").write_text(json.dumps(config | {"latents_std": [2.0] * 16}))
    assert recipes(one.config, one.spec)["latents"] != recipes(two.config, settings(copy).spec)["latents"]


def test_a_change_of_the_concept_encodes_its_captions_again_and_no_other(work: Path, model: Path) -> None:
    index = read_index(work)
    first = index.samples[0].model_copy(update={"captions": ("a <zorb> spins",)})
    write_index(work, index.model_copy(update={"samples": (first, *index.samples[1:])}))
    store, known = run(work, model), ids(work / "latents.zarr")
    said = "training_method=EMBEDDING embedding.placeholder=<zorb> embedding.token_count=3 "
    for more in ("embedding.initial_text=a ball", "embedding.initial_text=dogs", "embedding.token_count=5"):
        run(work, model, said + more)
        (unit,) = made(store, known)
        known |= {unit.id}
        ((key, row),) = unit.captions.items()
        concept = settings(model, said + more).config.embedding
        assert (row.text, key) == ("a <zorb> spins", text_key("a <zorb> spins", concept))
        ((_, length),) = StoreReader([store]).text(key).spans
        assert length == concept.token_count
    run(work, model)
    assert not made(store, known)
    assert StoreReader([store]).text(caption_key("a <zorb> spins")).spans == ()
