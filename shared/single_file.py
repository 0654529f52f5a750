"""Single files of ComfyUI users as a model folder: a folder of links and config.json files in diffusers layout.

Input: .safetensors files of a DiT (one per expert), a VAE or a UMT5. Output: a folder under the user's store of such
files; the weights are links, their configs are read off the shapes. No tensor is read, nothing is copied.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.files import built_once, write_json
from shared.keys import fingerprint
from shared.names import diffusers_name, text_name, vae_renamer, without_prefix
from shared.tensors import Entry, Header, places_of, read_header

VIEW_VERSION = 1
HEAD_DIM = 128  # of every published Wan; the shapes do not tell it
CONFIG_KEY = "transformer_config"  # metadata in which a file we wrote says its config
EXPERTS = ("high_noise", "low_noise")
DIT_FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "repackaged.safetensors"
FOREIGN = {"vace": "VACE", "img_emb": "Wan 2.1 I2V (CLIP image inputs)", "k_img": "Wan 2.1 I2V (CLIP image inputs)",
           "face_adapter": "Animate", "motion_encoder": "Animate", "audio": "S2V", "ref_conv": "Fun Control",
           "control_adapter": "Fun Camera"}  # fmt: skip
T5_QUERY = "encoder.block.{}.layer.0.SelfAttention.q.weight"
T5_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"


def is_file_name(name: str) -> bool:
    """Whether a base_model_name means files: 'dit.safetensors', 'high.safetensors,low.safetensors'."""
    return any(part.strip().endswith((".safetensors", ".pth", ".pt", ".ckpt", ".gguf")) for part in name.split(","))


def expert_file(path: Path, expert: str) -> Path:
    """The file of an expert: a name with high_noise or low_noise in it stands for the pair of both."""
    name = path.name
    for other in EXPERTS:
        name = name.replace(other, expert if expert in EXPERTS else other)
    return path.with_name(name)


def weight_file(name: str) -> Path:
    """An existing .safetensors file; pickled files can run code, so no other kind is opened."""
    path = Path(name.strip()).expanduser()
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: only .safetensors files are opened (a pickle can run code, a GGUF cannot be trained "
                         "on); take the .safetensors file of the model")  # fmt: skip
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of a .safetensors file, or a model folder")
    return path.absolute()


def dit_files(name: str) -> tuple[Path, ...]:
    """(file,) or (high_noise, low_noise) of a base_model_name. One of a pair, by its name, finds the other."""
    files = [weight_file(part) for part in name.split(",") if part.strip()]
    if len(files) > 2:
        raise ModelError(f"base_model_name={name}: one file, or two as HIGH.safetensors,LOW.safetensors")
    if len(files) == 1 and any(expert in files[0].name for expert in EXPERTS):
        files = [expert_file(files[0], expert) for expert in EXPERTS]
        if missing := next((path for path in files if not path.is_file()), None):
            raise ModelError(f"{name} is one expert of a pair and {missing} is missing; name both, as "
                             "base_model_name=HIGH.safetensors,LOW.safetensors")  # fmt: skip
    if len(files) == 2 and "low_noise" in files[0].name and "high_noise" in files[1].name:
        raise ModelError(f"base_model_name={name}: the high-noise file comes first")
    return tuple(files)


def dit_folder(files: tuple[Path, ...]) -> Path:
    """A folder with transformer/ (and transformer_2/) for the files of a DiT."""
    configs = [dit_config(path) for path in files]
    if configs[0] != configs[-1]:
        raise ModelError(f"{files[0]} and {files[1]} are not two experts of one model: their sizes differ")
    if len(files) == 1 and configs[0]["in_channels"] == 36:
        raise ModelError(f"{files[0]} is one expert of I2V-A14B; name both, as base_model_name=HIGH.safetensors,"
                         "LOW.safetensors")  # fmt: skip
    boundary = None if len(files) == 1 else 0.9 if configs[0]["in_channels"] == 36 else 0.875  # wan/configs
    index = {"boundary_ratio": boundary, "expand_timesteps": configs[0]["in_channels"] == 48}

    def build(folder: Path) -> None:
        write_json(folder / "model_index.json", index)
        for part, path, config in zip(("transformer", "transformer_2"), files, configs, strict=False):
            write_json(folder / part / "config.json", config)
            (folder / part / DIT_FILE).symlink_to(path)

    return view("dit", files, build)


def view(kind: str, files: Iterable[Path], build: Callable[[Path], None]) -> Path:
    """The folder of these very files."""
    facts = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return built_once(f"{kind}-{fingerprint(files=facts, version=VIEW_VERSION)}", build)


def shapes_of(header: Header) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, without prefix."""
    return {without_prefix(name): entry.shape for name, entry in header.entries.items()}


