"""Linear layers over a Storage, with optional LoRA.

A layer owns a Storage (how the frozen weight is kept) and, when it is adapted, a LoRA (Hu et al. 2021,
arXiv:2106.09685). Neither knows the other: y = x Wᵀ + s · (x Aᵀ) Bᵀ, with the low-rank product added to the same
float32- or bfloat16-accumulated result, so that B = 0 leaves every bit of the base's output as it is.

Shapes: N tokens, E experts, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks.factory import Factory
from quant.products import product_dtype, without_autocast
from quant.storage import Storage


class LoRA(nn.Module):
    """Low-rank update s · B A of a matrix [out, in], or of each matrix of a stack [E, out, in].

    A [R, in] or [E, R, in], drawn from U(-1/√in, 1/√in) unless it is on the meta device; B [out, R] or [E, out, R],
    zero; `scaling` is alpha / R, or alpha / √R when rank-stabilised (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        alpha: float,
        *,
        rslora: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        *experts, out_features, in_features = shape
        self.A = nn.Parameter(torch.empty(*experts, rank, in_features, dtype=dtype, device=device))
        if not self.A.is_meta:
            # PEFT's initialisation, the Kaiming-uniform one with a = √5.
            nn.init.uniform_(self.A, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))
        self.B = nn.Parameter(torch.zeros(*experts, out_features, rank, dtype=dtype, device=device))
        self.rank = rank
        self.alpha = alpha
        self.rslora = rslora
        self.scaling = scaling(rank, alpha, rslora)


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """The s of s · B A."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


class Linear(nn.Module):
    """y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ for x [N, in]: [N, out], in the dtype of x.

    `weight` is a Storage [out, in]; `bias` a Parameter [out] or None; `lora` a LoRA or None. A quantised weight
    is made dense for the product and dropped; the backward pass makes it dense again rather than keep it.
    """

    lora: LoRA | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        factory: Factory,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight: Storage = factory.storage(out_features, in_features)
        self.bias = factory.full(0.0, out_features) if bias else None
        self.lora = None

    def forward(self, x: Tensor) -> Tensor:
        lora = self.lora
        a, b = (lora.A, lora.B) if lora is not None else (None, None)
        return _LoRALinear.apply(x, trained(self.weight), self.bias, a, b, self)


class ExpertWeights(nn.Module):
    """The weights of one projection of all experts, a stack [E, out, in], and their LoRA. Computes nothing itself.

    shape: with all experts of the layer, however many this process has. parts: the matrices that are concatenated
    along `out` in each expert's, by the hub's names.
    """

    lora: LoRA | None

    def __init__(self, shape: tuple[int, int, int], parts: tuple[str, ...], factory: Factory) -> None:
        super().__init__()
        self.shape, self.parts = shape, parts
        self.weight: Storage = factory.storage(*shape)
        self.lora = None


def trained(storage: Storage) -> Tensor | None:
    """The dense weight as a differentiable input when it is being trained itself, otherwise None."""
    value = getattr(storage, "value", None)
    return value if value is not None and value.requires_grad else None


class _LoRALinear(torch.autograd.Function):
    """Forward and backward of Linear. Saves x and x Aᵀ; reads the packed weight through the module both times."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        value: Tensor | None,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        layer: Linear,
    ) -> Tensor:
        dtype = product_dtype(x.device, x.dtype)
        rows = x.to(dtype)
        y = torch.mm(rows, layer.weight.dense(dtype=dtype).t())
        xa = None
        if a is not None and b is not None and layer.lora is not None:
            xa = torch.mm(rows, a.to(dtype).t())
            y.addmm_(xa, b.to(dtype).t(), alpha=layer.lora.scaling)
        if bias is not None:
            y.add_(bias)
        keeps_x = value is not None or a is not None
        ctx.save_for_backward(x if keeps_x else None, xa, a, b)
        ctx.layer, ctx.dtype, ctx.x_dtype = layer, dtype, x.dtype
        return y.to(x.dtype)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, a, b = ctx.saved_tensors
        needs_x, needs_value, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        layer, dtype = ctx.layer, ctx.dtype
        dy = grads[0].to(dtype)
        dx = torch.mm(dy, layer.weight.dense(dtype=dtype)) if needs_x else None
        d_value = d_bias = d_a = d_b = None
        if needs_value:
            d_value = torch.mm(dy.t(), x.to(dtype)).to(layer.weight.dtype)
        if needs_bias:
            d_bias = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype)
        if a is not None:
            scaling = layer.lora.scaling
            d_xa = torch.mm(dy, b.to(dtype)).mul_(scaling)
            if dx is not None:
                dx.addmm_(d_xa, a.to(dtype))
            if needs_a:
                d_a = torch.mm(d_xa.t(), x.to(dtype)).to(a.dtype)
            if needs_b:
                d_b = torch.mm(dy.t(), xa).mul_(scaling).to(b.dtype)
        return dx.to(ctx.x_dtype) if dx is not None else None, d_value, d_bias, d_a, d_b, None
