"""Storage dtypes of frozen weights: codes and scales in plain tensors, made into weights only while these are used.

Input: a Wan DiT. Output: the same module, the weights of the linear layers of its blocks in a StorageDtype; norms,
embeddings, modulation, biases and everything Wan keeps in float32 stay as they are. A stored weight is dequantised in
the forward and again in the backward and never kept by autograd, so a DiT takes the bytes of its codes and scales plus
one matrix (bytes per weight: FLOAT_8 and INT_8 1 + 4 / inputs, NFLOAT_4 0.5625).

Adapters may be added before or after; what is to be merged into the weights must be merged before.

Names: O outputs, I inputs of a linear layer.
"""

import mmap
from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from shared import codes
from shared.codes import CHUNK, NF4_BLOCK, Scheme, Stored
from shared.config import Dtype, StorageDtype
from shared.errors import ModelError
from shared.weights import DTYPES, torch_dtype

LASTING = 1 << 20  # bytes
TORCH_DTYPES: dict[str, torch.dtype] = {name: torch_dtype(name) for name in DTYPES}


def quantize_blocks(network: nn.Module, dtype: StorageDtype, prefix: str = "blocks.") -> None:
    """Store the frozen weights of all linear layers under `prefix` as `dtype`, in place; adapters are left alone.

    A layer whose weight has that dtype already stays a plain linear layer. Raises ModelError on non-finite weights.
    """
    for name, linear in frozen_linears(network, prefix):
        if linear.weight.dtype != TORCH_DTYPES.get(dtype):
            replace_module(network, name, quantized(linear, dtype, name))


