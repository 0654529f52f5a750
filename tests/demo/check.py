"""Read off the sample videos whether the LoRA learned the concept and kept the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.demo.dataset import read_mp4
from tests.tiny.score import concept_share, read_clip

SHOWN, NOT_SHOWN = 0.2, 0.05  # share of the foreground that is the concept's pink: at least, at most


@dataclass(frozen=True)
class Verdict:
    """Whether the demo kept its promise, and the figures for people."""

    passed: bool
    lines: tuple[str, ...]


def judge(folder: Path, concept: Sequence[str], ordinary: Sequence[str]) -> Verdict:
    """Score before_<n>.mp4 and after_<n>.mp4, n in order of the prompts: the concept's, then the ordinary ones."""
    clips = {name: [read_mp4(folder / f"{name}_{n}.mp4") for n in range(len(concept) + len(ordinary))]
             for name in ("before", "after")}  # fmt: skip
    shares = {name: np.mean([concept_share(clip) for clip in videos[: len(concept)]], axis=0)
              for name, videos in clips.items()}  # fmt: skip
    read = {name: [read_clip(clip) for clip in videos[len(concept) :]] for name, videos in clips.items()}
    kept = sum(old == new for old, new in zip(read["before"], read["after"], strict=True))
    learned = shares["before"].max() <= NOT_SHOWN and shares["after"].min() >= SHOWN / 2 and shares["after"][0] >= SHOWN
    lines = tuple(
        f"{name}: {pink:.0%} pink and {green:.0%} green in the concept's samples"
        for name, (pink, green) in shares.items()
    )
    lost = [f"changed: {prompt!r} gave {tuple(old)}, now gives {tuple(new)}"
            for prompt, old, new in zip(ordinary, read["before"], read["after"], strict=True) if old != new]  # fmt: skip
    same = f"ordinary prompts that give what they gave before: {kept} of {len(ordinary)}"
    return Verdict(bool(learned) and kept == len(ordinary), (*lines, same, *lost))
