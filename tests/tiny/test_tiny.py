"""The shipped tiny Wan is what its card says, its scorer can be trusted, and its recipe still runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import WanPipeline
from torch import Tensor, nn
from torch.testing import assert_close

from shared.models import TINY_FOLDER
from tests.tiny.__main__ import main
from tests.tiny.draw import (
    BACKGROUNDS,
    COMBINATIONS,
    CONCEPT_WORD,
    DIRECTIONS,
    Attributes,
    caption,
    draw_clip,
    draw_concept,
    held_out,
)
from tests.tiny.muon import MuonAdam
from tests.tiny.pipeline import Sampling, load_pipeline, rebuild, sample
from tests.tiny.run import Run
from tests.tiny.score import NOTHING, concept_share, count_followed, read_clip
from tests.tiny.vae import psnr

SEED = 1234  # of clips and noise that no training step has seen


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return load_pipeline(TINY_FOLDER)


def drawn(combinations: list[Attributes]) -> list[Tensor]:
    rng = np.random.default_rng(SEED)
    return [draw_clip(attributes, rng) for attributes in combinations]


def test_the_folder_is_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in TINY_FOLDER.rglob("*") if path.is_file()) <= 12e6


def test_the_folder_loads_with_stock_diffusers_in_float32(pipeline: WanPipeline) -> None:
    for part in (pipeline.vae, pipeline.transformer, pipeline.text_encoder):
        assert part.dtype == torch.float32
    assert all(bool(parameter.isfinite().all()) for parameter in pipeline.transformer.parameters())


def test_the_concept_is_a_word_the_tokenizer_can_spell(pipeline: WanPipeline) -> None:
    ids = pipeline.tokenizer(CONCEPT_WORD).input_ids
    assert pipeline.tokenizer.unk_token_id not in ids
    assert len(ids) > 2


def test_the_vae_rebuilds_unseen_clips(pipeline: WanPipeline) -> None:
    clips = drawn(list(COMBINATIONS[::5]))
    assert np.mean([psnr(rebuild(pipeline.vae, clip), clip) for clip in clips]) >= 33


def test_captions_are_followed_also_by_combinations_never_seen(pipeline: WanPipeline) -> None:
    hidden = [attributes for attributes in COMBINATIONS if held_out(attributes)][::5]
    seen = [attributes for attributes in COMBINATIONS if not held_out(attributes)][::32]
    asked = hidden + seen
    videos = sample(pipeline, [caption(attributes) for attributes in asked], Sampling(batch_size=8), SEED)
    counts = count_followed(videos, asked)
    assert counts["color"] == counts["direction"] == counts["background"] == len(asked) == 8
    assert counts["shape"] >= 7


def test_the_reader_is_right_on_every_drawn_combination() -> None:
    asked = list(COMBINATIONS)
    assert count_followed(drawn(asked), asked)["all"] == len(asked)


def test_the_reader_sees_nothing_where_there_is_nothing() -> None:
    assert read_clip(torch.zeros(3, 9, 64, 64)) == NOTHING
    noise = torch.randn(3, 9, 64, 64, generator=torch.Generator().manual_seed(SEED)) * 0.02
    assert read_clip(noise) == NOTHING


def test_a_clip_that_stands_still_has_no_direction() -> None:
    clip = drawn([COMBINATIONS[0]])[0]
    assert read_clip(clip[:, :1].expand(-1, 9, -1, -1)).direction == "none"


def test_the_concepts_colours_tell_it_from_everything_else() -> None:
    rng = np.random.default_rng(SEED)
    for direction, background in itertools.product(DIRECTIONS, BACKGROUNDS):
        assert min(concept_share(draw_concept(direction, background, rng))) > 0.3
    assert max(concept_share(clip)[0] for clip in drawn(list(COMBINATIONS))) < 0.05


def test_shapes_stay_inside_the_picture() -> None:
    for clip in drawn(list(COMBINATIONS)):
        border = torch.cat([clip[:, :, 0], clip[:, :, -1], clip[:, :, :, 0], clip[:, :, :, -1]], dim=-1)
        assert_close(border, border[..., :1].expand_as(border), rtol=0, atol=1e-6)


def test_held_out_combinations_leave_every_pair_of_attributes_to_be_seen() -> None:
    seen = [attributes for attributes in COMBINATIONS if not held_out(attributes)]
    assert len(seen) == 126
    for first, second in itertools.combinations(range(4), 2):
        pairs = {(attributes[first], attributes[second]) for attributes in COMBINATIONS}
        assert {(attributes[first], attributes[second]) for attributes in seen} == pairs


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    def advance(file: Path, stop_after: int) -> Tensor:
        torch.manual_seed(0)
        first = nn.Linear(20, 20)
        model = nn.Sequential(first, nn.Linear(20, 3))
        optimizer = MuonAdam(model.parameters(), 0.02, 0.002)
        run = Run(file, 8, model, optimizer, save_every=4)
        for step in itertools.islice(run.steps(), stop_after):
            torch.manual_seed(step)
            torch.autograd.backward(model(torch.randn(5, 20)).square().mean())
            optimizer.step(1.0)
        return first.weight.detach()

    advance(tmp_path / "stopped.pt", 6)
    resumed = advance(tmp_path / "stopped.pt", 8)
    assert_close(resumed, advance(tmp_path / "straight.pt", 8), rtol=0, atol=0)


def test_the_recipe_runs_and_its_folder_loads(tmp_path: Path) -> None:
    out, work = tmp_path / "model", tmp_path / "work"
    result = CliRunner().invoke(main, ["--smoke", "--threads=1", f"--out={out}", f"--work={work}"])
    assert result.exit_code == 0, result.output
    assert (work / "samples.png").is_file()
    assert "| sampled, all prompts |" in (out / "README.md").read_text()
    assert load_pipeline(out).transformer.config.num_layers == 6
