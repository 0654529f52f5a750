"""Read off the sample videos whether the LoRA learned the concept and kept the rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tests.demo.dataset import read_mp4
from tests.tiny.score import concept_share, read_clip

# Least shares of the foreground in the concept's pink and green; its own clips have about 0.4 of each
PINK, GREEN = 0.12, 0.06


@dataclass(frozen=True)
class Verdict:
    """Whether the demo kept its promise, and the figures for people."""

    passed: bool
    lines: tuple[str, ...]


def shows_concept(video: Tensor) -> bool:
    """Whether a clip (3, T, H, W) wears both colours of the concept."""
    pink, green = concept_share(video)
    return pink >= PINK and green >= GREEN


def judge(folder: Path, concept: Sequence[str], ordinary: Sequence[str]) -> Verdict:
    """Score before_<n>.mp4 and after_<n>.mp4, n in order of the prompts: the concept's, then the ordinary ones."""
    count = len(concept)
    before, after = ([read_mp4(folder / f"{name}_{n}.mp4") for n in range(count + len(ordinary))]
                     for name in ("before", "after"))  # fmt: skip
    shown = [sum(map(shows_concept, clips[:count])) for clips in (before, after)]
    changed = []
    for prompt, old, new in zip(ordinary, before[count:], after[count:], strict=True):
        was, now = read_clip(old), read_clip(new)
        if was != now:
            changed.append(f"changed: {prompt!r} showed {' '.join(was)}, now shows {' '.join(now)}")
    lines = (
        f"samples that show the concept: {shown[0]} of {count} before, {shown[1]} of {count} after",
        f"ordinary prompts that show what they showed before: {len(ordinary) - len(changed)} of {len(ordinary)}",
        *changed,
    )
    return Verdict(shown == [0, count] and not changed, lines)
