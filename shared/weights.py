"""Where a model's parts are, and loaders of its networks. torch and diffusers are imported inside functions.

Input: a ModelSpec. Output: modules in eval mode, frozen, on the CPU. Weights that Wan keeps in float32 stay float32.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.fetch import HUB_ID, snapshot
from shared.files import atomic_write, kept_folder, read_json, sha256_of
from shared.keys import fingerprint
from shared.models import SPECS, VAE_KINDS, WAN21_VAE, WAN22_VAE, ModelSpec, refuse_unsupported, vae_kind
from shared.names import diffusers_name, text_name
from shared.single_file import (
    TEXT_FILE,
    beside,
    is_file_name,
    is_vae,
    text_folder,
    text_width,
    vae_folder,
    vae_names,
    weight_file,
)
from shared.tensors import Place, places_of, read, read_header

REMEMBERED_SIZE = 64 * 2**20  # bytes; hashing smaller files again takes no time
TABLE_REPOS = {spec.repo for spec in SPECS.values()}
TEXT_HOME = SPECS["ti2v-5b"].repo  # the same UMT5 in all; here it is stored in 16 bits
VAE_HOMES = {WAN21_VAE.channels: SPECS["t2v-a14b"].repo, WAN22_VAE.channels: SPECS["ti2v-5b"].repo}
DTYPES = {"FLOAT_32": "float32", "BFLOAT_16": "bfloat16", "FLOAT_16": "float16"}


def torch_dtype(name: str) -> Any:
    """torch.bfloat16 of the setting 'BFLOAT_16', and so on."""
    import torch

    return getattr(torch, DTYPES[name])


def model_folder(spec: ModelSpec, parts: tuple[str, ...], download: bool = True) -> Path:
    """Local folder that holds the named sub-folders of the model; a Hub id is downloaded, only those parts of it.

    Parts that are asked for together lie together: the DiT's, the VAE, or text_encoder and tokenizer.
    """
    (home,) = {home_of(spec, part) for part in parts}
    folder = Path(home).expanduser()
    if not folder.is_dir():
        folder = snapshot(home, ["model_index.json", *(f"{part}/*" for part in parts)], download)
    if "tokenizer" in parts and (folder / "text_encoder" / TEXT_FILE).exists() and not has(folder, "tokenizer"):
        link_tokenizer(folder, download)
    for part in parts:
        if not has(folder, part):
            raise ModelError(f"{folder} has no {part}/; it must be a complete model folder in diffusers layout")
    return folder


def has(folder: Path, part: str) -> bool:
    """Whether a model folder has a part."""
    return (folder / part).is_dir()


def link_tokenizer(folder: Path, download: bool) -> None:
    """A repackaged text encoder without its tokenizer gets the published one (20 MB)."""
    (folder / "tokenizer").unlink(missing_ok=True)
    (folder / "tokenizer").symlink_to(snapshot(TEXT_HOME, ["tokenizer/*"], download) / "tokenizer")


def home_of(spec: ModelSpec, part: str) -> str:
    """Folder or Hub id of a part. Models of the table share one VAE of a kind and one UMT5, downloaded once."""
    if part not in ("vae", "text_encoder", "tokenizer"):
        return spec.repo
    given = spec.vae_repo if part == "vae" else spec.text_repo
    if given or not (spec.near or spec.repo in TABLE_REPOS):
        return given or spec.repo
    if spec.near and (found := file_beside(spec, part)) is not None:
        return str(found)
    return VAE_HOMES[spec.vae.channels] if part == "vae" else TEXT_HOME


def file_beside(spec: ModelSpec, part: str) -> Path | None:
    """Model folder of the VAE or text encoder file that lies beside a DiT file."""
    dit = Path(spec.near)
    if part == "vae":
        path = beside(dit, lambda header: is_vae(header) == spec.vae.channels, ("vae",), "vae.model_name")
        return path and file_vae(path)
    folders = ("text_encoders", "clip")
    path = beside(dit, lambda header: text_width(header) == spec.text_dim, folders, "text_encoder.model_name")
    return path and text_folder(path)


def file_vae(path: Path) -> Path:
    """Model folder of a VAE file; its latent statistics are those of the published VAE with so many channels."""
    kind = VAE_KINDS.get(is_vae(read_header(path)) or 0)
    statistics = {} if kind is None else {"latents_mean": list(kind.mean), "latents_std": list(kind.std)}
    return vae_folder(path, statistics)


def with_parts(spec: ModelSpec, vae: str | None, text_encoder: str | None) -> ModelSpec:
    """The spec with another VAE or text encoder: a .safetensors file, its folder or the model's, or a Hub id."""
    if text_encoder is not None:
        spec = replace(spec, text_repo=part_home(text_encoder, "text_encoder", text_folder))
    if vae is None:
        return spec
    home = part_home(vae, "vae", file_vae)
    config = Path(home) / "vae" / "config.json"
    kind = vae_kind(read_json(config)) if config.is_file() else spec.vae
    if kind.channels != spec.vae.channels:
        raise ModelError(f"vae.model_name={vae} makes latents of {kind.channels} channels, {spec.name} needs "
                         f"{spec.vae.channels}")  # fmt: skip
    return replace(spec, vae_repo=home, vae=kind)


