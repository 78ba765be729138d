"""The routed experts with kernels of our own, where they have shown that they compute what `torch_form` computes.

Nothing here asks the device how many rows an expert has (quant/kernels/grouped.py), and all rows go through each step
together; only dense weights exist for a few experts at a time. A low-rank product is added inside the product with
the dense weight, before anything is rounded.

Shapes: N tokens, E experts, K chosen per token, H hidden, I expert width, R rank, n = N·K rows sorted by expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.blocks.linear import ExpertWeights, LoRA, trained
from models.experts.dense import Scratch, as_fit
from models.experts.routing import Routing
from models.kernels.expert_rows import combine_slots, expert_swiglu, expert_swiglu_backward
from quant.kernels.choice import uses
from quant.kernels.grouped import grouped_gradient, grouped_product
from quant.products import product_dtype

_NEEDED = (grouped_product, grouped_gradient, expert_swiglu, expert_swiglu_backward, combine_slots)


def usable(device: torch.device, rows: int, experts: int) -> bool:
    """For `rows` of all `experts` together. In generation most experts have none, and would be made dense for nothing:
    `torch_form` leaves them out.
    """
    return rows >= experts and all(uses(kernel, device) for kernel in _NEEDED)


@dataclass(frozen=True)
class _Rows:
    """Of every row of the routing: row i of `values` [n, a], or, where `by_token`, that of its token, [N, a]."""

    values: Tensor
    by_token: bool = False


class _Products:
    """The products of a block with each expert's own matrix, and their gradients."""

    def __init__(self, routing: Routing, chosen: int, at_a_time: int | None, dtype: torch.dtype) -> None:
        self.routing, self.chosen, self.at_a_time, self.dtype = routing, chosen, at_a_time, dtype

    def empty(self, columns: int) -> Tensor:
        return self.routing.slots.new_empty(len(self.routing.slots), columns, dtype=self.dtype)

    def low_rank(self, rows: _Rows, matrices: Tensor, scaling: float) -> Tensor:
        """s · rows @ matrices [E, a, R]: [n, R]."""
        out, routing = self.empty(matrices.shape[2]), self.routing
        grouped_product(
            rows.values, routing.ends, routing.slots, matrices, None, None,
            0, self.chosen, scaling, rows.by_token, False, out=out,
        )  # fmt: skip
        return out

    def project(
        self, rows: _Rows, projection: ExpertWeights, inner: Tensor | None, *, to_slots: bool = False
    ) -> Tensor:
        """rows Wᵀ + inner Bᵀ: [n, out], for inner = s · rows Aᵀ [n, R] of the LoRA. to_slots: in the order of slots."""
        b = projection.lora.B.detach().transpose(1, 2) if projection.lora is not None else None
        return self._dense(rows, projection, inner, b, transposed=True, to_slots=to_slots)

    def project_back(
        self, rows: _Rows, projection: ExpertWeights, d_inner: Tensor | None, *, to_slots: bool = False
    ) -> Tensor:
        """rows W + d_inner A: [n, in], for d_inner = s · rows B [n, R] of the LoRA."""
        a = projection.lora.A.detach() if projection.lora is not None else None
        return self._dense(rows, projection, d_inner, a, transposed=False, to_slots=to_slots)

    def _dense(
        self,
        rows: _Rows,
        projection: ExpertWeights,
        more_rows: Tensor | None,
        more_matrices: Tensor | None,
        *,
        transposed: bool,
        to_slots: bool,
    ) -> Tensor:
        storage, routing = projection.weight, self.routing
        experts, *size = storage.shape
        dense = Scratch(projection, self.at_a_time or as_fit(experts, math.prod(size), self.dtype), self.dtype)
        out = self.empty(size[0] if transposed else size[1])
        for chunk in dense.chunks():
            matrices = dense(chunk)
            grouped_product(
                rows.values, routing.ends, routing.slots, matrices.transpose(1, 2) if transposed else matrices,
                more_rows, more_matrices, chunk.start, self.chosen, 1.0, rows.by_token, to_slots, out=out,
            )  # fmt: skip
        return out

    def gradient(self, left: _Rows, right: _Rows, like: Tensor) -> Tensor:
        """leftᵀ right of each expert's rows, in the shape and dtype of `like` [E, a, b]."""
        out, routing = torch.empty_like(like), self.routing
        grouped_gradient(
            left.values, right.values, routing.ends, routing.slots,
            self.chosen, 1.0, left.by_token, right.by_token, out=out,
        )  # fmt: skip
        return out


