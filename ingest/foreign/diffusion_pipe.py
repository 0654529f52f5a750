"""tdrussell/diffusion-pipe: dataset TOML and main TOML (key names: its examples/ and docs/supported_models.md)."""

from pathlib import Path

from ingest.foreign.reading import (
    DTYPES,
    OPTIMIZERS,
    STORED,
    Part,
    Reading,
    Rule,
    Table,
    areas,
    found,
    found_folder,
    inside,
    listing,
    model_of,
    named,
    number,
    parsed,
    pop,
    tables,
    whole,
)
from shared.errors import DatasetError

NOISE_OF = {(0.0, 0.875): "low_noise", (0.0, 0.9): "low_noise", (0.875, 1.0): "high_noise", (0.9, 1.0): "high_noise"}
SAME = {"model.type": "wan", "activation_checkpointing": True, "pipeline_stages": 1, "adapter.dtype": "float32"}
RULES: tuple[Rule, ...] = (
    ("epochs", "epochs", whole),
    ("max_steps", "max_steps", whole),
    ("gradient_clipping", "max_grad_norm", number),
    ("warmup_steps", "warmup_steps", whole),
    ("lr_scheduler", "lr_scheduler", named({"constant": "CONSTANT", "linear": "LINEAR", "cosine": "COSINE"})),
    ("save_dtype", "output_dtype", named(DTYPES)),
    ("compile", "compile", bool),
    ("model.dtype", "train_dtype", named(DTYPES)),
    ("model.transformer_dtype", "transformer.weight_dtype", named({**STORED, "nf4": "NFLOAT_4"})),
    (
        "model.timestep_sample_method",
        "timestep_distribution",
        named({"logit_normal": "LOGIT_NORMAL", "uniform": "UNIFORM"}),
    ),
    ("model.shift", "timestep_shift", number),
    ("model.ckpt_path", "base_model_name", model_of),
    ("model.diffusers_path", "base_model_name", model_of),
    ("adapter.type", "peft_type", named({"lora": "LORA", "lokr": "LOKR"})),
    ("adapter.rank", "lora_rank", whole),
    ("adapter.dropout", "lora_dropout", number),
    ("adapter.init_from_existing", "resume_from_adapter", str),
    ("optimizer.type", "optimizer.name", named(OPTIMIZERS)),
    ("optimizer.lr", "learning_rate", number),
    ("optimizer.weight_decay", "optimizer.weight_decay", number),
    ("optimizer.eps", "optimizer.eps", number),
)


def pipe_run(path: Path, value: Table) -> Reading:
    """A main config, with the dataset config that it names."""
    reading = Reading("diffusion-pipe")
    listed = found(value.pop("dataset"), path, "dataset")
    content = parsed(listed)
    if not isinstance(content, dict) or "directory" not in content:
        raise DatasetError(f"{listed}: no [[directory]] in it; it is named as dataset in {path}")
    dataset_into(reading, listed, content)
    pipe_training(reading, path, value)
    reading.same(value, SAME)
    reading.take(value, RULES)
    reading.leave("", value)
    return reading


def pipe_dataset(path: Path, value: Table) -> Reading:
    """A dataset config alone."""
    reading = Reading("diffusion-pipe")
    dataset_into(reading, path, value)
    return reading


def pipe_training(reading: Reading, path: Path, value: Table) -> None:
    """What takes more than one key."""
    adapter, optimizer, model = (inside(value, key, path) for key in ("adapter", "optimizer", "model"))
    batch, steps = whole(value.pop("micro_batch_size_per_gpu", 1)), whole(value.pop("gradient_accumulation_steps", 1))
    if batch and steps:
        reading.set("batch_size", batch * steps, "micro_batch_size_per_gpu")
    reading.set("training_method", "LORA" if "adapter" in value else "FINE_TUNE", "adapter")
    if rank := whole(adapter.get("rank")):
        reading.set("lora_alpha", rank, "adapter.rank")  # diffusion-pipe has alpha = rank
    if "kahan" in (name := str(optimizer.get("type", "")).lower()) or name == "adamw_optimi":
        reading.set("optimizer.rounding", "KAHAN", "optimizer.type")
    for key, beta in zip(("beta1", "beta2"), listing(pop(value, "optimizer.betas")), strict=False):
        reading.set(f"optimizer.{key}", beta, "optimizer.betas")
    low, high = (number(model.get(key)) for key in ("min_t", "max_t"))
    if expert := NOISE_OF.get((low or 0.0, high or 1.0)):
        reading.set("expert", expert, "model.min_t")
        pop(value, "model.min_t"), pop(value, "model.max_t")
    if (clips := value.pop("video_clip_mode", "single_beginning")) == "single_beginning":
        reading.set("windows_per_clip", 1, "video_clip_mode")
    else:
        reading.leave("video_clip_mode", clips)


def dataset_into(reading: Reading, path: Path, value: Table) -> None:
    """Folders, areas and frame counts."""
    for place, table in enumerate(tables(value.pop("directory"), path, "directory")):
        where = f"directory[{place}]"
        folder = found_folder(table.pop("path", ""), path, f"{where}.path")
        reading.add(Part(folder.name, folder=folder, repeats=whole(table.pop("num_repeats", 1)) or 1))
        sizes_into(reading, table, f"{where}.")
        reading.leave(where, table)
    sizes_into(reading, value, "")
    reading.leave("", value)


def sizes_into(reading: Reading, table: Table, where: str) -> None:
    """resolutions, enable_ar_bucket and frame_buckets, of all folders or of one."""
    sizes, buckets = table.pop("resolutions", None), table.pop("enable_ar_bucket", True)
    if sizes is not None and (sides := areas(sizes)) is None:
        reading.leave(f"{where}resolutions", sizes)
    elif sizes is not None:
        squares = ",".join(f"{side}x{side}" for side in str(sides).split(","))
        reading.set("resolution", sides if buckets else squares, f"{where}resolutions")
    counts = reading.counts(table.pop("frame_buckets", None), f"{where}frame_buckets")
    if counts:
        reading.set("frames", counts[-1], f"{where}frame_buckets")
    reading.left += [f"{where}frame_buckets: {count}; only the longest is made" for count in counts[:-1] if count != 1]
