"""Root-mean-square normalisation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.kernels.rms_norm import add_and_norm, rms_norm, usable


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467).

    Computed in float32 whatever the dtype of x, as is the product with a float32 weight; the result has the dtype of x.
    """

    group: ClassVar[Group] = "norm"
    offset: ClassVar[float] = 0.0  # of the weight from what is kept

    def __init__(self, size: int, eps: float, factory: Factory) -> None:
        super().__init__()
        self.weight = factory.full(1.0, size)
        self.eps = eps

    def forward(self, x: Tensor, room: int = 0) -> Tensor:
        """room: columns beside the result that nothing is written to (models/blocks/linear.py::room)."""
        if usable(x.device):
            return rms_norm(x, self.weight, self.eps, self.offset, room)
        out = self.in_torch(x)
        return F.pad(out, (0, room)) if room else out

    def after(self, x: Tensor, update: Tensor | None = None, room: int = 0, copies: int = 1) -> tuple[Tensor, ...]:
        """x + update, or x itself, and its norm: for a residual stream, whose gradients are then summed at once, with
        those of the `copies` of the norm that are returned.
        """
        if usable(x.device):
            return add_and_norm(x, update, self.weight, self.eps, self.offset, room, copies)
        x = x if update is None else x + update
        return x, *[self(x, room)] * copies

    def in_torch(self, x: Tensor) -> Tensor:
        if self.weight.dtype != x.dtype:
            out: Tensor = _WideRMSNorm.apply(x, self.weight, self.eps)
            return out
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _WideRMSNorm(torch.autograd.Function):
    """With a float32 weight. Keeps x as it is for its gradients, where the ready function would keep a float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32)
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        unit, wide = x.to(torch.float32) * inverse, grad.to(torch.float32)
        dx = dw = None
        if needs_x:
            d_unit = wide * weight
            dx = ((d_unit - unit * (unit * d_unit).mean(-1, keepdim=True)) * inverse).to(x.dtype)
        if needs_weight:
            dw = (wide * unit).flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dw, None


class ZeroCentredRMSNorm(RMSNorm):
    """RMSNorm whose weight is kept as its difference from one."""

    offset = 1.0

    def in_torch(self, x: Tensor) -> Tensor:
        # In float32, since 1 + weight has fewer digits left in bfloat16 than the weight has.
        scale = 1.0 + self.weight.to(torch.float32)
        return F.rms_norm(x.to(torch.float32), scale.shape, scale, self.eps).to(x.dtype)
