"""The training process is lean: no VAE, text encoder, pipeline or ffmpeg is imported to train, nor to write results."""

import json
import subprocess
import sys
from pathlib import Path

from shared.files import write_json
from shared.models import ModelSpec
from shared.resolve import to_json
from tests.train.make import config, make_model

Made = tuple[Path, ModelSpec, Path]
ROOT = Path(__file__).parents[2]
FORBIDDEN = {"umt5", "ffmpeg", "av", "webdataset", "zarr", "imageio_ffmpeg"}
CODE = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules))))
from train.__main__ import main
main(sys.argv[1:])
"""


def test_training_imports_no_frozen_network(single: tuple[Path, ModelSpec, Path], tmp_path: Path) -> None:
    model, _, store = single
    write_json(tmp_path / "c.json", to_json(config(model, max_steps=2)))
    command = [sys.executable, "-c", CODE, "--work", str(tmp_path), "--store", str(store), "--config",
               str(tmp_path / "c.json"), "--run", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "train.loop" in modules and "train.export" in modules and (tmp_path / "run" / "run.safetensors").is_file()
    assert not [name for name in modules if FORBIDDEN & set(name.split(".")) or "autoencoder_kl" in name]
    assert not [name for name in modules if name.startswith(("diffusers.pipelines.", "transformers.models.umt5"))]


def test_a_store_that_does_not_fit_is_refused_before_torch_loads(single: Made, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", text_dim=24)
    write_json(tmp_path / "c.json", to_json(config(other)))
    command = [sys.executable, "-c", CODE, "--work", str(tmp_path), "--store", str(single[2]), "--config",
               str(tmp_path / "c.json"), "--run", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no text embeddings of width 24" in done.stderr, done.stderr
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "train.stores" in modules and "torch" not in modules


def test_a_disk_that_is_full_at_the_last_checkpoint_ends_in_one_line(single: Made, tmp_path: Path) -> None:
    """Files may not grow above 20 kB: the log fits, no checkpoint does."""
    model, _, store = single
    write_json(tmp_path / "c.json", to_json(config(model, max_steps=3, backup_after=1)))
    command = [sys.executable, "-m", "train", "--work", str(tmp_path), "--store", str(store), "--config",
               str(tmp_path / "c.json"), "--run", str(tmp_path / "run")]  # fmt: skip
    limit = ["prlimit", "--fsize=20000"]
    done = subprocess.run([*limit, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "free space" in errors[0] and done.stderr.count("checkpoint of step") == 2
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