def part_home(name: str, part: str, of_file: Callable[[Path], Path]) -> str:
    """Model folder or Hub id of a part's setting."""
    path = Path(name).expanduser()
    if is_file_name(name):
        return str(of_file(weight_file(name)))
    if has(path, part):
        return str(path)
    if (path / "config.json").is_file() and path.name == part:
        return str(path.absolute().parent)
    if path.exists() or not re.fullmatch(HUB_ID, name):
        raise ModelError(f"{part}.model_name={name}: neither a .safetensors file, nor a folder {part}/ or one with it, "
                         "nor a Hub id")  # fmt: skip
    return name


def dit_places(source: Path) -> dict[str, Place]:
    """Where the weights of a DiT's sub-folder are, by diffusers name."""
    return places_of(source, lambda _: diffusers_name)


def load_transformer(spec: ModelSpec, expert: str, dtype: Any) -> Any:
    """WanTransformer3DModel of 'single', 'high_noise' or 'low_noise' in `dtype`; frozen."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    part = dict(spec.expert_folders)[expert]
    source = model_folder(spec, (part,)) / part
    config = WanTransformer3DModel.load_config(source)
    refuse_unsupported(config, str(source))
    with init_empty_weights():
        model = WanTransformer3DModel.from_config(config)
    fill(model, dit_places(source), dtype, source)
    return model.eval().requires_grad_(False)


def fill(model: Any, places: Mapping[str, Place], dtype: Any, source: Path) -> None:
    """Give a model without data its weights, in `dtype` (None: float32), or in float32 where the model says so."""
    import torch

    wide = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    refuse_other_weights(source, places, {name: tuple(part.shape) for name, part in model.state_dict().items()})
    state = {}
    for name, place in places.items():
        kept = torch.float32 if wide & set(name.split(".")) else dtype or torch.float32
        state[name] = read(place).to(kept, copy=True)  # a copy, or the map of the whole file would stay
    model.load_state_dict(state, assign=True)


def refuse_other_weights(source: Path, places: Mapping[str, Place], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelError when names or shapes in a folder's files are not those of its config.json."""
    found = {name: place.shape for name, place in places.items()}
    if odd := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        raise ModelError(f"{source} does not hold the weights of its config.json: {len(odd)} differ, such as {odd[0]}; "
                         "download it again")  # fmt: skip


def load_vae(spec: ModelSpec, dtype: Any) -> Any:
    """AutoencoderKLWan in `dtype`; frozen; weights in the order in which convolutions take them."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLWan

    source = model_folder(spec, ("vae",)) / "vae"
    with init_empty_weights():
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(source))
    fill(vae, places_of(source, vae_names), dtype, source)
    return channels_last(vae.eval().requires_grad_(False))


def channels_last(vae: Any) -> Any:
    """Put the weights of three-dimensional convolutions in the order of memory that every call would make of them."""
    import torch

    for weight in vae.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def load_text_encoder(spec: ModelSpec, dtype: Any) -> tuple[Any, Any]:
    """(tokenizer, UMT5EncoderModel in `dtype`); frozen."""
    from transformers import AutoTokenizer

    folder = model_folder(spec, ("text_encoder", "tokenizer"))
    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), load_umt5(spec, dtype)


def load_umt5(spec: ModelSpec, dtype: Any) -> Any:
    """UMT5EncoderModel in `dtype`; frozen. Asserts the tied embedding that early transformers 5 lost."""
    from transformers import AutoConfig, UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar is enough: the caller's
    source: Any = model_folder(spec, ("text_encoder",)) / "text_encoder"
    if (source / TEXT_FILE).exists():  # a repackaged file, perhaps in scaled fp8
        state = {name: read(place) for name, place in text_places(source).items()}
        config = AutoConfig.from_pretrained(source)
        encoder = UMT5EncoderModel.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    else:
        encoder = UMT5EncoderModel.from_pretrained(source, dtype=dtype, local_files_only=True)
    if encoder.shared.weight.data_ptr() != encoder.encoder.embed_tokens.weight.data_ptr():
        raise ModelError("this transformers release leaves UMT5's embedding untied; install transformers >= 5.3")
    return encoder.eval().requires_grad_(False)


def text_places(source: Path) -> dict[str, Place]:
    """Where the weights of a text encoder's folder are, by name."""
    return places_of(source, lambda _: text_name)


def weights_fingerprint(folder: Path) -> str:
    """Hash of every config and weight file in a model sub-folder: names and bytes (about 1 GB/s, once per file)."""
    files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".model"})
    if not files:
        raise ModelError(f"{folder} holds no weights")
    return fingerprint(files={path.name: content_name(path) for path in files})


def content_name(path: Path) -> str:
    """sha256 of a file, not computed where it is known: the Hub names large files by it, others are remembered."""
    target = path.resolve()
    if len(target.name) == hashlib.sha256().digest_size * 2 and target.parent.name == "blobs":
        return target.name
    if (facts := target.stat()).st_size < REMEMBERED_SIZE:
        return sha256_of(target)
    identity = fingerprint(path=str(target), size=facts.st_size, changed=facts.st_mtime_ns)
    note = kept_folder() / "sha256" / identity
    if not note.is_file():
        with atomic_write(note) as file:
            file.write(sha256_of(target).encode())
    return note.read_text()
