"""The model card of the tiny Wan: what it is, how it was made, and what was measured, written by the recipe itself."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.tiny.draw import BACKGROUNDS, COLORS, CONCEPT_WORD, DIRECTIONS, SHAPES, Attributes
from tests.tiny.pipeline import Measured

if TYPE_CHECKING:
    from tests.tiny.recipe import Recipe

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---
# Tiny Wan

A real, trained Wan text-to-video model small enough for a laptop CPU and for tests: {megabytes:.1f} MB, stock diffusers
layout, 9 frames of 64 x 64 pixels. It draws one shape that moves over a plain background, as its caption says:
"a red circle moving left on a black background".

- colours: {colors}; shapes: {shapes}; directions: {directions}; backgrounds: {backgrounds}
- VAE: `AutoencoderKLWan`, {vae_parameters:.2f} M parameters, 8 x 8 pixels and 4 frames per latent, 16 channels
- DiT: `WanTransformer3DModel`, {dit_parameters:.2f} M parameters, patch 1 x 2 x 2, 48 tokens per clip
- text: a frozen UMT5 of random weights and a tokenizer of {vocabulary} pieces; unknown words fall apart into characters
- weights: float16 (text encoder float32)

```python
from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("shared/tiny")
frames = pipeline("a red circle moving left on a black background", negative_prompt="", height=64, width=64,
                  num_frames=9, num_inference_steps={sampling_steps}, guidance_scale={guidance}).frames[0]
```

## Measured

On the saved float16 files, with clips, prompts and noise that no training step has seen.

| VAE | PSNR |
|---|---|
| {clips} captioned clips, mean (worst) | {psnr:.1f} dB ({worst_psnr:.1f}) |
| {clips} varied clips (any colours, rings, stars, stripes, gradients, moving texture), mean | {varied_psnr:.1f} dB |

Caption following, read from pixels; sampled by the stock pipeline: UniPC, {sampling_steps} steps, guidance {guidance},
flow shift {shift}. {held_out_prompts} of the {prompts} prompts are combinations held out of the DiT's training; it has
seen every pair of their attributes, but not all four together.

| | colour | shape | direction | background | all four |
|---|---|---|---|---|---|
{rows}

{misses}

## Made by

`make tiny` (`python -m tests.tiny`), from drawn clips only. Training took {minutes} CPU minutes (all threads, waiting
included; drawing, encoding and scoring add a few) on a machine with {cores} cores. Steps, rates and sizes:

```
{recipe}
```

## Limits

A toy for tests and demos: nine frames, plain scenes, no knowledge of the world. The VAE has seen rings, stripes and
other colours; the DiT has not, nor the word "{concept}", so that a demo can teach it a striped ring of that name.
"""


def write_card(folder: Path, recipe: Recipe, measured: Measured, seconds: dict[str, float]) -> None:
    """Write README.md into the pipeline's folder."""
    text = CARD.format(
        **_facts(folder),
        **_figures(measured),
        sampling_steps=recipe.sampling.steps,
        guidance=recipe.sampling.guidance,
        shift=recipe.sampling.shift,
        minutes=", ".join(f"{stage} {value / 60:.0f}" for stage, value in seconds.items()),
        cores=os.cpu_count(),
        recipe="\n".join(_settings(recipe)),
        concept=CONCEPT_WORD,
    )
    (folder / "README.md").write_text(text, encoding="ascii")


def _facts(folder: Path) -> dict[str, Any]:
    from transformers import T5Tokenizer

    weights = {part: (folder / part / "diffusion_pytorch_model.safetensors").stat().st_size for part in _PARTS}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {
        "megabytes": sum(path.stat().st_size for path in files) / 1e6,
        "vae_parameters": weights["vae"] / 2e6,  # float16
        "dit_parameters": weights["transformer"] / 2e6,
        "vocabulary": len(T5Tokenizer.from_pretrained(folder / "tokenizer")),
        "colors": ", ".join(COLORS),
        "shapes": ", ".join(SHAPES),
        "directions": ", ".join(DIRECTIONS),
        "backgrounds": ", ".join(BACKGROUNDS),
    }


_PARTS = ("vae", "transformer")


def _figures(measured: Measured) -> dict[str, Any]:
    rows = [
        _row(f"{measured.clips} drawn clips (checks the reader)", measured.real, measured.clips),
        _row("the same, through the VAE", measured.rebuilt, measured.clips),
        _row("sampled, all prompts", measured.followed, measured.prompts),
        _row("sampled, held-out prompts", measured.held_out_followed, measured.held_out_prompts),
    ]
    misses = "; ".join(measured.misses)
    return {
        **{name: getattr(measured, name) for name in ("psnr", "worst_psnr", "varied_psnr", "clips", "prompts")},
        "held_out_prompts": measured.held_out_prompts,
        "rows": "\n".join(rows),
        "misses": f"Prompts not followed in every attribute: {misses}." if misses else "Every prompt was followed.",
    }


def _row(name: str, counts: dict[str, int], total: int) -> str:
    cells = " | ".join(f"{counts[key]}/{total}" for key in (*Attributes._fields, "all"))
    return f"| {name} | {cells} |"


def _settings(recipe: Recipe) -> list[str]:
    lines = []
    for stage, values in asdict(recipe).items():
        lines.append(f"{stage}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    return lines
