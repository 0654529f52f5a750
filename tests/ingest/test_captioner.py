"""A captioner writes what is missing, once; its lines are edited by hand and obeyed. The models are tiny and random."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from ingest.captioner import Asked, shown_frames
from ingest.probe import probe, probe_image
from shared.errors import DatasetError, ModelError
from tests.ingest.make import make_dataset, moving_square, run_ingest, write_video
from tests.ingest.test_time import STEP, numbered

SPOKEN = "describe a cat dog red blue board moves on the grass"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<image>", *SPOKEN.split()]
TALK = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "eos_token": "[SEP]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=["<image>"], **names)


def blip(folder: Path) -> None:
    """A model that takes one picture and a text, without a chat template."""
    text = {**SMALL, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "bos_token_id": 2, "pad_token_id": 0,
            "eos_token_id": 3, "sep_token_id": 3}  # fmt: skip
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION, projection_dim=16))
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer()).save_pretrained(folder)


def llava(folder: Path) -> None:
    """A model that is talked to, with several pictures."""
    text = {"model_type": "llama", **SMALL, "vocab_size": len(WORDS), "num_key_value_heads": 2, "pad_token_id": 0,
            "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
    vision = {"model_type": "clip_vision_model", **VISION, "projection_dim": 16}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=4))
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(pictures, tokenizer(), patch_size=16, vision_feature_select_strategy="default",
                               chat_template=TALK, num_additional_image_tokens=1)  # fmt: skip
    processor.save_pretrained(folder)


@pytest.fixture(params=[blip, llava])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    request.param(tmp_path / "model")
    return tmp_path / "model"


def lines(work: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (work / "captions.jsonl").read_text().splitlines()]


def test_what_is_missing_is_written_once_and_edits_are_obeyed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, work = make_dataset(tmp_path / "data", {"clip0.mp4": "a board"}), tmp_path / "work"
    for number in (1, 2, 3):
        write_video(data / f"IMG_{number}.mp4", moving_square(number))
    settings = f"caption.model={model} caption.batch_size=2 caption.frames=2"
    first = run_ingest(data, work, f'{settings} caption.prompt="describe the board"')
    said = {line["source"]: line["caption"] for line in lines(work)}
    assert all("describe" not in caption[:8] for caption in said.values()), "the prompt is no part of a caption"
    assert set(said) == {"IMG_1.mp4", "IMG_2.mp4", "IMG_3.mp4"}
    assert {s.source: s.captions[0] for s in first.samples if s.source in said} == {k: v for k, v in said.items() if v}

    edited = [
        {**line, "caption": "a hand-made caption"} if line["source"] == "IMG_2.mp4" else line for line in lines(work)
    ]
    (work / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in edited))
    monkeypatch.setattr("ingest.captioner.load_captioner", None)  # nothing is asked again
    again = run_ingest(data, work, f'{settings} caption.prompt="describe the board"')
    assert next(s.captions for s in again.samples if s.source == "IMG_2.mp4") == ("a hand-made caption",)
    monkeypatch.undo()
    run_ingest(data, work, f"{settings} caption.prompt=describe the grass")
    prompts = {line["source"]: line["prompt"] for line in lines(work)}
    new, old = "describe the grass", "describe the board"
    assert prompts == {"IMG_1.mp4": new, "IMG_2.mp4": old, "IMG_3.mp4": new}


def test_the_model_sees_frames_of_the_whole_source(tmp_path: Path) -> None:
    """Also of one with a single keyframe; frame k is grey 20 + 3 k."""
    path = write_video(tmp_path / "a_wall.mp4", numbered(64))
    facts = probe(path)
    assert len(facts.keyframes) == 1
    shown = shown_frames(Asked(path, path.name, "sha", facts), 4)
    assert [round((np.asarray(picture).mean() - 20) / STEP) for picture in shown] == [8, 24, 40, 56]


def test_a_damaged_picture_is_not_shown(tmp_path: Path) -> None:
    picture = tmp_path / "a_wall.png"
    Image.fromarray(moving_square(1, 1)[0]).save(picture)
    facts = probe_image(picture)
    picture.write_bytes(picture.read_bytes()[:300])
    assert shown_frames(Asked(picture, picture.name, "sha", facts), 4) == []


def test_a_name_that_is_no_model_is_said_in_one_line(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {"IMG_1.mp4": None})
    with pytest.raises(ModelError, match=r"caption\.model '.*nothing' cannot be loaded") as caught:
        run_ingest(data, tmp_path / "work", f"caption.model={tmp_path / 'nothing'}")
    assert "\n" not in str(caught.value)


def test_a_damaged_line_is_not_thrown_away(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", {"clip1.mp4": "a board"})
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "captions.jsonl").write_text('{"source": "x"}\n')
    with pytest.raises(DatasetError, match="line 1 is no caption line"):
        run_ingest(data, tmp_path / "work")
