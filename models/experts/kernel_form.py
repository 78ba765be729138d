"""The routed experts with kernels of our own, where they have shown that they compute what `torch_form` computes.

Nothing here asks the device how many rows an expert has (quant/kernels/grouped.py), and all rows go through each step
together; only dense weights exist for a few experts at a time. A low-rank product is added inside the product with
the dense weight, before anything is rounded.

Shapes: N tokens, E experts, K chosen per token, H hidden, I expert width, R rank, n = N·K rows sorted by expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def __init__(self, routing: Routing, chosen: int, dtype: torch.dtype) -> None:
        self.routing, self.chosen, self.dtype = routing, chosen, dtype

    def empty(self, columns: int) -> Tensor:
        return self.routing.slots.new_empty(len(self.routing.slots), columns, dtype=self.dtype)

    def product(
        self,
        rows: _Rows,
        matrices: Tensor,
        out: Tensor,
        more: tuple[Tensor, Tensor] | None = None,
        *,
        first: int = 0,
        scaling: float = 1.0,
        to_slots: bool = False,
    ) -> Tensor:
        """out [n, b] = scaling · (rows @ matrices [c, a, b] + more_rows [n, R] @ more_matrices [E, R, b]) for the rows
        of the c experts from `first` on. more: both of these. to_slots: `out` is in the order of slots.
        """
        more_rows, more_matrices = more or (None, None)
        grouped_product(
            rows.values, self.routing.ends, self.routing.slots, matrices, more_rows, more_matrices,
            first, self.chosen, scaling, rows.by_token, to_slots, out=out,
        )  # fmt: skip
        return out

    def inner(self, rows: _Rows, lora: LoRA | None) -> Tensor | None:
        """s · rows Aᵀ [n, R]."""
        if lora is None:
            return None
        return self.product(rows, lora.A.detach().transpose(1, 2), self.empty(lora.rank), scaling=lora.scaling)

    def inner_gradient(self, rows: _Rows, lora: LoRA | None) -> Tensor | None:
        """s · rows B [n, R]."""
        if lora is None:
            return None
        return self.product(rows, lora.B.detach(), self.empty(lora.rank), scaling=lora.scaling)

    def gradient(self, left: _Rows, right: _Rows, like: Tensor) -> Tensor:
        """leftᵀ right of each expert's rows, in the shape and dtype of `like` [E, a, b]."""
        out, routing = torch.empty_like(like), self.routing
        grouped_gradient(
            left.values, right.values, routing.ends, routing.slots,
            self.chosen, 1.0, left.by_token, right.by_token, out=out,
        )  # fmt: skip
        return out


def _outputs(inner: Tensor | None, lora: LoRA | None) -> tuple[Tensor, Tensor] | None:
    """What a LoRA adds to rows Wᵀ: inner Bᵀ."""
    return None if inner is None or lora is None else (inner, lora.B.detach().transpose(1, 2))


def _inputs(d_inner: Tensor | None, lora: LoRA | None) -> tuple[Tensor, Tensor] | None:
    """What a LoRA adds to rows W: d_inner A, for d_inner = s · rows B."""
    return None if d_inner is None or lora is None else (d_inner, lora.A.detach())


def forward(
    gate_up: ExpertWeights,
    down: ExpertWeights,
    at_a_time: int | None,
    x: Tensor,
    weights: Tensor,
    routing: Routing,
    plus: Sequence[Tensor] = (),
) -> Tensor:
    """As `torch_form.forward`, with up to two [N, H] added before the sum is rounded."""
    dtype = product_dtype(x.device, x.dtype)
    products = _Products(routing, weights.shape[1], dtype)

    def project(rows: _Rows, projection: ExpertWeights, *, to_slots: bool = False) -> Tensor:
        more = _outputs(products.inner(rows, projection.lora), projection.lora)
        out, dense = (
            products.empty(projection.weight.shape[1]),
            Scratch(projection, _fitting(at_a_time, dtype, projection), dtype),
        )
        for chunk in dense.chunks():
            products.product(rows, dense(chunk).transpose(1, 2), out, more, first=chunk.start, to_slots=to_slots)
        return out

    hidden = products.empty(down.weight.shape[2])
    expert_swiglu(project(_Rows(x.to(dtype).contiguous(), by_token=True), gate_up), out=hidden)
    out = x.new_empty(x.shape)
    combine_slots(
        project(_Rows(hidden), down, to_slots=True), weights.contiguous(), [part.contiguous() for part in plus], out=out
    )
    return out


def _fitting(at_a_time: int | None, dtype: torch.dtype, *projections: ExpertWeights) -> int:
    """How many experts of these stacks together are dense at a time."""
    values = sum(math.prod(projection.weight.shape[1:]) for projection in projections)
    return at_a_time or as_fit(projections[0].weight.shape[0], values, dtype)


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
    products, weights = _Products(routing, weights.shape[1], dtype), weights.contiguous()
    rows, d_out = (_Rows(tensor.to(dtype).contiguous(), by_token=True) for tensor in (x, grad))
    needs_x, needs_weights = needs[:2]
    _, wide, width = gate_up.weight.shape
    y, u = products.empty(wide), products.empty(wide // 2)
    d_weights, d_slots = weights.new_empty(weights.shape), products.empty(width) if needs_x else None

    inner, d_inner_down = products.inner(rows, gate_up.lora), products.inner_gradient(d_out, down.lora)
    d_inner = products.empty(gate_up.lora.rank) if gate_up.lora is not None else None
    size = _fitting(at_a_time, dtype, gate_up, down)
    dense_gate_up, dense_down = Scratch(gate_up, size, dtype), Scratch(down, size, dtype)
    for chunk in (dense_gate_up if not dense_gate_up.in_place else dense_down).chunks():
        first, w_gate_up = chunk.start, dense_gate_up(chunk)
        # Forward again, up to the products of gate and up.
        products.product(rows, w_gate_up.transpose(1, 2), y, _outputs(inner, gate_up.lora), first=first)
        # Down and SwiGLU: u = Wᵀ d, from which come the gradients of gate, up and the routing weights, and weight · h.
        # The gradient of y takes its place, and weight · h that of u.
        products.product(d_out, dense_down(chunk), u, _inputs(d_inner_down, down.lora), first=first)
        expert_swiglu_backward(
            weights, routing.slots, routing.ends, first, chunk.stop - first,
            gate_up=y, d_hidden=u, d_weights=d_weights,
        )  # fmt: skip
        # Gate and up.
        if d_inner is not None and gate_up.lora is not None:
            b = gate_up.lora.B.detach()[chunk]
            products.product(_Rows(y), b, d_inner, first=first, scaling=gate_up.lora.scaling)
        if d_slots is not None:
            more = _inputs(d_inner, gate_up.lora)
            products.product(_Rows(y), w_gate_up, d_slots, more, first=first, to_slots=True)
    del dense_gate_up, dense_down

    d_y, h = _Rows(y), _Rows(u)
    inner_down = products.inner(h, down.lora) if needs[6] else None
    down_grads = _gradients(products, down, needs[5:8], h, d_out, d_inner_down, inner_down)
    gate_up_grads = _gradients(products, gate_up, needs[2:5], rows, d_y, d_inner, inner)
    dx = None
    if d_slots is not None:
        dx = x.new_empty(x.shape)
        combine_slots(d_slots, None, [], out=dx)
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
