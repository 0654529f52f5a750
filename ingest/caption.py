"""Captions: from file names, with the prefix, and the lint. Input and output: text. Cost: none."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

# names that cameras and programs give; a caption made of them would say nothing
MEANINGLESS = """
    clip clips copy dji dsc dscf dscn edit export file final gopr gx image img mov movie mvi new output pict photo pxl
    rec recording render sample scene screen scrnli segment sequence shot take test tmp trim trimmed untitled vid video
    whatsapp
"""
WORDS = (10, 50)  # length the training guide advises
SEQUENCE_WORDS = re.compile(r"\b(first|then|finally)\b", re.IGNORECASE)
# captions with one of these would be wrong for a clip played backwards
DIRECTION = re.compile(
    r"\b(left|right|up|down|(up|down|back|for|in|out|to|after|lee|sky|east|west|north|south|home)wards?|into|onto|out|"
    r"away|through|across|(anti|counter)?-?clockwise|(open|clos|ris|fall|enter|leav|exit|arriv|depart|approach|climb|"
    r"jump|pour|land|grow|shrink|melt|start|stopp?|begin|end|appear|disappear|walk|run|driv|rid|fly|swim)(s|es|ing)?)\b",
    re.IGNORECASE,
)
TALK = re.compile(r"\b(this|the) (video|clip|footage|scene) (shows|is|depicts|features|captures)\b", re.IGNORECASE)


def caption_from_name(stem: str) -> str | None:
    """'a_red-cat_runs_02' -> 'a red-cat runs'; None when the name is not words (IMG_0001, clip3, x)."""
    words = re.sub(r"[_\s]+", " ", stem).strip().split(" ")
    while len(words) > 1 and re.fullmatch(r"[\W\d]+", words[-1]):
        words.pop()
    real = [word for word in words if re.fullmatch(r"[^\W\d]+(['\u2019-][^\W\d]+)*[.,;!?]?", word)]
    meaning = [word for word in real if len(word) > 2 and word.lower() not in MEANINGLESS.split()]
    return " ".join(words) if meaning and len(real) == len(words) else None


def names_direction(caption: str) -> bool:
    """Whether a caption tells which way things go in space or time, so that reversing the clip would belie it."""
    return DIRECTION.search(caption) is not None


def with_prefix(captions: Iterable[str], prefix: str) -> tuple[str, ...]:
    """Captions as they are trained: the prefix (trigger word) and a space before each."""
    return tuple(f"{prefix.strip()} {caption}".strip() for caption in captions)


def lint(captions_of: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Remarks per caption, by the training guide's rules; `captions_of`: source -> its captions."""
    counts = Counter(caption for captions in captions_of.values() for caption in set(captions))
    remarks = {caption: lint_one(caption) for caption in counts}
    if len(captions_of) > 1:
        for caption, count in counts.items():
            if count == len(captions_of):
                remarks[caption].append(f"the same for all {count} files")
    return {caption: found for caption, found in remarks.items() if found}


def lint_one(caption: str) -> list[str]:
    """Remarks on one caption."""
    words = len(caption.split())
    remarks = [] if WORDS[0] <= words <= WORDS[1] else [f"{words} words; {WORDS[0]} to {WORDS[1]} train best"]
    if match := SEQUENCE_WORDS.search(caption):
        remarks.append(f"tells a sequence ({match[0].lower()!r}); a clip shows one moment")
    if match := TALK.search(caption):
        remarks.append(f"talks about the video ({match[0].lower()!r}); say what is seen")
    return remarks
