"""Linear layers over a Storage, with optional LoRA.

A layer owns a Storage (how the frozen weight is kept) and, when it is adapted, a LoRA (Hu et al. 2021,
arXiv:2106.09685). Neither knows the other: y = x Wᵀ + s · (x Aᵀ) Bᵀ, with the low-rank product added to the same
float32- or bfloat16-accumulated result, so that B = 0 leaves every bit of the base's output as it is; where an
accelerator makes one product of both (`room`), it adds zeros to that product's sums.

Shapes: N tokens, E experts, R rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks.factory import Factory
from quant.common.devices import on_cpu
from quant.products import product_dtype, without_autocast
from quant.storage import Storage
from quant.together import dense_together, together_at_once


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


# Whether what a layer saves lives only from its recomputation to its gradients (activation checkpointing): its dense
# weights are then kept for them, rather than made once more.
_keeps_dense: ContextVar[bool] = ContextVar("keeps_dense", default=False)


@contextmanager
def keeping_dense() -> Iterator[None]:
    """Around a layer's computation and its recomputation, which have to save alike."""
    before = _keeps_dense.set(True)
    try:
        yield
    finally:
        _keeps_dense.reset(before)


class Linear(nn.Module):
    """y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ for x [N, in]: [N, out], in the dtype of x.

    `weight` is a Storage [out, in]; `bias` a Parameter [out] or None; `lora` a LoRA or None. A quantised weight
    is made dense for the product and dropped; the backward pass makes it dense again rather than keep it, unless it
    follows at once (`keeping_dense`).
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
        return together(x, self)[0]

    def adapted(self) -> Tensor:
        """The matrix [out, in] that x is multiplied by, without gradients: W + s · B A in float32, or W without LoRA.

        For products that are no `forward`, of narrow matrices: this is a copy.
        """
        lora, dtype = self.lora, product_dtype(self.weight.device, self.weight.dtype)
        if lora is None:
            return self.weight.dense(dtype=dtype)
        a, b = lora.A.detach().to(torch.float32), lora.B.detach().to(torch.float32)
        return torch.addmm(self.weight.dense(dtype=torch.float32), b, a, alpha=lora.scaling)


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


def together(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """What each of the layers makes of the same x [N, in].

    In fewer operations than one after another: the A of all LoRA are multiplied at once, and the products that give
    the gradient of x add to one another. x may be [N, in + room(*layers)], whose last columns are written here.
    """
    beside = x.shape[1] - layers[0].in_features
    if beside and beside == room(*layers):
        pairs = [(layer.lora.A, layer.lora.B) if layer.lora is not None else (None, None) for layer in layers]
        joined: tuple[Tensor, ...] = _SideBySide.apply(x, layers, *itertools.chain(*pairs))
        return joined
    if beside:
        x = x[:, : layers[0].in_features]
    tensors: list[Tensor | None] = []
    for layer in layers:
        a, b = (layer.lora.A, layer.lora.B) if layer.lora is not None else (None, None)
        tensors += [trained(layer.weight), layer.bias, a, b]
    out: tuple[Tensor, ...] = _LoRALinear.apply(x, layers, *tensors)
    return out


def room(*layers: Linear) -> int:
    """How many columns beside their x [N, in] these layers want for x Aᵀ, where that makes their LoRA a part of the
    products with their dense weights. None on a CPU. They are to be used by these layers alone, together.
    """
    loras = [layer.lora for layer in layers if layer.lora is not None]
    columns = sum(lora.rank for lora in loras)
    # Rows of a multiple of 16 bytes; one factor for all that is joined.
    fit = columns % 8 == 0 and len({lora.scaling for lora in loras}) == 1
    plain = all(layer.bias is None for layer in layers)
    return columns if fit and plain and together_at_once([layer.weight for layer in layers]) else 0


class _SideBySide(torch.autograd.Function):
    """`together` where x has room: [x, s · x Aᵀ] times dense weights with B beside them. Gradients come likewise: dy
    times both is dx beside dy B. Sums are the products' own; an untrained B adds zeros to them.
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, layers: tuple[Linear, ...], *pairs: Tensor | None) -> tuple[Tensor, ...]:
        sizes = [layer.out_features for layer in layers]
        columns, height = layers[0].in_features, sum(sizes)
        dense = _side_by_side(x, layers, pairs)
        scale = next(layer.lora.scaling for layer in layers if layer.lora is not None)
        x[:, columns:].addmm_(x[:, :columns], dense[height:, :columns].t(), beta=0, alpha=scale)
        ctx.save_for_backward(x, dense if _keeps_dense.get() else None, *pairs)
        ctx.layers, ctx.scale = layers, scale
        return torch.mm(x, dense[:height].t()).split(sizes, 1)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, dense, *pairs = ctx.saved_tensors
        layers: tuple[Linear, ...] = ctx.layers
        sizes = [layer.out_features for layer in layers]
        columns, height = layers[0].in_features, sum(sizes)
        if dense is None:
            dense = _side_by_side(x, layers, pairs)
        needs_x = ctx.needs_input_grad[0]
        first = 0 if needs_x else columns
        d = torch.empty_like(x)
        for index, (dy, part) in enumerate(zip(grads, dense[:height].split(sizes), strict=True)):
            d[:, first:].addmm_(dy, part[:, first:], beta=min(index, 1))
        d_inner, rows = d[:, columns:], x[:, :columns]
        d_a = dense.new_empty(d_inner.shape[1], columns)
        d_a.addmm_(d_inner.t(), rows, beta=0, alpha=ctx.scale)
        if needs_x:
            d[:, :columns].addmm_(d_inner, dense[height:, :columns], alpha=ctx.scale)
        result: list[Tensor | None] = []
        each = zip(grads, _parts(x[:, columns:], pairs[1::2]), _parts(d_a, pairs[1::2], dim=0), strict=True)
        for index, (dy, inner, own) in enumerate(each):
            needs_a, needs_b = ctx.needs_input_grad[2 + 2 * index :][:2]
            a, b = pairs[2 * index : 2 * index + 2]
            result.append(own.to(a.dtype) if needs_a and own is not None and a is not None else None)
            wanted = needs_b and inner is not None and b is not None
            result.append(torch.mm(dy.t(), inner).to(b.dtype) if wanted else None)  # type: ignore[arg-type]
        return d if needs_x else None, None, *result


