"""The routed experts in torch's operations: a few experts at a time, whose rows the host knows.

Shapes: N tokens, E experts, K chosen per token, H hidden, I expert width, R rank, n rows of a few experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.blocks.linear import ExpertWeights, trained
from models.experts.dense import Scratch, as_fit
from models.experts.routing import Chunk, Routing
from quant.common.devices import on_cpu
from quant.products import (
    Groups,
    grouped_linear,
    grouped_linear_input,
    grouped_linear_weight,
    product_dtype,
    row_padding,
)

# Tokens whose choices are summed at a time: bounds the float32 workspace of the sum.
TOKENS_AT_A_TIME = 2048


def _size(gate_up: ExpertWeights, down: ExpertWeights, device: torch.device, dtype: torch.dtype) -> int:
    """How many experts are dense in `dtype` at a time. On CPU one expert fits the caches best."""
    if on_cpu(device):
        return 1
    experts = gate_up.weight.shape[0]
    return as_fit(experts, max(math.prod(stack.weight.shape[1:]) for stack in (gate_up, down)), dtype)


class _LowRank:
    """A projection's LoRA on one chunk of experts: the low-rank path x Aᵀ, then Bᵀ, and its gradients."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float, groups: Groups) -> None:
        self.a, self.b, self.scaling, self.groups = a, b, scaling, groups

    def inner(self, rows: Tensor) -> Tensor:
        """s · x Aᵀ [n, R]. The scale is applied here, on the narrow side."""
        return grouped_linear(rows, self.a, self.groups).mul_(self.scaling)

    def add_output(self, inner: Tensor, y: Tensor) -> Tensor:
        return grouped_linear(inner, self.b, self.groups, add_to=y)

    def inner_gradient(self, dy: Tensor) -> Tensor:
        """s · dy B [n, R]."""
        return grouped_linear_input(dy, self.b, self.groups).mul_(self.scaling)

    def add_input_gradient(self, d_inner: Tensor, dx: Tensor) -> Tensor:
        return grouped_linear_input(d_inner, self.a, self.groups, add_to=dx)


class _Adapter:
    """A projection's LoRA, if it has one, in the dtype of products: cast once for all chunks."""

    def __init__(self, projection: ExpertWeights, dtype: torch.dtype) -> None:
        self.lora = projection.lora
        if self.lora is not None:
            self.a, self.b = self.lora.A.detach().to(dtype), self.lora.B.detach().to(dtype)

    def __call__(self, chunk: Chunk) -> _LowRank | None:
        if self.lora is None:
            return None
        return _LowRank(self.a[chunk.experts], self.b[chunk.experts], self.lora.scaling, chunk.groups)


def _gather(source: Tensor, tokens: Tensor, padding: int) -> Tensor:
    """The rows of `source` for these tokens, with zero rows up to a multiple of `padding`."""
    extra = -len(tokens) % padding
    if not extra:
        return source.index_select(0, tokens)
    rows = source.new_empty(len(tokens) + extra, source.shape[1])
    torch.index_select(source, 0, tokens, out=rows[: len(tokens)])
    rows[len(tokens) :].zero_()
    return rows


def _padded(chunk: Chunk, rows: Tensor) -> Chunk:
    """The chunk of a single expert with its padding, zero rows that add nothing to any product."""
    if len(chunk.groups.ends) > 1:
        return chunk
    return Chunk(chunk.experts, Groups((len(rows),)), chunk.start, chunk.stop)


