"""Other spellings of our settings, as OneTrainer's configs have had them, and why some keys mean nothing here.

Input: one layer of a config as its author wrote it. Output: the same in our spelling.
"""

from typing import Any

from shared.errors import ConfigError

# dotted key -> ours, which are no section's
RENAMED = {
    "transformer.offload_fraction": "layer_offload_fraction",
    "learning_rate_warmup_steps": "warmup_steps",
    "learning_rate_scheduler": "lr_scheduler",
    "clip_grad_norm": "max_grad_norm",
}
# dotted key -> why there is no such setting
MEANINGLESS = {
    "concept_file_name": "the dataset is what make ingest DATA=folder reads",
    "cache_dir": "latents are in the store, WORK/latents.zarr; name another with STORE=",
    "workspace_dir": "results are in a run folder; name one with RUN=",
    "latent_caching": "latents always come from the store",
    "clear_cache_before_training": "the store is never stale: what changed is encoded anew",
    "only_cache": "make encode only encodes",
    "tensorboard": "events and TensorBoard files are always written; look with: tensorboard --logdir runs",
    "sample_definition_file_name": "write the prompts into sample_prompts",
    "train_device": "the GPU is found by itself; choose one with CUDA_VISIBLE_DEVICES",
    "temp_device": "what does not fit waits in RAM; see layer_offload_fraction",
    "continue_last_backup": "an unfinished run always goes on; RESUME=no starts anew",
    "gradient_accumulation_steps": "batch_size counts samples per update; "
    "video_config.video_batch_size_multiplier sets how many are in memory at once",
    "text_encoder.train_embedding": "embeddings are trained by training_method EMBEDDING",
}
# of a OneTrainer sample -> ours; one value for all samples
OF_ALL_SAMPLES = {
    "negative_prompt": "sample_negative_prompt",
    "seed": "sample_seed",
    "diffusion_steps": "sample_steps",
    "cfg_scale": "sample_guidance_scale",
}
NO_SAMPLE_SETTING = {
    "height": "previews have the size of the clips",
    "width": "previews have the size of the clips",
    "frames": "previews have the length of the clips",
    "length": "previews have the length of the clips",
    "noise_scheduler": "previews are sampled by Euler steps along the velocity",
    "random_seed": "previews are compared with each other, so their seed is fixed",
}


def respelled(layer: dict[str, Any], origin: str) -> dict[str, Any]:
    """A layer in our spelling; raises ConfigError for what means nothing here, or is said twice in different words."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in layer.items()}
    for key, reason in MEANINGLESS.items():
        if _take(result, key) is not _NOTHING:
            raise ConfigError(f"{key} (from {origin}): no such setting, {reason}")
    for theirs, ours in RENAMED.items():
        if (value := _take(result, theirs)) is not _NOTHING:
            _put(result, ours, value, f"{theirs} (from {origin})")
    if (samples := _take(result, "samples")) is not _NOTHING:
        for key, value in _from_samples(samples, origin).items():
            _put(result, key, value, f"samples (from {origin})")
    if result.get("sample_after_unit") == "NEVER":
        result |= {"sample_after": None, "sample_after_unit": "STEP"}
    return result


class _Nothing:
    """No value, as None is one."""


_NOTHING = _Nothing()


def _take(layer: dict[str, Any], key: str) -> Any:
    """Remove a dotted key and return its value."""
    section, _, last = key.rpartition(".")
    place = layer.get(section) if section else layer
    return place.pop(last, _NOTHING) if isinstance(place, dict) else _NOTHING


def _put(layer: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Set a key that is not set otherwise."""
    if layer.setdefault(key, value) != value:
        raise ConfigError(f"{origin} means {key}, which says {layer[key]!r} there; keep one of them")


def _from_samples(samples: Any, origin: str) -> dict[str, Any]:
    """Our settings of OneTrainer's list of samples."""
    if not isinstance(samples, list) or not all(isinstance(item, dict) and "prompt" in item for item in samples):
        raise ConfigError(f"samples (from {origin}): a list of objects with a prompt; or use sample_prompts")
    shown = [item for item in samples if item.get("enabled", True)]
    found: dict[str, Any] = {"sample_prompts": [item["prompt"] for item in shown]}
    for item in shown:
        for key, value in item.items():
            if key in OF_ALL_SAMPLES:
                ours = OF_ALL_SAMPLES[key]
                if found.setdefault(ours, value) != value:
                    raise ConfigError(f"samples (from {origin}): {key} differs between samples, and {ours} is one for "
                                      "all previews; make them equal")  # fmt: skip
            elif key not in ("prompt", "enabled") and value is not False:
                reason = NO_SAMPLE_SETTING.get(key, "previews have no such setting")
                raise ConfigError(f"samples (from {origin}): {key}={value!r}: {reason}; leave it out")
    return found
