"""Settings that contradict the model, the method or each other: refused before torch loads. Errors: ConfigError."""

from shared.config import Config, OptimizerConfig
from shared.errors import ConfigError
from shared.models import ModelSpec
from train.updates import SEPARABLE, is_blockwise

# numbers that an optimizer has not
WITHOUT = {"ADAFACTOR": ("beta1", "beta2", "eps"), "MUON": ("beta2",), "CAME": ("eps",), "LION": ("eps",)}


def refuse_contradictions(config: Config, spec: ModelSpec) -> None:
    """Settings that contradict the model."""
    if config.model_type == "WAN_2_1" and (spec.boundary is not None or spec.image_condition == "first_frame"):
        raise ConfigError(f"model_type=WAN_2_1: {spec.name} is a model of Wan 2.2; use WAN_2_2")
    if config.expert != "both" and spec.boundary is None:
        raise ConfigError(f"expert={config.expert}: {spec.name} has one expert; leave expert at both")
    if config.expert_share is not None and (spec.boundary is None or config.expert != "both"):
        raise ConfigError(f"expert_share={config.expert_share}: there is one expert to train; leave it at null")
    if config.first_frame_conditioning_probability and spec.image_condition != "first_frame":
        raise ConfigError(
            f"first_frame_conditioning_probability={config.first_frame_conditioning_probability}: "
            f"{spec.name} takes no clean first frame; leave it at 0"
        )
    if config.text_encoder.train and spec.boundary is not None:
        raise ConfigError(f"text_encoder.train: the experts of {spec.name} are trained one after the other, and one "
                          "text encoder cannot follow both; leave it off")  # fmt: skip
    refuse_method_mismatch(config)


def refuse_method_mismatch(config: Config) -> None:
    """Settings that contradict the training method."""
    storage, compute = config.transformer.weight_dtype, config.train_dtype
    wide = " or ".join(dict.fromkeys(("FLOAT_32", compute)))  # what trained weights are stored in
    form, kind = f"output_model_format={config.output_model_format}", f"peft_type={config.peft_type}"
    method, text = config.training_method, config.text_encoder
    whole, lora = method == "FINE_TUNE", method == "LORA"
    dit = config.trains_dit
    plain = config.peft_type == "LORA"
    lora_form = config.output_model_format.endswith("_LORA")
    rounding = config.optimizer.rounding
    contradictions = {
        f"transformer.weight_dtype={storage}: FINE_TUNE updates the weights; use {wide}":
            dit and storage not in (compute, "FLOAT_32"),
        "transformer.train=false: LORA is an adapter of the transformer, so nothing would be trained; leave it on":
            lora and not config.transformer.train,
        "transformer.train=false: nothing would be trained; leave it on, or set text_encoder.train=true":
            whole and not config.transformer.train and not text.train,
        "prior.prediction needs the untrained model beside the trained one; use LORA, or leave it off":
            whole and config.prior.prediction,
        f"{form}: FINE_TUNE gives whole weights; use SAFETENSORS or DIFFUSERS": whole and lora_form,
        f"{form}: EMBEDDING gives a concept's vectors; use SAFETENSORS":
            method == "EMBEDDING" and config.output_model_format != "SAFETENSORS",
        f"text_encoder.train: {method} leaves the text encoder as it is, and needs none in memory for stored text; use "
        "FINE_TUNE, or leave it off": text.train and not whole,
        f"text_encoder.weight_dtype={text.weight_dtype}: text_encoder.train updates the weights; use "
        f"{wide}": text.train and text.weight_dtype not in (compute, "FLOAT_32"),
        f"{form}: LORA gives an adapter; use COMFY_LORA, DIFFUSERS_LORA or KOHYA_LORA": lora and not lora_form,
        f"{form} cannot hold {kind}, of which diffusers reads nothing; use COMFY_LORA or KOHYA_LORA":
            lora and not plain and config.output_model_format == "DIFFUSERS_LORA",
        "resume_from_adapter starts plain LoRA training; it needs training_method and peft_type LORA":
            config.resume_from_adapter is not None and not (lora and plain),
        f"optimizer.rounding={rounding} is for trained weights in BFLOAT_16; use NEAREST":
            rounding != "NEAREST" and "BFLOAT_16" not in ([storage] * dit + [text.weight_dtype] * text.train),
        "transformer.weight_dtype=FLOAT_16: small updates of such weights vanish, and loss scaling cannot help; use "
        "FLOAT_32": dit and storage == "FLOAT_16",
        "text_encoder.weight_dtype=FLOAT_16: small updates of such weights vanish, and loss scaling cannot help; use "
        "FLOAT_32": text.train and text.weight_dtype == "FLOAT_16",
        "clip=BLOCK limits each block's norm in a full fine-tune of one process, not in FLOAT_16, with optimizer.name "
        f"{', '.join(SEPARABLE)}; use GLOBAL": config.clip == "BLOCK" and not is_blockwise(config),
    }  # fmt: skip
    for message, contradicts in (contradictions | optimizer_contradictions(config)).items():
        if contradicts:
            raise ConfigError(message)


def optimizer_contradictions(config: Config) -> dict[str, bool]:
    """Settings that contradict the optimizer: what is wrong, and whether it is."""
    settings = config.optimizer
    free = settings.name == "SCHEDULE_FREE_ADAMW"
    given, usual = settings.model_dump(), OptimizerConfig().model_dump()
    without = {f"optimizer.{key}={given[key]}: {settings.name} has no such number; leave it at {usual[key]}":
               given[key] != usual[key] for key in WITHOUT.get(settings.name, ())}  # fmt: skip
    return without | {
        f"lr_scheduler={config.lr_scheduler}: {settings.name} takes the place of a schedule; use CONSTANT":
            free and config.lr_scheduler != "CONSTANT",
        f"ema={config.ema}: {settings.name} averages the weights by itself; leave it at null":
            free and config.ema is not None,
        f"optimizer.rounding={settings.rounding}: {settings.name} keeps weights of its own; use NEAREST and "
        "transformer.weight_dtype=FLOAT_32": free and settings.rounding != "NEAREST",
        f"optimizer.beta1={settings.beta1}: {settings.name} averages with it; use 0.9": free and settings.beta1 == 0,
    }  # fmt: skip
