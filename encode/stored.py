"""Linear layers whose weights are stored in fewer bits and widened for each product (shared/codes.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.codes import SCHEMES, Stored


class StoredLinear(nn.Module):
    """x W^T without bias, W (O, I) made from codes and scales when it is used; the arithmetic is that of x."""

    codes: Tensor
    scale: Tensor

    def __init__(self, weight_OI: Tensor, storage: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.storage, self.shape_OI = storage, (weight_OI.shape[0], weight_OI.shape[1])
        codes, scale = SCHEMES[storage].encode(weight_OI.to(device).float())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("weight", torch.empty(0, dtype=dtype))  # transformers asks its dtype

    def forward(self, x: Tensor) -> Tensor:
        """The product in the dtype of x."""
        return F.linear(x, SCHEMES[self.storage].decode(Stored(self.codes, self.scale), self.shape_OI, x.dtype))
