"""The GPU bench takes real steps with random weights (on the CPU, at a small size), and says when there is no GPU."""

import subprocess
import sys

import pytest
import torch

from shared.config import Config
from shared.models import WAN21_VAE, ModelSpec
from tests.bench.bench_gpu import ROWS, train_steps
from train.memory import Placement, Room, add_up, block_cost_of, largest_bucket, weight_cost_of

SMALL = ModelSpec("small", "small", WAN21_VAE, fps=16, heads=4, head_dim=32, ffn_dim=320, num_layers=4, in_channels=36,
                  text_dim=64)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "dtype", "streamed"),
    [
        ("LORA", "NFLOAT_4", 3),
        ("LORA", "FLOAT_8", 0),
        ("EMBEDDING", "INT_8", 2),
        ("FINE_TUNE", "BFLOAT_16", 0),
        ("FINE_TUNE", "BFLOAT_16", 3),
    ],
)
def test_random_models_of_each_method_take_finite_steps(method: str, dtype: str, streamed: int) -> None:
    config = Config(training_method=method, transformer={"weight_dtype": dtype}, resolution="96x96", frames=5,
                    lora_rank=4, batch_size=2, gradient_checkpointing="CPU_OFFLOADED")  # fmt: skip
    bucket = largest_bucket(config, SMALL)
    costs = weight_cost_of(SMALL, config), block_cost_of(SMALL, config, bucket)
    plan = add_up(config, SMALL, costs, (bucket, Placement(streamed, 4)), Room(None))
    took = train_steps(SMALL, config, plan, torch.device("cpu"), steps=2)
    assert len(took["seconds"]) == 2
    assert (took["pinned"] > 0) == (streamed > 0)


def test_without_a_gpu_the_bench_refuses_by_name() -> None:
    assert "8gb:ti2v-5b" in ROWS
    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, "-m", "tests.bench.bench_gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: bench-gpu needs a CUDA")
