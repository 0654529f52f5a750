"""From trained tensors to the files other programs load. Input: tensors by our names. Output: one safetensors file.

    COMFY_LORA       diffusion_model.<original Wan name>.lora_A.weight / .lora_B.weight / .alpha
    DIFFUSERS_LORA   transformer.<diffusers name>.lora_A.weight / .lora_B.weight, alpha in the file's metadata
    KOHYA_LORA       lora_unet_<original name with underscores>.lora_down.weight / .lora_up.weight / .alpha
    SAFETENSORS      whole weights under original names, or a concept's rows: `embedding` (OUTPUT) or `umt5xxl` (INPUT)
    DIFFUSERS        a folder that WanTransformer3DModel.from_pretrained opens

A text encoder that was trained too has a file `..._text_encoder` of its own, or its sub-folder, under the names of
transformers, which ComfyUI's repackaged UMT5 files have too. `umt5xxl` is the key that ComfyUI's tokenizer of Wan names
(comfyanonymous/ComfyUI `comfy/text_encoders/wan.py`, embedding_key).

ComfyUI's loader and diffusers both apply the alpha keys of the first form; of the second, diffusers reads the rank and
alpha from `lora_adapter_metadata` (huggingface/diffusers `loaders/lora_base.py`). Two experts give two files.
"""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from shared.config import Config, OutputFormat
from shared.files import atomic_write, read_json, write_json
from shared.models import ModelSpec, expert_end
from shared.names import original_name
from shared.resolve import to_json
from shared.single_file import CONFIG_KEY
from shared.tensors import read
from shared.weights import content_name, model_folder, text_places, torch_dtype, weights_fingerprint
from train.adapter_file import base_adapters
from train.optim import EMBEDDING
from train.run import Run
from train.text_encoder import PREFIX

COMFY_EMBEDDING = "umt5xxl"
KOHYA_PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
NETWORKS = {  # ss_network_module and ss_network_args of a kind, as kohya-ss and LyCORIS write them
    "LORA": ("networks.lora", {}),
    "DORA": ("networks.lora", {"dora_wd": "True"}),
    "LOHA": ("lycoris.kohya", {"algo": "loha"}),
    "LOKR": ("lycoris.kohya", {"algo": "lokr"}),
}
TOKEN_TABLE = "shared.weight"


