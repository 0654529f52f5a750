"""How rows are made: recipes, which decide whether a stored row is fresh. Input: config and model.

A recipe holds everything that changes a row beside its own input: weights, arithmetic, tiling, the version of our code.
Device, batch and chunk are not in it: they move a row by at most one float16 step, or in fewer bits by the rounding of
that precision.
"""

from encode.plan import ENCODE_VERSION, Recipe
from shared.config import Config
from shared.models import ModelSpec
from shared.store import Kind
from shared.weights import model_folder, weights_fingerprint

CONDITION = (
    "first frame, then grey"  # diffusers pipeline_wan_i2v.py prepare_latents: the other frames are 0.0 in [-1, 1]
)


def recipes(config: Config, spec: ModelSpec, download: bool = True) -> dict[Kind, Recipe]:
    """Recipe of every kind of unit this model trains from; reads (and remembers) the weights' hashes."""
    wanted: dict[Kind, Recipe] = {"latents": latent_recipe(config, spec, download)}
    if spec.image_condition == "concat":
        wanted["cond"] = wanted["latents"] | {"condition": CONDITION}
    return wanted | {"text": text_recipe(config, spec, download)}


def latent_recipe(config: Config, spec: ModelSpec, download: bool = True) -> Recipe:
    """Recipe of normalised posterior modes."""
    folder = model_folder(spec, ("vae",), download)
    return {"encode_version": ENCODE_VERSION, "vae": weights_fingerprint(folder / "vae"),
            "precision": config.vae.weight_dtype, "tiling": config.vae.tiling}  # fmt: skip


def text_recipe(config: Config, spec: ModelSpec, download: bool = True) -> Recipe:
    """Recipe of caption embeddings."""
    folder = model_folder(spec, ("text_encoder", "tokenizer"), download)
    return {"encode_version": ENCODE_VERSION, "text_encoder": weights_fingerprint(folder / "text_encoder"),
            "tokenizer": weights_fingerprint(folder / "tokenizer"),
            "precision": config.text_encoder.weight_dtype}  # fmt: skip