def forward(
    gate_up: ExpertWeights, down: ExpertWeights, at_a_time: int | None, x: Tensor, weights: Tensor, routing: Routing
) -> Tensor:
    """As `torch_form.forward`."""
    dtype = product_dtype(x.device, x.dtype)
    products = _Products(routing, weights.shape[1], at_a_time, dtype)
    rows = _Rows(x.to(dtype).contiguous(), by_token=True)
    hidden = products.empty(down.weight.shape[2])
    expert_swiglu(products.project(rows, gate_up, _inner(products, rows, gate_up.lora)), out=hidden)
    y = products.project(_Rows(hidden), down, _inner(products, _Rows(hidden), down.lora), to_slots=True)
    out = x.new_empty(x.shape)
    combine_slots(y, weights.contiguous(), out=out)
    return out


def _inner(products: _Products, rows: _Rows, lora: LoRA | None) -> Tensor | None:
    """s · rows Aᵀ [n, R]."""
    return products.low_rank(rows, lora.A.detach().transpose(1, 2), lora.scaling) if lora is not None else None


def _inner_gradient(products: _Products, rows: _Rows, lora: LoRA | None) -> Tensor | None:
    """s · rows B [n, R]."""
    return products.low_rank(rows, lora.B.detach(), lora.scaling) if lora is not None else None


def backward(
    gate_up: ExpertWeights,
    down: ExpertWeights,
    at_a_time: int | None,
    x: Tensor,
    weights: Tensor,
    routing: Routing,
    grad: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """As `torch_form.backward`, where the formula is."""
    dtype = product_dtype(x.device, x.dtype)
    products = _Products(routing, weights.shape[1], at_a_time, dtype)
    rows, d_out = (_Rows(tensor.to(dtype).contiguous(), by_token=True) for tensor in (x, grad))
    needs_x, needs_weights = needs[:2]

    # Forward again, up to the products of gate and up.
    inner = _inner(products, rows, gate_up.lora)
    y = products.project(rows, gate_up, inner)

    # Down and SwiGLU: u = Wᵀ d, from which come the gradients of gate, up and the routing weights, and weight · h.
    d_inner = _inner_gradient(products, d_out, down.lora)
    u = products.project_back(d_out, down, d_inner)
    d_y, hidden, d_weights = torch.empty_like(y), torch.empty_like(u), weights.new_empty(weights.shape)
    expert_swiglu_backward(y, u, weights.contiguous(), routing.slots, d_gate_up=d_y, hidden=hidden, d_weights=d_weights)
    del y, u
    h = _Rows(hidden)
    inner_h = _inner(products, h, down.lora) if needs[6] else None
    down_grads = _gradients(products, down, needs[5:8], h, d_out, d_inner, inner_h)
    del hidden, h, inner_h

    # Gate and up.
    d_rows = _Rows(d_y)
    d_inner = _inner_gradient(products, d_rows, gate_up.lora)
    gate_up_grads = _gradients(products, gate_up, needs[2:5], rows, d_rows, d_inner, inner)
    dx = None
    if needs_x:
        d_slots = products.project_back(d_rows, gate_up, d_inner, to_slots=True)
        dx = x.new_empty(x.shape)
        combine_slots(d_slots, None, out=dx)
    return dx, d_weights if needs_weights else None, *gate_up_grads, *down_grads


def _gradients(
    products: _Products,
    projection: ExpertWeights,
    needs: tuple[bool, ...],
    rows: _Rows,
    d_rows: _Rows,
    d_inner: Tensor | None,
    inner: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of A, B and the dense weight of a projection with these rows, and the gradient of its output."""
    needs_a, needs_b, needs_value = needs
    lora, value, a, b = projection.lora, trained(projection.weight), None, None
    if lora is not None and d_inner is not None and needs_a:
        a = products.gradient(_Rows(d_inner), rows, lora.A)
    if lora is not None and inner is not None and needs_b:
        b = products.gradient(d_rows, _Rows(inner), lora.B)
    return a, b, products.gradient(d_rows, rows, value) if needs_value and value is not None else None