def comfy_lora(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Keys of COMFY_LORA for every kind of adapter; the update is scaled by alpha / rank, so alpha is written too.

    LoHa and LoKr tensors have the names that LyCORIS gave them; DoRA's magnitudes are `dora_scale`, one column. LoKr's
    scale is multiplied into its second factor, because ComfyUI leaves alpha out when both factors are whole matrices.
    """
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        theirs = f"diffusion_model.{original_name(module)}"
        if part == "lora_magnitude_vector":
            named[f"{theirs}.dora_scale"] = value[:, None]
        elif part in ("lokr_w2", "lokr_w2_a"):
            named[f"{theirs}.{part}"] = value * (config.lora_alpha / config.lora_rank)
        else:
            named[f"{theirs}.{part}{'.weight' if part.startswith('lora_') else ''}"] = value
        alpha = config.lora_rank if config.peft_type == "LOKR" else config.lora_alpha
        named[f"{theirs}.alpha"] = torch.tensor(float(alpha))
    return named


def diffusers_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of DIFFUSERS_LORA."""
    return {f"transformer.{name}": value for name, value in tensors.items()}


def kohya_lora(tensors: Mapping[str, Tensor], config: Config, spec: ModelSpec) -> dict[str, Tensor]:
    """Keys of KOHYA_LORA, of LyCORIS for its kinds.

    Modules without a plain LoRA get zeros: diffusers' converter wants all ten of a block.
    """
    named = dict(tensors)
    if config.peft_type == "LORA":
        for block in range(spec.num_layers):
            for module, (outputs, inputs) in block_linears(spec).items():
                name = f"blocks.{block}.{module}"
                named.setdefault(f"{name}.lora_A.weight", torch.zeros(config.lora_rank, inputs))
                named.setdefault(f"{name}.lora_B.weight", torch.zeros(outputs, config.lora_rank))
    result: dict[str, Tensor] = {}
    for key, value in comfy_lora(named, config).items():
        module, part = re.fullmatch(r"diffusion_model\.(.*?)\.(lora_[AB]\.weight|\w+)", key).groups()  # type: ignore[union-attr]
        result[f"lora_unet_{module.replace('.', '_')}.{KOHYA_PARTS.get(part, part)}"] = value
    return result


def block_linears(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linears of a block, by diffusers name."""
    square = (spec.dim, spec.dim)
    linears = {f"{part}.{name}": square for part in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")}
    return linears | {"ffn.net.0.proj": (spec.ffn_dim, spec.dim), "ffn.net.2": (spec.dim, spec.ffn_dim)}


def peft_metadata(config: Config) -> str:
    """`lora_adapter_metadata`: peft's settings of the adapter, under the component's name."""
    settings = {
        "peft_type": "LORA",
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": config.lora_targets,
        "bias": "none",
    }
    return json.dumps({f"transformer.{key}": value for key, value in settings.items()}, sort_keys=True)


def describe(config: Config, spec: ModelSpec, expert: str, steps: int, data: str) -> dict[str, str]:
    """What a file says of its origin; tags as kohya-ss (ss_*) and the ModelSpec standard (modelspec.*) name them."""
    part = dict(spec.expert_folders)[expert]
    base = weights_fingerprint(model_folder(spec, (part,)) / part)
    settings = to_json(config)
    facts = {
        "base_model": config.base_model_name,
        "base_model_hash": base,
        "expert": expert,
        "steps": str(steps),
        "store_fingerprint": data,
        "config": json.dumps(settings, sort_keys=True),
    }
    if merged := base_adapters(config, expert):
        named = [{"file": path.name, "sha256": content_name(path), "strength": value} for path, value in merged]
        facts["base_adapters"] = json.dumps(named)
    if config.training_method == "EMBEDDING":
        concept = config.embedding
        facts |= {"placeholder": concept.placeholder, "initial_text": concept.initial_text, "kind": concept.kind,
                  "token_count": str(concept.token_count)}  # fmt: skip
    if config.training_method == "LORA":
        module, arguments = NETWORKS[config.peft_type]
        facts |= {"ss_network_dim": str(config.lora_rank), "ss_network_alpha": str(config.lora_alpha),
                  "ss_network_module": module, "ss_network_args": json.dumps(arguments)}  # fmt: skip
    if phrase := config.caption_prefix.strip(" ,"):
        facts["modelspec.trigger_phrase"] = phrase
    return facts | {
        "format": "pt",
        "ss_base_model_version": f"wan_{spec.name}",
        "ss_steps": str(steps),
        "ss_learning_rate": str(config.learning_rate),
        "ss_seed": str(config.seed),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"wan_{spec.name}/{config.training_method.lower()}",
        "modelspec.implementation": "https://github.com/Wan-Video/Wan2.2",
        "modelspec.title": f"{spec.name} {config.training_method.lower()}",
        "modelspec.resolution": config.resolution,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
    }


def in_dtype(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors as files hold them, in output_dtype; alpha stays float32."""
    dtype = torch_dtype(config.output_dtype)
    return {
        name: value.detach().cpu().to(torch.float32 if name.endswith(".alpha") else dtype).contiguous()
        for name, value in tensors.items()
    }


def formatted(tensors: Mapping[str, Tensor], config: Config, spec: ModelSpec, form: OutputFormat) -> dict[str, Tensor]:
    """Tensors under the names of a format, in output_dtype."""
    if form == "COMFY_LORA":
        named = comfy_lora(tensors, config)
    elif form == "KOHYA_LORA":
        named = kohya_lora(tensors, config, spec)
    elif form == "DIFFUSERS_LORA":
        named = diffusers_lora(tensors)
    elif config.training_method == "EMBEDDING" and config.embedding.kind == "INPUT":
        named = {COMFY_EMBEDDING: tensors[EMBEDDING]}
    elif form == "SAFETENSORS" and config.training_method == "FINE_TUNE":
        named = {original_name(name): value for name, value in tensors.items()}
    else:
        named = dict(tensors)
    return in_dtype(named, config)


def write_result(
    folder: Path,
    stem: str,
    what: tuple[Run, str, OutputFormat],
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
) -> list[Path]:
    """Write what was trained of (run, expert) in a format; returns the files, or the folder of DIFFUSERS."""
    run, expert, form = what
    text = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
    if form == "DIFFUSERS_LORA":  # beside alpha keys it would scale twice
        metadata = metadata | {"lora_adapter_metadata": peft_metadata(run.config)}
    plain = formatted(tensors, run.config, run.spec, form)
    if form == "SAFETENSORS" and run.config.training_method == "FINE_TUNE":  # the shapes do not tell the head size
        sizes = read_json(config_of(run, expert))
        plainly = {key: value for key, value in sizes.items() if not key.startswith("_")}
        metadata = metadata | {CONFIG_KEY: json.dumps(plainly, sort_keys=True)}
    if form != "DIFFUSERS":
        path = folder / f"{stem}{expert_end(expert)}.safetensors"
        beside = folder / f"{stem}_text_encoder.safetensors"
        if plain:
            write_file(path, plain, metadata)
        if text:
            write_text_encoder(beside, run, text, metadata)
        return [path] * bool(plain) + [beside] * bool(text)
    if plain:
        part = dict(run.spec.expert_folders)[expert]
        write_json(folder / stem / part / "config.json", read_json(config_of(run, expert)))
        write_file(folder / stem / part / "diffusion_pytorch_model.safetensors", plain, metadata)
    if text:
        source = model_folder(run.spec, ("text_encoder",)) / "text_encoder" / "config.json"
        write_json(folder / stem / "text_encoder" / "config.json", read_json(source))
        write_text_encoder(folder / stem / "text_encoder" / "model.safetensors", run, text, metadata)
    return [folder / stem]


def config_of(run: Run, expert: str) -> Path:
    """The config.json of an expert's DiT."""
    part = dict(run.spec.expert_folders)[expert]
    return model_folder(run.spec, (part,)) / part / "config.json"


def write_text_encoder(path: Path, run: Run, text: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the trained blocks of UMT5 with the token vectors they belong to."""
    source = model_folder(run.spec, ("text_encoder",)) / "text_encoder"
    places = text_places(source)
    table = read(places.get(TOKEN_TABLE) or places["encoder.embed_tokens.weight"])
    write_file(path, in_dtype({TOKEN_TABLE: table, **text}, run.config), metadata)


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file, atomically."""
    with atomic_write(path) as file:
        file.write(save(dict(tensors), metadata))