def _side_by_side(x: Tensor, layers: Sequence[Linear], pairs: Sequence[Tensor | None]) -> Tensor:
    """Dense weights, and A and B, of all layers: [Σ out + Σ R, in + Σ R]."""
    ranks = x.shape[1] - layers[0].in_features
    dense = x.new_empty(sum(layer.out_features for layer in layers) + ranks, x.shape[1])
    dense_together([layer.weight for layer in layers], pairs[0::2], pairs[1::2], out=dense)
    return dense


class _LoRALinear(torch.autograd.Function):
    """Forward and backward of `together`. Saves x and x Aᵀ; reads packed weights through their modules both times."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, layers: tuple[Linear, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        values, biases, a, b = (tensors[part::4] for part in range(4))
        dtype = product_dtype(x.device, x.dtype)
        rows = x.to(dtype)
        narrow = [matrix.to(dtype) for matrix in a if matrix is not None]
        widen = [matrix.to(dtype) if matrix is not None else None for matrix in b]
        all_a = (torch.cat(narrow) if len(narrow) > 1 else narrow[0]) if narrow else None
        inner = torch.mm(rows, all_a.t()) if all_a is not None else None
        outputs, dense = [], []
        joined = _base_products(rows, layers)
        each = zip(layers, biases, widen, _parts(inner, widen), joined, strict=True)
        for layer, bias, matrix, part, (y, weight) in each:
            if y is None or weight is None:
                weight = layer.weight.dense(dtype=dtype)
                y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias.to(dtype), rows, weight.t())
            dense.append(weight if _keeps_dense.get() else None)
            if layer.lora is not None and matrix is not None and part is not None:
                y.addmm_(part, matrix.t(), alpha=layer.lora.scaling)
            outputs.append(y.to(x.dtype))
        keeps_x = inner is not None or any(value is not None for value in values)
        ctx.save_for_backward(x if keeps_x else None, inner, all_a, *widen, *dense)
        ctx.layers, ctx.dtype, ctx.x_dtype = layers, dtype, x.dtype
        return tuple(outputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, all_a, *rest = ctx.saved_tensors
        widen, dense = rest[: len(ctx.layers)], rest[len(ctx.layers) :]
        dtype, needs_x = ctx.dtype, ctx.needs_input_grad[0]
        rows = x.to(dtype) if x is not None else None
        d_inner = torch.empty_like(inner) if inner is not None else None
        dx: Tensor | None = None
        result: list[Tensor | None] = []
        wanted: list[bool] = []  # of each layer's A
        each = zip(ctx.layers, grads, widen, _parts(inner, widen), _parts(d_inner, widen), strict=True)
        for index, (layer, grad, matrix, part, d_part) in enumerate(each):
            needs_value, needs_bias, needs_a, needs_b = ctx.needs_input_grad[2 + 4 * index :][:4]
            dy = grad.to(dtype)
            if needs_x:
                weight = layer.weight.dense(dtype=dtype) if dense[index] is None else dense[index]
                dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
            d_value = torch.mm(dy.t(), rows).to(layer.weight.dtype) if needs_value and rows is not None else None
            d_bias = dy.sum(0, dtype=torch.float32).to(layer.bias.dtype) if needs_bias else None
            d_b = None
            if matrix is not None and part is not None and d_part is not None:
                d_part.addmm_(dy, matrix, beta=0, alpha=layer.lora.scaling)
                if needs_b:
                    d_b = torch.empty_like(matrix).addmm_(dy.t(), part, beta=0, alpha=layer.lora.scaling)
                    d_b = d_b.to(layer.lora.B.dtype)
            result += [d_value, d_bias, None, d_b]
            wanted.append(needs_a)
        if d_inner is not None:
            if dx is not None:
                dx.addmm_(d_inner, all_a)
            if any(wanted) and rows is not None:
                parts = _parts(torch.mm(d_inner.t(), rows), widen, dim=0)
                for index, (layer, d_a) in enumerate(zip(ctx.layers, parts, strict=True)):
                    result[4 * index + 2] = d_a.to(layer.lora.A.dtype) if wanted[index] and d_a is not None else None
        return dx.to(ctx.x_dtype) if dx is not None else None, None, *result


def _base_products(rows: Tensor, layers: Sequence[Linear]) -> Sequence[tuple[Tensor | None, Tensor | None]]:
    """Each layer's product without bias, and its dense weight, where an accelerator makes one product of them all."""
    sizes = [layer.out_features for layer in layers]
    apart = any(layer.weight.kind == "none" or layer.bias is not None for layer in layers)
    if on_cpu(rows.device) or len(layers) == 1 or apart:
        return [(None, None)] * len(layers)
    joined = rows.new_empty(sum(sizes), rows.shape[1])
    weights = joined.split(sizes)
    if together_at_once([layer.weight for layer in layers]):
        nothing = [None] * len(layers)
        dense_together([layer.weight for layer in layers], nothing, nothing, out=joined)
    else:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.dense(out=weight)
    return list(zip(torch.mm(rows, joined.t()).split(sizes, 1), weights, strict=True))


def _parts(joined: Tensor | None, matrices: Sequence[Tensor | None], dim: int = 1) -> list[Tensor | None]:
    """Each layer's R columns (or rows) of what is joined over the layers with LoRA, by their B [out, R]."""
    if joined is None:
        return [None] * len(matrices)
    parts = iter(joined.split([matrix.shape[1] for matrix in matrices if matrix is not None], dim))
    return [next(parts) if matrix is not None else None for matrix in matrices]
