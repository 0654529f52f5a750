"""Captions by a model, for sources that have none: work/captions.jsonl, one line per source, to be edited by hand.

A line is kept for good once it was edited, or while caption.model and caption.prompt are those it was made with.
Cost: a call of the model per batch; torch and transformers are loaded for sources without a line only.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ingest.discover import Found
from ingest.frames import frames_at
from ingest.ledger import Ledger
from ingest.picture import load_picture
from ingest.probe import Facts, Unusable
from shared.config import CaptionConfig
from shared.errors import DatasetError, ModelError
from shared.files import atomic_write
from shared.keys import caption_key
from shared.progress import progress
from shared.shards import Record

FRAME_SIDE = 512  # pixels of the longer side of what the model is shown
MAX_TOKENS = 120  # about 80 words


class Written(Record):
    """A line of captions.jsonl: what a model said about a source."""

    source: str  # path when it was written, for people
    sha256: str
    caption: str
    model: str
    prompt: str
    made: str  # caption_key of the model's own words: another one of the caption means that a person edited it

    def holds(self, settings: CaptionConfig) -> bool:
        """Whether the line stands under these settings."""
        edited = caption_key(self.caption) != self.made
        return edited or settings.model is None or (self.model, self.prompt) == (settings.model, settings.prompt)


def captions_path(work: Path) -> Path:
    """Where the captions are kept."""
    return work / "captions.jsonl"


def read_written(work: Path) -> dict[str, Written]:
    """Lines by sha256; raises DatasetError for one that is damaged, because it may hold a person's work."""
    path, found = captions_path(work), {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        if line.strip():
            try:
                written = Written.model_validate_json(line)
            except ValidationError:
                raise DatasetError(f"{path}, line {number} is no caption line; mend it, or remove the line") from None
            found[written.sha256] = written
    return found


def write_written(work: Path, written: dict[str, Written]) -> None:
    """Replace captions.jsonl."""
    with atomic_write(captions_path(work)) as file:
        for line in written.values():
            file.write(json.dumps(line.model_dump(), ensure_ascii=False).encode() + b"\n")


def with_written_captions(
    root: Path, work: Path, files: tuple[Found, ...], ledger: Ledger, settings: CaptionConfig
) -> list[Found]:
    """The files, those without caption with the model's where it is known or caption.model can write it."""
    written = read_written(work)
    lacking = {}
    for found in files:
        entry = ledger.files.get(found.path)
        if not found.captions and entry is not None and entry.facts is not None:
            lacking[found.path] = (entry.sha256, entry.facts)
    asked = [
        Asked(root / path, path, sha256, facts)
        for path, (sha256, facts) in lacking.items()
        if sha256 not in written or not written[sha256].holds(settings)
    ]
    if settings.model is not None and asked:
        for line in describe(asked, settings):
            written[line.sha256] = line
            write_written(work, written)
    known = {path: written[sha256].caption for path, (sha256, _) in lacking.items() if sha256 in written}
    return [
        replace(found, captions=(known[found.path],), origin="captions.jsonl") if known.get(found.path) else found
        for found in files
    ]


@dataclass(frozen=True)
class Asked:
    """A source that the model is asked about."""

    file: Path
    path: str
    sha256: str
    facts: Facts


def describe(asked: list[Asked], settings: CaptionConfig) -> Iterator[Written]:
    """The model's words for each source, batch by batch; a source that cannot be decoded gets none."""
    model, processor = load_captioner(str(settings.model))
    with progress("captions", len(asked)) as advance:
        for start in range(0, len(asked), settings.batch_size):
            batch = asked[start : start + settings.batch_size]
            pictures = [(one, frames) for one in batch if (frames := shown_frames(one, settings.frames))]
            captions = (
                answers(model, processor, [frames for _, frames in pictures], settings.prompt) if pictures else []
            )
            for (one, _), caption in zip(pictures, captions, strict=True):
                yield Written(
                    source=one.path,
                    sha256=one.sha256,
                    caption=caption,
                    model=str(settings.model),
                    prompt=settings.prompt,
                    made=caption_key(caption),
                )
            advance(len(batch))


def load_captioner(name: str) -> tuple[Any, Any]:
    """(model, processor) of an image-text-to-text model; raises ModelError when there is none of that name."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto" if device == "cuda" else torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"caption.model {name!r} cannot be loaded as an image-text-to-text model: {reason}") from None
    processor.tokenizer.padding_side = "left"  # new tokens follow the prompt
    return model.to(device).eval(), processor


def shown_frames(asked: Asked, count: int) -> list[Any]:
    """`count` frames, evenly spaced over the source and upright, as small PIL pictures; none when it is damaged."""
    facts = asked.facts
    if facts.end <= facts.start:
        try:
            frames = [load_picture(asked.file)]
        except Unusable:
            return []  # its transcode says what is wrong with it
    else:
        times = [facts.start + (facts.end - facts.start) * (part + 0.5) / count for part in range(count)]
        shown = frames_at(asked.file, facts, times)
        frames = [frame.to_image().rotate(facts.rotation, expand=True) for frame in shown]
    for picture in frames:
        picture.thumbnail((FRAME_SIDE, FRAME_SIDE))
    return frames


def answers(model: Any, processor: Any, pictures: list[list[Any]], prompt: str) -> list[str]:
    """One caption per list of frames. A model without a chat template is shown the middle frame only."""
    import torch

    if getattr(processor, "chat_template", None):
        talks = [[{"role": "user", "content": [*({"type": "image", "image": frame} for frame in frames),
                                               {"type": "text", "text": prompt}]}] for frames in pictures]  # fmt: skip
        inputs = processor.apply_chat_template(talks, add_generation_prompt=True, tokenize=True, return_dict=True,
                                               return_tensors="pt", padding=True)  # fmt: skip
    else:
        middle = [frames[len(frames) // 2] for frames in pictures]
        inputs = processor(images=middle, text=[prompt] * len(middle), return_tensors="pt", padding=True)
    with torch.no_grad():
        tokens = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=MAX_TOKENS, do_sample=False)
    # some models repeat what they were given, in whole or without its last token, others do not
    given = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.removeprefix(start).split()) for text, start in zip(texts, given, strict=True)]
