"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    Computed in float32 whatever the dtype of x, as is the product with a float32 weight; the result has the dtype of x.
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:
            return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """RMSNorm whose weight is kept as its difference from one."""

    def forward(self, x: Tensor) -> Tensor:
        # In float32, since 1 + weight has fewer digits left in bfloat16 than the weight has.
        scale = 1.0 + self.weight.to(torch.float32)
        return F.rms_norm(x.to(torch.float32), scale.shape, scale, self.eps).to(x.dtype)
