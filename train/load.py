"""A DiT from disk straight into its storage dtype, one matrix at a time. Input: model facts. Output: a frozen DiT.

Weights are read through memory maps, stored as they come, and let go: beyond the stored bytes only one matrix is in
memory at a time (an A14B expert would take 28 GB in 16 bits). The result is saved beside the model once, under a name
made from the content of its files, and mapped from there at the next start.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.config import Dtype, StorageDtype
from shared.errors import ModelError
from shared.files import atomic_write, read_json, write_json
from shared.keys import fingerprint
from shared.models import ModelSpec, refuse_unsupported
from shared.progress import progress
from shared.weights import load_transformer, model_folder, weights_fingerprint
from train.quantize import SCHEMES, TORCH_DTYPES, QuantizedLinear, frozen_linears, replace_module, store

STORAGE_VERSION = 1  # raise it when codes or their layout change
SAVED = "prewan"  # sub-folder of the model folder
SAVE_ABOVE = 256 << 20  # bytes; smaller models are stored anew in less time than a file is worth


def load_quantized(
    spec: ModelSpec, expert: str, dtype: StorageDtype, train_dtype: Dtype = "BFLOAT_16", save_above: int = SAVE_ABOVE
) -> Any:
    """WanTransformer3DModel, frozen: block linears stored as `dtype`, the rest in train_dtype, or float32 as Wan says.

    Raises ModelError when files are missing, damaged or of another model.
    """
    if TORCH_DTYPES.get(dtype) == TORCH_DTYPES[train_dtype]:
        return load_transformer(spec, expert, TORCH_DTYPES[dtype])
    part = dict(spec.expert_folders)[expert]
    folder = model_folder(spec, (part,))
    transformer = skeleton(folder / part, dtype)
    size = sum(path.stat().st_size for path in (folder / part).glob("*.safetensors"))
    saved = saved_path(folder, part, dtype, train_dtype) if size >= save_above else None
    state = read_saved(saved) if saved else None
    if state is None:
        state = stored_state(transformer, folder / part, dtype, train_dtype)
        if saved:
            save(saved, state)
    transformer.load_state_dict(state, assign=True)
    return transformer.eval().requires_grad_(False)


def skeleton(source: Path, dtype: StorageDtype) -> Any:
    """The DiT of a sub-folder's config.json without weights, its block linears ready for stored ones."""
    config = WanTransformer3DModel.load_config(source, local_files_only=True)
    refuse_unsupported(config, str(source))
    with init_empty_weights():
        transformer = WanTransformer3DModel.from_config(config).requires_grad_(False)
    hold_stored(transformer, dtype)
    return transformer


def hold_stored(transformer: Any, dtype: StorageDtype) -> None:
    """Give the block linears of a DiT without data the shapes of stored weights."""
    for name, linear in frozen_linears(transformer):
        shape = (linear.out_features, linear.in_features)
        replace_module(
            transformer, name, QuantizedLinear(SCHEMES[dtype].encode(linear.weight), shape, dtype, linear.bias)
        )


def keeps_float32(transformer: Any, name: str) -> bool:
    """Whether Wan keeps the named weight in float32 (diffusers `_keep_in_fp32_modules`)."""
    return bool(set(transformer._keep_in_fp32_modules) & set(name.split(".")))


def dit_config(spec: ModelSpec) -> dict[str, Any]:
    """Arguments of WanTransformer3DModel: a local folder's config.json, else the model table's facts."""
    source = Path(spec.repo).expanduser() / spec.expert_folders[0][1]
    if source.is_dir():
        config = WanTransformer3DModel.load_config(source, local_files_only=True)
        return {key: value for key, value in config.items() if not key.startswith("_")}
    return {"num_attention_heads": spec.heads, "attention_head_dim": spec.head_dim, "in_channels": spec.in_channels,
            "out_channels": spec.vae.channels, "text_dim": spec.text_dim, "ffn_dim": spec.ffn_dim,
            "num_layers": spec.num_layers, "patch_size": spec.patch_THW}  # fmt: skip


