"""A DiT from disk straight into its storage dtype, some rows at a time. Input: model facts. Output: a frozen DiT.

Weights are read through memory maps, some rows of a matrix at a time, into tensors that were made before the first was
read: beyond the stored bytes some 100 MB are in memory (an A14B expert would take 28 GB in 16 bits). What is quantised
is saved beside the model once, under a name made from the content of its files, and mapped from there at the next
start.
"""

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.codes import NF4_BLOCK, Stored
from shared.config import Dtype, StorageDtype
from shared.files import atomic_write, read_json, write_json
from shared.keys import fingerprint
from shared.models import ModelSpec, refuse_unsupported
from shared.progress import progress
from shared.tensors import Place, read
from shared.weights import content_name, dit_places, model_folder, refuse_other_weights, weights_fingerprint
from train.merge import Merge
from train.quantize import (
    SCHEMES,
    TORCH_DTYPES,
    QuantizedLinear,
    frozen_linears,
    lasting,
    replace_module,
    store_rows,
)

Adapters = Sequence[tuple[Path, float]]  # (file, strength)
STORAGE_VERSION = 1  # raise it when codes or their layout change
SAVED = "prewan"  # sub-folder of the model folder
PIECE = 1 << 24  # weights read at a time
SAVE_ABOVE = 256 << 20  # bytes; smaller models are stored anew in less time than a file is worth


def load_quantized(
    spec: ModelSpec,
    expert: str,
    dtype: StorageDtype,
    train_dtype: Dtype = "BFLOAT_16",
    adapters: Adapters = (),
    save_above: int = SAVE_ABOVE,
) -> Any:
    """WanTransformer3DModel, frozen: block linears stored as `dtype`, the rest in train_dtype, or float32 as Wan says.

    Raises ModelError when files are missing, damaged or of another model.
    """
    part = dict(spec.expert_folders)[expert]
    folder = model_folder(spec, (part,))
    plain = TORCH_DTYPES.get(dtype) == TORCH_DTYPES[train_dtype]
    transformer = skeleton(folder / part, None if plain else dtype)
    size = sum(path.stat().st_size for path in (folder / part).glob("*.safetensors"))
    saved = saved_path(folder / part, dtype, train_dtype, adapters) if size >= save_above and not plain else None
    state = read_saved(saved) if saved else None
    if state is None:
        state = stored_state(transformer, folder / part, dtype, train_dtype, adapters)
        if saved:
            save(saved, state)
    transformer.load_state_dict(state, assign=True)
    return transformer.eval().requires_grad_(False)


def skeleton(source: Path, dtype: StorageDtype | None) -> Any:
    """The DiT of a sub-folder's config.json without weights, its block linears ready for stored ones, if any."""
    config = WanTransformer3DModel.load_config(source, local_files_only=True)
    refuse_unsupported(config, str(source))
    with init_empty_weights():
        transformer = WanTransformer3DModel.from_config(config).requires_grad_(False)
    if dtype is not None:
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


def stored_state(
    transformer: Any, source: Path, dtype: StorageDtype, train_dtype: Dtype, adapters: Adapters = ()
) -> dict[str, Tensor]:
    """Read every weight of a sub-folder, merge adapters into it and convert it, some rows at a time.

    All results are made first: what lasts, allocated between what is soon freed, would leave holes in the heap.
    """
    linears = {name for name, module in transformer.named_modules() if isinstance(module, QuantizedLinear)}
    state = {name: lasting(as_kept(transformer, name, part, train_dtype, linears))
             for name, part in transformer.state_dict().items()}  # fmt: skip
    wanted = {name: tuple(part.shape) for name, part in state.items() if name.rpartition(".")[0] not in linears}
    for name in linears:
        linear = transformer.get_submodule(name)
        wanted[f"{name}.weight"] = (linear.out_features, linear.in_features)
        if linear.bias is not None:
            wanted[f"{name}.bias"] = (linear.out_features,)
    places = dit_places(source)
    refuse_other_weights(source, places, wanted)
    merge = Merge(adapters, places)
    for name, first, plain in pieces_of(source.name, places):
        rows = merge.rows(name, first, plain)
        module = name.removesuffix(".weight")
        if module in linears:
            into = Stored(state[f"{module}.codes"], state[f"{module}.scale"])
            store_rows(rows, into, dtype, first, name, quantizing_device())
        else:
            state[name][first : first + len(rows)] = rows
    return state


def as_kept(transformer: Any, name: str, part: Tensor, train_dtype: Dtype, linears: set[str]) -> Tensor:
    """A tensor of the state without data, in the dtype in which it is kept."""
    module, _, last = name.rpartition(".")
    if module in linears and last != "bias":
        return part
    return part.to(torch.float32 if keeps_float32(transformer, name) else TORCH_DTYPES[train_dtype])


def quantizing_device() -> torch.device:
    """Where codes are computed: the GPU takes seconds where a CPU core takes minutes, and the codes are equal."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pieces_of(source: str, places: Mapping[str, Place]) -> Iterator[tuple[str, int, Tensor]]:
    """(name, first row, memory-mapped rows) of all tensors, in the order of their files.

    A map is closed before the next opens: pages that were read count as this process's until then.
    """
    with progress(f"read {source}", len(places)) as advance:
        for name, place in places.items():
            step = max(NF4_BLOCK, PIECE // math.prod(place.shape[1:]) // NF4_BLOCK * NF4_BLOCK)
            for first in range(0, place.shape[0], step):
                yield name, first, read(place, slice(first, first + step))
            advance(1)


def saved_path(source: Path, dtype: StorageDtype, train_dtype: Dtype, adapters: Adapters = ()) -> Path:
    """Where the stored weights of this very content are, or would be."""
    folder = source.parent / SAVED
    merged = {"adapters": [[content_name(path), strength] for path, strength in adapters]} if adapters else {}
    key = fingerprint(weights=content_of(source, folder / f"{source.name}.json"), dtype=dtype, rest=train_dtype,
                      version=STORAGE_VERSION, **merged)  # fmt: skip
    return folder / f"{source.name}-{dtype}-{train_dtype}-{key}.safetensors"


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