def dit_config(path: Path) -> dict[str, Any]:
    """config.json of a DiT file; raises ModelError when it is none that can be trained here."""
    header = read_header(path)
    places = places_of(path, lambda _: diffusers_name)
    shapes = {name: place.shape for name, place in places.items()}
    if foreign := next((kind for word, kind in FOREIGN.items() if any(word in name for name in shapes)), None):
        raise ModelError(f"{path}: {foreign} cannot be trained here; use T2V, I2V-A14B or TI2V")
    if any(".lora_" in name or name.endswith(".alpha") for name in shapes):
        raise ModelError(f"{path} is an adapter, no model; give it as base_adapters or resume_from_adapter")
    if "patch_embedding.weight" not in shapes or "proj_out.weight" not in shapes:
        raise ModelError(f"{path} is no Wan DiT (it has no patch_embedding); give the file of diffusion_models/")
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    saved = json.loads(header.metadata.get(CONFIG_KEY, "{}"))
    head_dim = saved.get("attention_head_dim", HEAD_DIM)
    if dim % head_dim:
        raise ModelError(f"{path}: hidden size {dim} is no multiple of {head_dim}, the head size of every known Wan")
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": dim // head_dim,
              "attention_head_dim": head_dim, "in_channels": in_channels, "patch_size": patch,
              "out_channels": shapes["proj_out.weight"][0] // (patch[0] * patch[1] * patch[2]),
              "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
              "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
              "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
              "num_layers": count(shapes, "blocks.{}.ffn.net.2.weight")}  # fmt: skip
    return dict(config | saved)


def count(names: Iterable[str], pattern: str) -> int:
    """How many of pattern.format(0), pattern.format(1), ... there are."""
    known, number = set(names), 0
    while pattern.format(number) in known:
        number += 1
    return number


def is_vae(header: Header) -> int | None:
    """Latent channels of a VAE file with original keys; None when it is something else."""
    first = header.entries.get("decoder.conv1.weight")
    return first.shape[1] if first is not None and "encoder.conv1.weight" in header.entries else None