def frozen_linears(network: nn.Module, prefix: str = "blocks.") -> list[tuple[str, nn.Linear]]:
    """Names and plain linear layers of the blocks that are neither trained nor part of an adapter."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if type(module) is nn.Linear
        and name.startswith(prefix)
        and ".lora_" not in name
        and not module.weight.requires_grad
    ]


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def quantized(linear: nn.Linear, dtype: StorageDtype, name: str = "weight") -> "QuantizedLinear":
    """A layer that computes what `linear` does, from a stored weight; it shares the bias."""
    bias = None if linear.bias is None else linear.bias.detach()
    return QuantizedLinear(store(linear.weight.detach(), dtype, name), (linear.out_features, linear.in_features), dtype,
                           bias)  # fmt: skip


def store(weight_OI: Tensor, dtype: StorageDtype, name: str = "weight", device: torch.device | None = None) -> Stored:
    """Codes and scales of a weight, computed on `device`, where the weight is. Raises ModelError on NaN or infinity."""
    home = weight_OI.device
    stored = Stored(
        *(lasting(part) if home.type == "cpu" else torch.empty_like(part, device=home)
          for part in encoded_shapes(weight_OI.shape, dtype))
    )  # fmt: skip
    store_rows(weight_OI, stored, dtype, 0, name, device or home)
    return stored


def store_rows(rows_OI: Tensor, into: Stored, dtype: StorageDtype, first: int, name: str, device: torch.device) -> None:
    """Store rows of a weight from row `first` on (a multiple of 64); temporaries are a few MB."""
    whole = NF4_BLOCK // gcd(rows_OI.shape[1], NF4_BLOCK)  # rows that fill their last block
    step = max(whole, CHUNK // rows_OI.shape[1] // whole * whole)
    before = encoded_shapes(torch.Size((first, rows_OI.shape[1])), dtype)
    codes_at, scale_at = len(before.codes), len(before.scale)
    for chunk in torch.split(rows_OI, step):
        codes, scale = SCHEMES[dtype].encode(chunk.to(device).float())
        if not bool((scale if scale.numel() else codes).isfinite().all()):
            raise ModelError(f"{name} holds NaN or infinity; the model file is damaged, download it again")
        into.codes[codes_at : codes_at + len(codes)] = codes.to(into.codes.device)
        into.scale[scale_at : scale_at + len(scale)] = scale.to(into.scale.device)
        codes_at, scale_at = codes_at + len(codes), scale_at + len(scale)


def encoded_shapes(shape_OI: torch.Size, dtype: StorageDtype) -> Stored:
    """Codes and scales of a weight, without data."""
    return SCHEMES[dtype].encode(torch.empty(shape_OI, device="meta"))


def lasting(like: Tensor) -> Tensor:
    """An empty tensor in pages of its own. On the heap, what lasts between what is soon freed would leave holes in it:
    a fifth more memory for ti2v-5b (measured, glibc 2.36)."""
    if like.nbytes < LASTING:
        return torch.empty_like(like, device="cpu")
    pages = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(like.dtype).view(like.shape)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer that holds `codes` and `scale` as buffers. peft wraps it as it wraps any linear layer."""

    codes: Tensor
    scale: Tensor
    away: Stored | None = None  # where they are while layer offload keeps them in RAM

    def __init__(self, stored: Stored, shape_OI: tuple[int, int], dtype: StorageDtype, bias: Tensor | None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.out_features, self.in_features = shape_OI
        self.storage_dtype = dtype
        self.register_buffer("codes", stored.codes)
        self.register_buffer("scale", stored.scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, for those who ask (peft: shape, device and, in DoRA, norms); computed when it is used."""
        return LazyWeight(self)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b in the dtype of x, or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result: Tensor = _StoredMatmul.apply(x, self.bias, self.codes, self.scale, self)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{super().extra_repr()}, storage={self.storage_dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """`.to(dtype)` must not round what is stored: let `fn` see the bytes only."""
        kinds = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        for name in kinds:
            self._buffers[name] = self.get_buffer(name).view(torch.uint8)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kind in kinds.items():
            self._buffers[name] = self.get_buffer(name).view(kind)
        return self


class LazyWeight(Tensor):
    """The (O, I) float32 weight of a QuantizedLinear, decoded by the operation that reads it; it cannot be changed."""

    layer: QuantizedLinear

    @staticmethod
    def __new__(cls, layer: QuantizedLinear) -> "LazyWeight":
        shape = (layer.out_features, layer.in_features)
        lazy: LazyWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=layer.codes.device)
        lazy.layer = layer
        return lazy

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run `func` on decoded weights."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].layer)
        if func._schema.is_mutable:
            raise ModelError("a stored weight cannot be changed; merge adapters into the model before it is quantised")
        args, kwargs = tree_map_only(cls, lambda lazy: restore(lazy.layer, torch.float32), (args, kwargs or {}))
        return func(*args, **kwargs)


class _StoredMatmul(torch.autograd.Function):
    """x W^T + b. The codes are saved for the backward, which makes W once more; W itself is not."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, layer: QuantizedLinear
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.layer = layer
        weight_OI = decode(Stored(codes, scale), layer, x.dtype)
        return F.linear(x, weight_OI, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_x = grad @ decode(Stored(*ctx.saved_tensors), ctx.layer, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None, None


def restore(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """The (O, I) weight of a layer, in `dtype`, on the layer's device."""
    if layer.away is not None and not layer.codes.numel():
        return decode(layer.away, layer, dtype).to(layer.codes.device)
    return decode(Stored(layer.codes, layer.scale), layer, dtype)


def decode(stored: Stored, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """The (O, I) weight from codes and scale that may live elsewhere than in the layer."""
    return SCHEMES[layer.storage_dtype].decode(stored, (layer.out_features, layer.in_features), dtype)


def _cast(dtype: torch.dtype) -> Scheme:
    def encode(rows_OI: Tensor) -> Stored:
        return Stored(rows_OI.to(dtype), rows_OI.new_empty(0))

    def decode_cast(stored: Stored, shape_OI: tuple[int, int], wanted: torch.dtype) -> Tensor:
        return stored.codes.to(wanted)

    return Scheme(encode, decode_cast)


SCHEMES: dict[str, Scheme] = {
    **{name: _cast(dtype) for name, dtype in TORCH_DTYPES.items()},
    **codes.SCHEMES,
}
assert set(SCHEMES) == set(get_args(StorageDtype))


def dtype_name(dtype: torch.dtype) -> StorageDtype:
    """Name of a plain storage dtype."""
    names: tuple[StorageDtype, ...] = get_args(Dtype)
    return next(name for name in names if TORCH_DTYPES[name] == dtype)


def stored_bytes(shape_OI: Sequence[int], dtype: StorageDtype) -> int:
    """Bytes of codes and scales of an (O, I) weight."""
    outputs, inputs = shape_OI
    if dtype in TORCH_DTYPES:
        return outputs * inputs * TORCH_DTYPES[dtype].itemsize
    if dtype == "NFLOAT_4":
        blocks = -(-outputs * inputs // NF4_BLOCK)
        return blocks * (NF4_BLOCK // 2 + 4)
    return outputs * (inputs + 4)