def stored_state(transformer: Any, source: Path, dtype: StorageDtype, train_dtype: Dtype) -> dict[str, Tensor]:
    """Read every weight of a sub-folder and convert it; at most one is in memory unconverted."""
    linears = {name for name, module in transformer.named_modules() if isinstance(module, QuantizedLinear)}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors_of(source):
        module = name.removesuffix(".weight")
        if module in linears:
            state[f"{module}.codes"], state[f"{module}.scale"] = store(tensor, dtype, name, quantizing_device())
        else:
            kept = torch.float32 if keeps_float32(transformer, name) else TORCH_DTYPES[train_dtype]
            state[name] = tensor.to(kept, copy=True)  # a copy, or the map of the whole file would stay
    expected = set(transformer.state_dict())
    if state.keys() != expected:
        odd = sorted(state.keys() ^ expected)
        raise ModelError(f"{source} does not hold the weights of its config.json: {len(odd)} differ, such as {odd[0]}; "
                         "download it again")  # fmt: skip
    return state


def quantizing_device() -> torch.device:
    """Where codes are computed: the GPU takes seconds where a CPU core takes minutes, and the codes are equal."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensors_of(source: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and memory-mapped tensors of all safetensors files in a folder; a map is closed before the next opens."""
    names = [(path, name) for path in sorted(source.glob("*.safetensors")) for name in names_of(path)]
    if not names:
        raise ModelError(f"{source} has no .safetensors file; it must be a complete model folder in diffusers layout")
    with progress(f"read {source.name}", len(names)) as advance:
        for path, name in names:
            with safe_open(path, framework="pt") as file:
                yield name, file.get_tensor(name)
            advance(1)


def names_of(path: Path) -> list[str]:
    """Names of the tensors in a safetensors file, whose length is checked."""
    try:
        with safe_open(path, framework="pt") as file:
            return sorted(file.keys())
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}); download it again") from None


def saved_path(folder: Path, part: str, dtype: StorageDtype, train_dtype: Dtype) -> Path:
    """Where the stored weights of this very content are, or would be."""
    key = fingerprint(weights=content_of(folder / part, folder / SAVED / f"{part}.json"), dtype=dtype,
                      rest=train_dtype, version=STORAGE_VERSION)  # fmt: skip
    return folder / SAVED / f"{part}-{dtype}-{train_dtype}-{key}.safetensors"


def content_of(source: Path, notes: Path) -> str:
    """Fingerprint of a sub-folder's bytes; noted with the files' sizes and times, and not computed again for those."""
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(source.iterdir())]
    if notes.is_file():
        known = read_json(notes)
        if known["files"] == stats:
            return str(known["fingerprint"])
    content = weights_fingerprint(source)
    with suppress(PermissionError):  # a model folder that is shared read-only: hashing again is slower, not wrong
        write_json(notes, {"files": stats, "fingerprint": content})
    return content


def read_saved(path: Path) -> dict[str, Tensor] | None:
    """Map the saved weights; None when there are none, or only what a full disk left of them."""
    if not path.is_file():
        return None
    try:
        return dict(load_file(path))
    except SafetensorError:
        path.unlink()
        return None


def save(path: Path, state: dict[str, Tensor]) -> None:
    """Write stored weights beside the model, in place of older ones; not when the disk is nearly full or read-only."""
    size = sum(tensor.nbytes for tensor in state.values())
    if not os.access(path.parent if path.parent.is_dir() else path.parent.parent, os.W_OK):
        return
    path.parent.mkdir(exist_ok=True)
    if shutil.disk_usage(path.parent).free < 2 * size:
        return
    for older in path.parent.glob(f"{path.name.rpartition('-')[0]}-*"):
        older.unlink(missing_ok=True)
    with atomic_write(path) as file:
        save_file(state, file.name)
