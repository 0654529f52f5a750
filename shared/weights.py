"""Loaders of frozen and trained networks from a diffusers folder. torch and diffusers are imported inside functions.

Input: a ModelSpec. Output: modules in eval mode, frozen, on the CPU. Weights that Wan keeps in float32 stay float32.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from shared.errors import ModelError
from shared.files import atomic_write, sha256_of
from shared.keys import fingerprint
from shared.models import ModelSpec, refuse_unsupported

REMEMBERED_SIZE = 64 * 2**20  # bytes; hashing smaller files again takes no time
DTYPES = {"FLOAT_32": "float32", "BFLOAT_16": "bfloat16", "FLOAT_16": "float16"}


def torch_dtype(name: str) -> Any:
    """torch.bfloat16 of the setting 'BFLOAT_16', and so on."""
    import torch

    return getattr(torch, DTYPES[name])


def model_folder(spec: ModelSpec, parts: tuple[str, ...], download: bool = True) -> Path:
    """Local folder that holds the named sub-folders of the model; a Hub id is downloaded, only those parts of it."""
    folder = Path(spec.repo).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            patterns = ["model_index.json", *(f"{part}/*" for part in parts)]
            folder = Path(snapshot_download(spec.repo, allow_patterns=patterns, local_files_only=not download))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"{spec.repo}: cannot be downloaded ({str(error).splitlines()[0]}); check the network, or "
                "give a local folder with MODEL=path"
            ) from None
    for part in parts:
        if not (folder / part).is_dir():
            raise ModelError(f"{folder} has no {part}/; it must be a complete model folder in diffusers layout")
    return folder


def load_transformer(spec: ModelSpec, expert: str, dtype: Any) -> Any:
    """WanTransformer3DModel of 'single', 'high_noise' or 'low_noise' in `dtype`; frozen."""
    from diffusers import WanTransformer3DModel

    part = dict(spec.expert_folders)[expert]
    folder = model_folder(spec, (part,))
    refuse_unsupported(WanTransformer3DModel.load_config(folder / part), str(folder / part))
    model = WanTransformer3DModel.from_pretrained(folder, subfolder=part, torch_dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)


def load_vae(spec: ModelSpec, dtype: Any) -> Any:
    """AutoencoderKLWan in `dtype`; frozen."""
    from diffusers import AutoencoderKLWan

    folder = model_folder(spec, ("vae",))
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, local_files_only=True)
    return vae.eval().requires_grad_(False)


def load_text_encoder(spec: ModelSpec, dtype: Any) -> tuple[Any, Any]:
    """(tokenizer, UMT5EncoderModel in `dtype`); frozen. Asserts the tied embedding that early transformers 5 lost."""
    from transformers import AutoTokenizer, UMT5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar is enough: the caller's
    folder = model_folder(spec, ("text_encoder", "tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True)
    if encoder.shared.weight.data_ptr() != encoder.encoder.embed_tokens.weight.data_ptr():
        raise ModelError("this transformers release leaves UMT5's embedding untied; install transformers >= 5.3")
    return tokenizer, encoder.eval().requires_grad_(False)


def weights_fingerprint(folder: Path) -> str:
    """Hash of every config and weight file in a model sub-folder: names and bytes (about 1 GB/s, once per file)."""
    files = sorted(path for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".model"})
    if not files:
        raise ModelError(f"{folder} holds no weights")
    return fingerprint(files={path.name: _content_name(path) for path in files})


def _content_name(path: Path) -> str:
    """sha256 of a file, not computed where it is known: the Hub names large files by it, others are remembered."""
    target = path.resolve()
    if len(target.name) == hashlib.sha256().digest_size * 2 and target.parent.name == "blobs":
        return target.name
    if (facts := target.stat()).st_size < REMEMBERED_SIZE:
        return sha256_of(target)
    identity = fingerprint(path=str(target), size=facts.st_size, changed=facts.st_mtime_ns)
    note = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prewan" / "sha256" / identity
    if not note.is_file():
        with atomic_write(note) as file:
            file.write(sha256_of(target).encode())
    return note.read_text()
