"""The worker streams: a few clips in memory, errors where they belong, no network loaded that is not needed."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import encode.worker as subject
from encode.worker import ahead, to_video
from shared.keys import fingerprint
from shared.shards import read_index, write_index
from shared.store_read import StoreReader
from tests.encode.make import CORPUS, add_shard
from tests.encode.test_encode import run


def test_reading_ahead_keeps_order_and_never_holds_more_than_asked() -> None:
    made = 0

    def numbers() -> Iterator[int]:
        nonlocal made
        while made < 50:
            made += 1
            yield made

    for taken, number in enumerate(ahead(numbers(), 4), 1):
        assert number == taken
        assert made <= taken + 4
    assert taken == 50


def test_reading_ahead_works_while_the_consumer_does() -> None:
    def slow() -> Iterator[int]:
        for number in range(5):
            time.sleep(0.05)
            yield number

    began = time.monotonic()
    for _ in ahead(slow(), 2):
        time.sleep(0.05)
    assert time.monotonic() - began < 0.45  # 0.5 s one after the other


def test_an_error_while_reading_ahead_reaches_the_consumer_after_what_was_good() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("third clip is bad")

    taken = []
    with pytest.raises(ValueError, match="third clip"):
        for number in ahead(broken(), 3):
            taken.append(number)
    assert taken == [1]


def test_a_consumer_that_stops_leaves_no_thread() -> None:
    for number in ahead(iter(range(1000)), 2):
        if number == 3:
            break
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("decode") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_pixels_become_minus_one_to_one() -> None:
    frames_BTHWC = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 1, 3)
    video_BCTHW = to_video(frames_BTHWC, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(video_BCTHW.flatten().tolist(), [-1.0, -0.6, 1.0], rtol=0, atol=1e-6)


def test_the_text_encoder_is_not_loaded_when_no_caption_is_new(
    work: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(work, model)
    index = read_index(work)
    shard, samples = add_shard(work, "d.tar", (30,))
    known = [sample.model_copy(update={"captions": index.samples[0].captions}) for sample in samples]
    write_index(work, index.model_copy(update={"shards": (*index.shards, shard), "samples": (*index.samples, *known)}))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(subject, "TextEncoder", refuse)
    assert known[0].key in StoreReader([run(work, model)]).latents


def test_the_vae_is_not_loaded_when_no_clip_is_new(work: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(work, model)
    index = read_index(work)
    edited = index.samples[0].model_copy(update={"captions": ("said anew",)})
    write_index(work, index.model_copy(update={"samples": (edited, *index.samples[1:])}))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the VAE was loaded")

    monkeypatch.setattr(subject, "load_vae", refuse)
    assert fingerprint(caption="said anew") in StoreReader([run(work, model)]).texts


def test_many_captions_pass_in_groups_that_fit_into_memory(
    work: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(work, model).rename(work / "whole.zarr")
    whole = StoreReader([work / "whole.zarr"])
    monkeypatch.setattr(subject, "TOKENS_IN_FLIGHT", 1)
    monkeypatch.setattr("encode.plan.CAPTIONS_PER_UNIT", 5)
    split = StoreReader([run(work, model)])
    assert len({marker.id for _, marker in split.texts.values()}) > 1
    assert set(split.texts) == set(whole.texts)
    for key in whole.texts:
        assert abs(split.text(key).embedding_Sd.astype(float) - whole.text(key).embedding_Sd).max() < 2e-3
    assert len(CORPUS) < len(whole.texts)
