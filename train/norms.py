"""Norms of the DiT, in float32 or wider for half-precision inputs, as stock."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def rms_norm(hidden: Tensor, norm: Any, fuse: bool = True) -> Tensor:
    """In the dtype of its weight, which autocast leaves wider than what comes in; the result is as narrow as that.

    With `fuse` off it is called as the module it is.
    """
    given = hidden.to(norm.weight.dtype)
    if fuse and given.device.type != "cuda" and given.dtype not in HALF and not torch.compiler.is_compiling():
        normed: Tensor = RmsNorm.apply(given, norm.weight, norm.eps)  # type: ignore[no-untyped-call]
    else:
        normed = norm(given)
    return normed.type_as(hidden)


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * w. torch has one kernel for it on a GPU, which keeps as much; on a CPU it has ten.

    Zhang and Sennrich 2019, Root Mean Square Layer Normalization. With n = x / rms: dx = (gw - n mean(gw n)) / rms.
    """

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight_d: Tensor, eps: float) -> Tensor:
        """(..., d) and (d,) to (..., d)."""
        size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = (size * size / hidden.shape[-1] + eps).rsqrt_()
        normed = hidden * scale
        context.save_for_backward(normed, weight_d, scale)
        weighted: Tensor = normed * weight_d
        return weighted

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Of input and weight."""
        normed, weight_d, scale = context.saved_tensors
        grad = gradients[0] * weight_d
        along = (grad * normed).mean(-1, keepdim=True)
        grad_weight_d = (gradients[0] * normed).flatten(0, -2).sum(0) if context.needs_input_grad[1] else None
        return grad.addcmul_(normed, along, value=-1).mul_(scale), grad_weight_d, None


def layer_norm(hidden: Tensor, norm: Any) -> Tensor:
    """In float32 or wider; the result stays wide. `nn.Identity` stands for Wan variants without a norm there."""
    given = wide(hidden)
    if isinstance(norm, nn.Identity):
        return given
    weight, bias = (None if part is None else part.to(given.dtype) for part in (norm.weight, norm.bias))
    return F.layer_norm(given, given.shape[-1:], weight, bias, norm.eps)


def wide(values: Tensor) -> Tensor:
    """Half precision to float32; what is wider as it is."""
    return values.float() if values.dtype in HALF else values