def vae_config(path: Path) -> dict[str, Any]:
    """config.json of a VAE file, read off its layers; latent statistics are those of the kind (see shared.models)."""
    header = read_header(path)
    if (channels := is_vae(header)) is None:
        raise ModelError(f"{path} is no Wan VAE with original keys; take wan_2.1_vae or wan2.2_vae .safetensors")
    shapes = shapes_of(header)
    nested = "encoder.downsamples.0.downsamples.0.residual.2.weight" in shapes
    levels = _nested_levels(shapes) if nested else _flat_levels(shapes)
    base = shapes["encoder.conv1.weight"][0]
    widths = [next(shape[0] for kind, shape in level if kind == "resnet") for level in levels]
    inner = shapes["encoder.conv1.weight"][1]
    timed = [any(kind == "time" for kind, _ in level) for level in levels[:-1]]
    if (patch := {3: 1, 12: 2}.get(inner)) is None:
        raise ModelError(f"{path}: a VAE of {inner} input channels is no Wan VAE; take wan_2.1_vae or wan2.2_vae")
    return {"_class_name": "AutoencoderKLWan", "base_dim": base, "z_dim": channels, "num_res_blocks":
            sum(kind == "resnet" for kind, _ in levels[0]), "dim_mult": [width // base for width in widths],
            "decoder_base_dim": shapes["decoder.head.2.weight"][1], "attn_scales": [],
            "temperal_downsample": timed, "is_residual": nested, "in_channels": inner, "out_channels": inner,
            "patch_size": patch if patch > 1 else None, "scale_factor_spatial": patch * 2 ** len(timed),
            "scale_factor_temporal": 2 ** sum(timed)}  # fmt: skip


Level = list[tuple[str, tuple[int, ...]]]


def _flat_levels(shapes: dict[str, tuple[int, ...]]) -> list[Level]:
    """Blocks of the Wan 2.1 encoder, cut after each downsampler."""
    levels: list[Level] = [[]]
    for number in range(count_any(shapes, "encoder.downsamples.{}.")):
        stem = f"encoder.downsamples.{number}"
        if f"{stem}.residual.6.weight" in shapes:
            levels[-1].append(("resnet", shapes[f"{stem}.residual.6.weight"]))
        else:
            levels[-1].append(("time" if f"{stem}.time_conv.weight" in shapes else "space", ()))
            levels.append([])
    return levels


def _nested_levels(shapes: dict[str, tuple[int, ...]]) -> list[Level]:
    """Blocks of each level of the Wan 2.2 encoder."""
    levels: list[Level] = []
    for level in range(count_any(shapes, "encoder.downsamples.{}.")):
        stem = f"encoder.downsamples.{level}.downsamples"
        blocks: Level = []
        for number in range(count_any(shapes, stem + ".{}.")):
            resnet = shapes.get(f"{stem}.{number}.residual.6.weight")
            timed = f"{stem}.{number}.time_conv.weight" in shapes
            blocks.append(("resnet", resnet) if resnet else ("time" if timed else "space", ()))
        levels.append(blocks)
    return levels


def count_any(names: Iterable[str], pattern: str) -> int:
    """How many of the prefixes pattern.format(0), ... start a name."""
    known, number = list(names), 0
    while any(name.startswith(pattern.format(number)) for name in known):
        number += 1
    return number


def vae_folder(path: Path, statistics: dict[str, Any]) -> Path:
    """A folder with vae/ for a VAE file; `statistics`: latents_mean and so on, of its kind."""
    config = vae_config(path) | statistics

    def build(folder: Path) -> None:
        write_json(folder / "vae" / "config.json", config)
        (folder / "vae" / DIT_FILE).symlink_to(path)

    return view("vae", [path], build)


def text_width(header: Header) -> int | None:
    """Width of a UMT5 encoder file; None when it is something else. UMT5 has position biases in every block."""
    shapes = {text_name(name): shape for name, shape in shapes_of(header).items()}
    return shapes["shared.weight"][1] if T5_BIAS.format(1) in shapes and "shared.weight" in shapes else None


def text_config(path: Path) -> dict[str, Any]:
    """config.json of a repackaged UMT5 encoder; what shapes do not tell is that of google/umt5-xxl."""
    header = read_header(path)
    if text_width(header) is None:
        raise ModelError(f"{path} is no UMT5 encoder; take the umt5_xxl .safetensors of text_encoders/")
    shapes = {text_name(name): shape for name, shape in shapes_of(header).items()}
    buckets, heads = shapes[T5_BIAS.format(0)]
    layers = count(shapes, T5_QUERY)
    return {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": shapes["shared.weight"][0],
            "d_model": shapes["shared.weight"][1], "d_kv": shapes[T5_QUERY.format(0)][0] // heads, "num_heads": heads,
            "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0], "num_layers": layers,
            "num_decoder_layers": layers, "relative_attention_num_buckets": buckets,
            "relative_attention_max_distance": 128, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6,
            "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "tie_word_embeddings": False,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip


def text_folder(path: Path) -> Path:
    """A folder with text_encoder/ for a UMT5 file, and tokenizer/ when the file holds it or it lies beside."""
    config, header = text_config(path), read_header(path)

    def build(folder: Path) -> None:
        write_json(folder / "text_encoder" / "config.json", config)
        (folder / "text_encoder" / TEXT_FILE).symlink_to(path)
        beside = path.parent / "tokenizer"
        if beside.is_dir():
            (folder / "tokenizer").symlink_to(beside)
        elif "spiece_model" in header.entries:
            write_tokenizer(folder / "tokenizer", path, header.entries["spiece_model"])

    return view("text", [path], build)


def write_tokenizer(folder: Path, path: Path, entry: Entry) -> None:
    """The SentencePiece model that ComfyUI keeps inside a text encoder's file."""
    folder.mkdir(parents=True)
    with path.open("rb") as file:
        file.seek(entry.start)
        (folder / "spiece.model").write_bytes(file.read(entry.stop - entry.start))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0,
                                                  "model_max_length": 512})  # fmt: skip


def beside(dit: Path, fits: Callable[[Header], bool], folders: tuple[str, ...], setting: str) -> Path | None:
    """The one file that fits, beside a DiT file or where ComfyUI keeps its kind; raises ModelError when several do."""
    places = [dit.parent, *(dit.parent.parent / name for name in folders)]
    found = [path for place in places for path in sorted(place.glob("*.safetensors")) if fits(read_header(path))]
    if len(found) > 1:
        raise ModelError(f"{found[0]} and {found[1]} would both do; choose with {setting}=PATH")
    return found[0] if found else None


def vae_names(names: set[str]) -> Callable[[str], str]:
    """Renamer of a VAE's weights: none where they have diffusers names."""
    return vae_renamer(names) if "encoder.conv1.weight" in names else str
