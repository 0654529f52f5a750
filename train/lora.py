"""Linear layers of the DiT with their LoRA adapters: what reads one input shares the product with the A matrices.

Input: a tensor and the layers that read it. Output: what they say of it. Names: N rows, d columns, r rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn


class _Adapter(NamedTuple):
    down_rd: Tensor
    up_dr: Tensor
    scaling: float
    dropout: nn.Module


def linears(hidden: Tensor, layers: Sequence[nn.Module], fuse: bool = True) -> list[Tensor]:
    """Outputs of linear layers that read the same input.

    Plain peft LoRA layers become base(x) + scaling * B(A(x)) with one product for all A; any layer of another kind, or
    with `fuse` off, is called as the module it is.
    """
    adapters = [_adapter(layer) if fuse else None for layer in layers]
    hidden, lowered = _lower(hidden, [adapter for adapter in adapters if adapter is not None])
    lows, outputs = iter(lowered), []
    for layer, adapter in zip(layers, adapters, strict=True):
        if adapter is None:
            outputs.append(layer(hidden))
            continue
        low = next(lows).flatten(0, -2)
        base: Any = layer.base_layer
        output = base(hidden.flatten(0, -2))  # two dimensions: a view could not be added to so cheaply
        output.addmm_(low, adapter.up_dr.to(low.dtype).t(), alpha=adapter.scaling)
        outputs.append(output.view(*hidden.shape[:-1], -1))
    return outputs


def _lower(hidden: Tensor, adapters: Sequence[_Adapter]) -> tuple[Tensor, Sequence[Tensor]]:
    """x, for those who read it beside the adapters, and A(x) of each adapter.

    In one product unless a dropout gives each its own input.
    """
    if any(isinstance(a.dropout, nn.Dropout) and a.dropout.training for a in adapters):
        return hidden, [F.linear(a.dropout(hidden), a.down_rd.to(hidden.dtype)) for a in adapters]
    if not adapters:
        return hidden, []
    down = [a.down_rd.to(hidden.dtype) for a in adapters]
    stacked = torch.cat(down) if len(down) > 1 else down[0]
    if not hidden.requires_grad or torch.compiler.is_compiling():
        low = F.linear(hidden, stacked)
    else:
        hidden, low = _Lower.apply(hidden, stacked)  # type: ignore[no-untyped-call]
    return hidden, torch.split(low, [len(part) for part in down], dim=-1)


class _Lower(torch.autograd.Function):
    """x and A x, whose gradients meet in the tensor that holds that of x, instead of in a third."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, down_rd: Tensor) -> tuple[Tensor, Tensor]:
        """(..., d) and (r, d) to (..., d) and (..., r)."""
        context.save_for_backward(hidden, down_rd)
        return hidden.view_as(hidden), F.linear(hidden, down_rd)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of x was made by linear layers for this alone: it is added to in place."""
        hidden, down_rd = context.saved_tensors
        hidden_grad_Nd, low_grad_Nr = (gradient.flatten(0, -2) for gradient in gradients)
        hidden_grad_Nd.addmm_(low_grad_Nr, down_rd)
        return hidden_grad_Nd.view_as(hidden), low_grad_Nr.t() @ hidden.flatten(0, -2)


def _adapter(layer: Any) -> _Adapter | None:
    """The one plain LoRA adapter at work in a layer, None when there is something else to honour."""
    if type(layer) is not LoraLinear or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_B[active[0]].bias is not None:
        return None
    name = active[0]
    return _Adapter(
        layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]), layer.lora_dropout[name]
    )