def combine(slots: Tensor, weights: Tensor | None, chosen: int, dtype: torch.dtype) -> Tensor:
    """Sums each token's K = `chosen` slots [N·K, H], weighted when there are weights, in float32: [N, H] in `dtype`."""
    tokens = len(slots) // chosen
    out = torch.empty(tokens, slots.shape[1], dtype=dtype, device=slots.device)
    slots = slots.unflatten(0, (tokens, chosen))
    for start in range(0, tokens, TOKENS_AT_A_TIME):
        part = slice(start, start + TOKENS_AT_A_TIME)
        wide = slots[part].to(torch.float32)
        summed = wide.sum(1) if weights is None else torch.bmm(weights[part, None], wide).squeeze(1)
        out[part] = summed
    return out


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def forward(
    gate_up: ExpertWeights, down: ExpertWeights, at_a_time: int | None, x: Tensor, weights: Tensor, routing: Routing
) -> Tensor:
    """[N, H], the weighted sum of what each token's experts give, of x [N, H] and weights float32 [N, K].

    at_a_time: how many experts are dense at a time; None: what suits the device.
    """
    dtype, chosen = product_dtype(x.device, x.dtype), weights.shape[1]
    size = at_a_time or _size(gate_up, down, x.device, dtype)
    dense_gate_up, dense_down = (Scratch(part, size, dtype) for part in (gate_up, down))
    gate_up_adapter, down_adapter = (_Adapter(part, dtype) for part in (gate_up, down))
    padding = row_padding(dtype, x.device) if size == 1 else 1
    slots = torch.empty(len(routing.slots), x.shape[1], dtype=dtype, device=x.device)
    source = x.to(dtype)

    def project(rows: Tensor, dense: Scratch, adapter: _Adapter, chunk: Chunk) -> Tensor:
        y = grouped_linear(rows, dense(chunk.experts), chunk.groups)
        lora = adapter(chunk)
        if lora is not None:
            lora.add_output(lora.inner(rows), y)
        return y

    for chunk in routing.chunks(size):
        chosen_slots = routing.slots[chunk.start : chunk.stop]
        rows = _gather(source, chosen_slots // chosen, padding)
        chunk = _padded(chunk, rows)
        hidden = _swiglu(project(rows, dense_gate_up, gate_up_adapter, chunk))
        y = project(hidden, dense_down, down_adapter, chunk)
        slots.index_copy_(0, chosen_slots, y[: len(chosen_slots)])
    return combine(slots, weights, chosen, x.dtype)


class _Gradients:
    """Gradients of one projection's LoRA or weight, filled chunk by chunk; writing casts to their dtype."""

    def __init__(self, projection: ExpertWeights, needs_a: bool, needs_b: bool, needs_value: bool) -> None:
        lora = projection.lora
        # Zeros, since experts that no token chose are never visited.
        self.a = torch.zeros_like(lora.A) if needs_a and lora is not None else None
        self.b = torch.zeros_like(lora.B) if needs_b and lora is not None else None
        value = trained(projection.weight)
        self.value = torch.zeros_like(value) if needs_value and value is not None else None

    def add(self, chunk: Chunk, dy: Tensor, rows: Tensor, lora: tuple[_LowRank, Tensor, Tensor] | None) -> None:
        """dy [n, out] and rows [n, in] of a chunk; for LoRA its inner activation and that one's gradient, [n, R]."""
        if lora is not None:
            _, inner, d_inner = lora
            if self.a is not None:
                self.a[chunk.experts] = grouped_linear_weight(d_inner, rows, chunk.groups)
            if self.b is not None:
                self.b[chunk.experts] = grouped_linear_weight(dy, inner, chunk.groups)
        if self.value is not None:
            self.value[chunk.experts] = grouped_linear_weight(dy, rows, chunk.groups)


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
    """Gradients for x, the routing weights, and A, B, weight of both projections.

    With h the SwiGLU output of a row, g its routing weight and d the gradient of the token's output, the row's output
    is g · W h. So u = Wᵀ d gives both dh = g · u and dg = <W h, d> = <h, u>: the down projection is not computed again.
    """
    dtype, chosen = product_dtype(x.device, x.dtype), weights.shape[1]
    size = at_a_time or _size(gate_up, down, x.device, dtype)
    dense_gate_up, dense_down = (Scratch(part, size, dtype) for part in (gate_up, down))
    gate_up_adapter, down_adapter = (_Adapter(part, dtype) for part in (gate_up, down))
    padding = row_padding(dtype, x.device) if size == 1 else 1
    needs_x, needs_weights = needs[:2]
    gate_up_grads, down_grads = _Gradients(gate_up, *needs[2:5]), _Gradients(down, *needs[5:8])
    d_slots = torch.empty(len(routing.slots), x.shape[1], dtype=dtype, device=x.device) if needs_x else None
    d_weights = torch.empty(weights.numel(), dtype=torch.float32, device=x.device) if needs_weights else None
    source, d_source = x.to(dtype), grad.to(dtype)

    for chunk in routing.chunks(size):
        chosen_slots = routing.slots[chunk.start : chunk.stop]
        tokens, count = chosen_slots // chosen, len(chosen_slots)
        rows, d_out = _gather(source, tokens, padding), _gather(d_source, tokens, padding)
        chunk = _padded(chunk, rows)
        row_weights = F.pad(weights.flatten().index_select(0, chosen_slots), (0, len(rows) - count)).to(dtype)[:, None]

        # Forward again, up to h.
        w_gate_up = dense_gate_up(chunk.experts)
        y = grouped_linear(rows, w_gate_up, chunk.groups)
        gate_up_lora = gate_up_adapter(chunk)
        gate_up_inner = gate_up_lora.inner(rows) if gate_up_lora is not None else None
        if gate_up_lora is not None and gate_up_inner is not None:
            gate_up_lora.add_output(gate_up_inner, y)
        hidden = _swiglu(y)

        # Down: u = Wᵀ d, with the adapter's share.
        u = grouped_linear_input(d_out, dense_down(chunk.experts), chunk.groups)
        down_lora = None
        if (adapted := down_adapter(chunk)) is not None:
            d_inner = adapted.inner_gradient(d_out)
            adapted.add_input_gradient(d_inner, u)
            down_lora = (adapted, adapted.inner(hidden), d_inner.mul_(row_weights))
        if d_weights is not None:
            d_weights[chosen_slots] = (u * hidden).sum(-1, dtype=torch.float32)[:count]
        down_grads.add(chunk, d_out.mul_(row_weights), hidden, down_lora)

        # SwiGLU and gate_up.
        d_hidden = u.mul_(row_weights)
        gate, up = y.chunk(2, dim=-1)
        d_up = d_hidden * F.silu(gate)
        d_gate = torch.ops.aten.silu_backward(d_hidden.mul_(up), gate)
        d_y = torch.cat((d_gate, d_up), dim=-1)
        gate_up_adapted = None
        if gate_up_lora is not None and gate_up_inner is not None:
            gate_up_adapted = (gate_up_lora, gate_up_inner, gate_up_lora.inner_gradient(d_y))
        gate_up_grads.add(chunk, d_y, rows, gate_up_adapted)
        if d_slots is not None:
            d_rows = grouped_linear_input(d_y, w_gate_up, chunk.groups)
            if gate_up_adapted is not None:
                gate_up_adapted[0].add_input_gradient(gate_up_adapted[2], d_rows)
            d_slots.index_copy_(0, chosen_slots, d_rows[:count])

    dx = combine(d_slots, None, chosen, x.dtype) if d_slots is not None else None
    dw = d_weights.view_as(weights) if d_weights is not None else None
    return (
        dx, dw, gate_up_grads.a, gate_up_grads.b, gate_up_grads.value, down_grads.a, down_grads.b, down_grads.value,
    )  # fmt: skip
