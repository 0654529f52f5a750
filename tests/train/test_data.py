"""Laws of order and randomness: what a step trains is a function of (seed, step, slot) and of nothing else."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from shared.keys import EMPTY_CAPTION
from shared.models import ModelSpec
from shared.store_read import StoreReader
from tests.train.make import config, listed
from train.data import Draw, Plan, epoch_batches, load_step, micro_batch_size
from train.feed import prefetch
from train.flow import SigmaLaw
from train.group import Group

Made = tuple[Path, ModelSpec, Path]
LAW = SigmaLaw("UNIFORM", 3.0)


def names(batches: object) -> list[str]:
    return [draw.key for batch in batches for draw in batch]  # type: ignore[attr-defined]


def test_an_epoch_holds_every_sample_as_often_as_it_repeats(single: Made) -> None:
    model, spec, _ = single
    samples = [listed(number, spec, (9, 32, 32 + 16 * (number % 2)), repeats=1 + number % 3) for number in range(11)]
    epochs = [epoch_batches(samples, config(model), epoch, 4) for epoch in range(3)]
    for batches in epochs:
        assert Counter(names(batches)) == {f"sample{number}": 1 + number % 3 for number in range(11)}
        assert all(len({draw.sample.bucket for draw in batch}) == 1 for batch in batches)
        sizes = Counter(len(batch) for batch in batches)
        assert sizes == {4: 5, 1: 1}  # 12 and 9 draws in batches of 4: the last one is smaller
    assert names(epochs[0]) != names(epochs[1]) != names(epochs[2])


def test_prior_samples_come_at_their_ratio_and_take_turns(single: Made) -> None:
    model, spec, _ = single
    samples = [listed(number, spec, prior=number >= 4) for number in range(11)]
    settings = config(model, prior={"ratio": 0.5, "weight": 0.25})
    seen: Counter[str] = Counter()
    for epoch in range(7):
        drawn = Counter(names(epoch_batches(samples, settings, epoch, 4)))
        assert sum(drawn[f"sample{number}"] for number in range(4, 11)) == 2  # half of four
        seen += drawn
    assert all(seen[f"sample{number}"] == 2 for number in range(4, 11))  # 14 draws of 7: each twice


def test_a_plan_can_start_anywhere(single: Made) -> None:
    model, spec, _ = single
    samples = [listed(number, spec, prior=number > 7) for number in range(10)]
    settings = config(model, max_steps=None, epochs=5)
    whole = Plan(samples, settings, 4)
    for step in (0, 7, 3, 11):
        assert Plan(samples, settings, 4).batch(step) == whole.batch(step)
    assert whole.total_steps() == sum(len(epoch_batches(samples, settings, epoch, 4)) for epoch in range(5))
    assert Plan(samples, config(model, max_steps=3), 4).total_steps() == 3


def test_micro_batches_and_threads_change_nothing_but_the_cut(single: Made) -> None:
    model, spec, store = single
    reader = StoreReader([store])
    plain = config(model, timestep_stratified=True)
    cut = config(
        model, timestep_stratified=True, dataloader_threads=5, video_config={"video_batch_size_multiplier": 0.5}
    )
    samples = [listed(number, spec) for number in range(10)]
    for ours, theirs in zip(prefetch(reader, Plan(samples, plain, 4), LAW, (0, 5), Group()),
                            prefetch(reader, Plan(samples, cut, 4), LAW, (0, 5), Group()), strict=True):  # fmt: skip
        assert [len(part.captions) for part in theirs] == [2] * (len(ours[0].captions) // 2)
        for name in ("latent_BCthw", "noise_BCthw", "sigma_B", "weight_B"):
            assert torch.equal(getattr(ours[0], name), torch.cat([getattr(part, name) for part in theirs]))
        assert ours[0].captions == [key for part in theirs for key in part.captions]


def test_a_slots_draws_do_not_depend_on_the_others(single: Made) -> None:
    model, spec, store = single
    draws = Plan([listed(number, spec) for number in range(10)], config(model), 4).batch(0)
    four = load_step(StoreReader([store]), config(model), LAW, 0, draws)[0]
    two = load_step(StoreReader([store]), config(model), LAW, 0, draws[:2])[0]
    assert torch.equal(four.noise_BCthw[:2], two.noise_BCthw) and torch.equal(four.sigma_B[:2], two.sigma_B)
    other = load_step(StoreReader([store]), config(model, seed=1), LAW, 0, draws)[0]
    assert not torch.equal(four.noise_BCthw, other.noise_BCthw)


def test_noise_is_normal_and_stratified_sigmas_fill_their_strata(single: Made) -> None:
    model, spec, store = single
    settings = config(model, timestep_stratified=True, batch_size=8)
    reader = StoreReader([store])
    draws = Plan([listed(number, spec) for number in range(10)], settings, 8).batch(0)
    draws = (draws * 8)[:8]
    for step in range(20):
        sigma = load_step(reader, settings, SigmaLaw("UNIFORM", 1.0), step, draws)[0].sigma_B
        assert sorted((sigma * 8).long().tolist()) == list(range(8))
    noise = torch.cat([load_step(reader, settings, LAW, step, draws)[0].noise_BCthw for step in range(10)])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_captions_are_dropped_at_their_rate_and_chosen_evenly(single: Made) -> None:
    model, spec, store = single
    settings = config(model, caption_dropout_probability=0.3, batch_size=100)
    sample = listed(0, spec, captions=("one", "two"))
    draws = [Draw(sample, "sample0")] * 100
    counts: Counter[str] = Counter()
    for step in range(5):
        parts = load_step(StoreReader([store]), settings, LAW, step, draws)
        counts += Counter(key for part in parts for key in part.captions)
    assert abs(counts[EMPTY_CAPTION] / 500 - 0.3) < 0.07 and abs(counts["one"] - counts["two"]) < 75


def test_prior_weight_scales_prior_samples_alone(single: Made) -> None:
    model, spec, store = single
    settings = config(model, prior={"weight": 0.25, "ratio": 1.0})
    samples = [listed(0, spec, weight=2.0), listed(1, spec, prior=True)]
    draws = [Draw(sample, sample.keys[0]) for sample in samples]
    assert load_step(StoreReader([store]), settings, LAW, 0, draws)[0].weight_B.tolist() == [1.0, 0.125]


def test_images_take_the_whole_batch_videos_their_share(single: Made) -> None:
    model, spec, _ = single
    settings = config(model, batch_size=6, video_config={"video_batch_size_multiplier": 0.25})
    assert micro_batch_size(settings, listed(0, spec, (1, 32, 32)).bucket) == 6
    assert micro_batch_size(settings, listed(0, spec).bucket) == 2
    tiny_share = config(model, batch_size=1, video_config={"video_batch_size_multiplier": 0.25})
    assert micro_batch_size(tiny_share, listed(0, spec).bucket) == 1


@pytest.mark.parametrize("augment", [False, True])
def test_variants_are_drawn_only_when_asked_for(single: Made, augment: bool) -> None:
    model, spec, _ = single
    samples = [listed(0, spec, keys=("plain", "slow", "fast"))]
    settings = config(model, video_config={"temporal_augmentation": augment})
    seen = {key for epoch in range(30) for key in names(epoch_batches(samples, settings, epoch, 1))}
    assert seen == ({"plain", "slow", "fast"} if augment else {"plain"})


def test_processes_share_the_slots_of_a_step_between_them(single: Made) -> None:
    model, spec, store = single
    settings, reader = config(model), StoreReader([store])
    draws = Plan([listed(number, spec) for number in range(10)], settings, 5).batch(0)
    (whole,) = load_step(reader, config(model, batch_size=5), LAW, 0, draws)
    parts = [load_step(reader, settings, LAW, 0, draws, Group(rank, 3)) for rank in range(3)]
    assert [sum(len(slots.captions) for slots in part) for part in parts] == [2, 2, 1]
    for rank, part in enumerate(parts):
        assert torch.equal(whole.noise_BCthw[rank::3], torch.cat([slots.noise_BCthw for slots in part]))
        assert torch.equal(whole.weight_B[rank::3], torch.cat([slots.weight_B for slots in part]))
    assert load_step(reader, settings, LAW, 0, draws[:1], Group(1, 2)) == []
