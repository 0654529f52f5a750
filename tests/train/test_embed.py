"""A prompt's file is what stock diffusers takes for the prompt: the README's lines make a video of it."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from shared.concept import text_key
from shared.config import Config
from shared.errors import RunError
from shared.keys import caption_key
from shared.models import TINY_FOLDER, model_spec
from shared.resolve import PRESETS, read_layer
from shared.store_read import StoreReader
from tests.train.make import listed, make_run, make_store, trained
from train.__main__ import main
from train.run import Run
from train.sample import ensure_texts
from train.session import start

README = (Path(__file__).parents[2] / "README.md").read_text()
SMALL = {"Wan-AI/Wan2.2-TI2V-5B-Diffusers": str(TINY_FOLDER), "512": "32", "=17": "=5", "=40": "=2"}
PROMPT = "a <concept> rolls through snow"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of an embedding on the tiny model."""
    folder = tmp_path_factory.mktemp("embed")
    small = {"training_method": "EMBEDDING", "output_model_format": "SAFETENSORS", "resolution": "32x32", "frames": 5,
             "max_steps": 2, "batch_size": 2, "sample_prompts": [], "embedding_learning_rate": 0.1,
             "output_dtype": "FLOAT_32"}  # fmt: skip
    settings, spec = Config.model_validate(read_layer(PRESETS / "demo.json") | small), model_spec("tiny")
    samples = [listed(number, spec, (5, 32, 32), captions=(caption_key(PROMPT),)) for number in range(2)]
    store = make_store(folder / "s.zarr", spec, samples, (PROMPT, "blurry"), settings.embedding)
    made = make_run(folder / "runs" / "concept-embedding", settings, store)
    start(made, finished=False)
    return made


def embed(run: Run, *more: str) -> Path:
    result = CliRunner().invoke(main, ["embed", "--run", str(run.folder), "--prompt", PROMPT, *more])
    assert result.exit_code == 0, result.output
    return Path(result.output.strip().removeprefix("wrote "))


def test_the_file_holds_the_learned_rows_in_their_place_and_zeros_after(run: Run) -> None:
    path = embed(run, "--negative", "blurry", "--out", str(run.folder / "more"))
    text = StoreReader(run.stores).text(text_key(PROMPT, run.config.embedding))
    wanted = torch.zeros(1, 512, 64)
    wanted[0, : len(text.ids_S)] = torch.tensor(text.embedding_Sd).float()
    ((start_row, count),) = text.spans
    wanted[0, start_row : start_row + count] = trained(run)["embedding"]
    rows = load_file(path)
    torch.testing.assert_close(rows["prompt_embeds"], wanted)
    assert rows["negative_prompt_embeds"].shape == wanted.shape
    with safe_open(path, "pt") as file:
        assert file.metadata()["prompt_embeds"] == PROMPT and file.metadata()["negative_prompt_embeds"] == "blurry"


def test_the_readmes_lines_make_a_video_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = embed(run)
    (snippet,) = re.findall(r"```python\n([^`]*prompt-1[^`]*)```", README)
    for large, small in SMALL.items():
        snippet = snippet.replace(large, small)
    monkeypatch.chdir(run.folder.parents[1])
    assert Path("runs/concept-embedding/prompts/prompt-1.safetensors").samefile(path)
    names: dict[str, object] = {}
    exec(snippet, names)
    assert getattr(names["video"], "shape", None) == (5, 32, 32, 3)


def test_a_text_embedded_by_other_weights_than_the_captions_is_refused(run: Run) -> None:
    """The made store names weights that are not tiny's."""
    with pytest.raises(RunError, match=r"nobody stored.*make encode"):
        ensure_texts(["a prompt that nobody stored"], run)
