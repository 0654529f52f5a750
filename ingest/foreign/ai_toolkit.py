"""ostris/ai-toolkit: a job's YAML or JSON (key names: its config/examples and toolkit/config_modules.py)."""

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
    folder_part,
    found_folder,
    inside,
    integer,
    listing,
    model_of,
    named,
    number,
    pop,
    tables,
    whole,
)
from shared.errors import DatasetError

SAME = {
    "type": "sd_trainer",
    "train.train_unet": True,
    "train.noise_scheduler": "flowmatch",
    "train.cache_text_embeddings": True,
    "train.unload_text_encoder": True,
    "sample.sampler": "flowmatch",
    "save.save_format": "diffusers",
}
SHARED: tuple[Rule, ...] = (  # of a dataset; one value here for all of them
    ("resolution", "resolution", areas),
    ("num_frames", "frames", whole),
    ("fps", "video_config.target_fps", number),
    ("caption_dropout_rate", "caption_dropout_probability", number),
)
RULES: tuple[Rule, ...] = (
    ("trigger_word", "caption_prefix", str),
    ("network.type", "peft_type", named({"lora": "LORA", "lokr": "LOKR", "loha": "LOHA", "dora": "DORA"})),
    ("network.linear", "lora_rank", whole),
    ("network.linear_alpha", "lora_alpha", number),
    ("network.dropout", "lora_dropout", number),
    ("save.dtype", "output_dtype", named(DTYPES)),
    ("save.save_every", "save_after", whole),
    ("train.steps", "max_steps", whole),
    ("train.lr", "learning_rate", number),
    ("train.optimizer", "optimizer.name", named(OPTIMIZERS)),
    ("train.optimizer_params.weight_decay", "optimizer.weight_decay", number),
    ("train.max_grad_norm", "max_grad_norm", number),
    ("train.dtype", "train_dtype", named(DTYPES)),
    (
        "train.timestep_type",
        "timestep_distribution",
        named({"linear": "UNIFORM", "sigmoid": "LOGIT_NORMAL"}),
    ),
    ("model.qtype", "transformer.weight_dtype", named(STORED)),
    ("sample.sample_every", "sample_after", whole),
    ("sample.neg", "sample_negative_prompt", str),
    ("sample.seed", "sample_seed", integer),
    ("sample.sample_steps", "sample_steps", whole),
    ("sample.guidance_scale", "sample_guidance_scale", number),
)


def toolkit(path: Path, value: Table) -> Reading:
    """A training job."""
    reading = Reading("ai-toolkit")
    config = value.pop("config")
    process = config.get("process") if isinstance(config, dict) else None
    job = tables(process, path, "config.process")[0]
    for place, table in enumerate(tables(job.pop("datasets", None), path, "datasets")):
        where = f"datasets[{place}]."
        reading.add(part_of(path, table, where))
        reading.take(table, SHARED, where)
        if reading.settings.get("frames") == 1:
            table.pop("shrink_video_to_frames", None)
        reading.leave(where.rstrip("."), table)
    training(reading, path, job)
    reading.same(job, SAME)
    reading.take(job, RULES)
    for key in ("training_folder", "device"):  # the command line says where it runs
        job.pop(key, None)
    reading.leave("", job)
    return reading


def part_of(path: Path, table: Table, where: str) -> Part:
    """The files of one dataset."""
    key = next((key for key in ("folder_path", "dataset_path") if table.get(key)), None)
    if key is None:
        raise DatasetError(f"{path}: {where}folder_path is missing; it names the folder of videos and captions")
    folder, prior = found_folder(table.pop(key), path, where + key), bool(table.pop("is_reg", False))
    extension, repeats = str(table.pop("caption_ext", None) or "txt"), whole(table.pop("num_repeats", 1)) or 1
    return folder_part(folder, extension, repeats, prior)


def training(reading: Reading, path: Path, job: Table) -> None:
    """What takes more than one key."""
    train, model = inside(job, "train", path), inside(job, "model", path)
    batch, steps = whole(train.pop("batch_size", 1)), whole(train.pop("gradient_accumulation", 1))
    if batch and steps:
        reading.set("batch_size", batch * steps, "train.batch_size")
    reading.set("training_method", "LORA" if job.get("network") else "FINE_TUNE", "network")
    if (checkpointing := train.pop("gradient_checkpointing", None)) is not None:
        reading.set("gradient_checkpointing", "DEFAULT" if checkpointing else "NONE", "train.gradient_checkpointing")
    names = [str(name) for name in (model.get("name_or_path"), model.get("arch")) if name]
    if found_model := next(filter(None, map(model_of, names)), None):
        reading.set("base_model_name", found_model, "model.arch")
        model.pop("name_or_path", None), model.pop("arch", None)
    experts = {name: pop(model, f"model_kwargs.train_{name}") for name in ("high_noise", "low_noise")}
    if False in experts.values() and True in experts.values():
        reading.set("expert", next(name for name, trained in experts.items() if trained), "model.model_kwargs")
    if pop(job, "train.ema_config.use_ema"):
        reading.set("ema", number(pop(job, "train.ema_config.ema_decay")) or 0.99, "train.ema_config")
    if not model.pop("quantize", False):
        model.pop("qtype", None)
    word = str(job.get("trigger_word") or "")
    if prompts := listing(pop(job, "sample.prompts")):
        reading.set("sample_prompts", [str(text).replace("[trigger]", word) for text in prompts], "sample.prompts")
