"""The whole way from single files is the way from their folder: the same latents, the same text, the same adapter."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from encode.__main__ import main as encode
from ingest.__main__ import main as ingest
from shared.models import TINY_FOLDER, model_spec
from shared.names import original_name
from shared.store_read import StoreReader
from shared.weights import load_text_encoder
from tests.demo.dataset import write_dataset
from tests.shared.originals import save_text
from train.__main__ import main as train

SMALL = "resolution=64x64 frames=9 max_steps=3 batch_size=1 windows_per_clip=1 video_config.target_fps=8 lora_rank=4 "
SMALL += "timestep_shift=1 train_dtype=FLOAT_32 output_dtype=FLOAT_32 learning_rate=0.01 gates.near_duplicate=null"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and the tiny model as files: DiT with original names, UMT5, its tokenizer beside."""
    folder = tmp_path_factory.mktemp("files")
    write_dataset(folder / "dataset", 1, 1)
    transformer = WanTransformer3DModel.from_pretrained(TINY_FOLDER / "transformer")
    sizes = json.loads((TINY_FOLDER / "transformer" / "config.json").read_text())
    plain = json.dumps({key: value for key, value in sizes.items() if not key.startswith("_")})
    named = {original_name(name): part.clone() for name, part in transformer.state_dict().items()}
    save_file(named, folder / "dit.safetensors", {"transformer_config": plain})
    save_text(folder / "text" / "umt5.safetensors", load_text_encoder(model_spec("tiny"), torch.float32)[1])
    (folder / "text" / "tokenizer").symlink_to(TINY_FOLDER / "tokenizer")
    return folder


def trained(files: Path, name: str, model: str, more: str = "") -> tuple[StoreReader, Path]:
    """Ingest, encode and train in a folder of its own; the store and the run's folder."""
    place = files / name
    settings = ["--preset", "cpu", "--model", model, "--set", f"{SMALL} {more}"]
    ingest.main(["--data", str(files / "dataset"), "--work", str(place), *settings])
    encode.main(["--work", str(place)])
    train.main(["--work", str(place), "--run", str(place / "run"), *settings])
    return StoreReader((place / "latents.zarr",)), place / "run"


def test_from_files_is_from_the_folder_and_the_adapter_changes_the_picture(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(files / "cache"))
    monkeypatch.chdir(files)
    parts = f"vae.model_name={TINY_FOLDER / 'vae'} text_encoder.model_name=text/umt5.safetensors"
    folder, first = trained(files, "folder", "tiny")
    single, second = trained(files, "single", "dit.safetensors", parts)
    assert folder.latents.keys() == single.latents.keys() and folder.texts.keys() == single.texts.keys()
    for key in folder.latents:
        assert np.array_equal(folder.latent(key), single.latent(key))
    for key in folder.texts:
        assert np.array_equal(folder.text(key).embedding_Sd, single.text(key).embedding_Sd)
    ours, theirs = load_file(second / "run.safetensors"), load_file(first / "run.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    def picture(pipe: WanPipeline) -> torch.Tensor:
        made = pipe("a red circle", height=64, width=64, num_frames=5, num_inference_steps=2, output_type="latent",
                    generator=torch.Generator().manual_seed(0))  # fmt: skip
        return torch.as_tensor(made.frames)

    pipe = WanPipeline.from_pretrained(TINY_FOLDER)
    pipe.set_progress_bar_config(disable=True)
    before = picture(pipe)
    pipe.load_lora_weights(str(second), weight_name="run.safetensors")
    assert (picture(pipe) - before).abs().max() > 0.01
