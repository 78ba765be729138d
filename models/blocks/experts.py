"""The routed experts: a SwiGLU per expert, computed for the tokens that chose it.

One token's way: its K choices become K rows, sorted by expert (`Routing`); each expert's rows go through gate and up
[2I, H], SwiGLU and down [H, I], with the expert's weights made dense for just as long; every row is written to its
own slot (token, choice), and a token's K slots are summed with its routing weights in float32, in the order of its
choices.

Memory: what lives for the backward pass is the block's input and the routing. Dense weights exist for a few experts
at a time (one on CPU), in both directions, so the working memory does not grow with the number of experts.

Several processes may own the experts between them (`Experts.own`). `Experts.exchange` then brings the tokens to their
experts, wherever those are, and calls the same block for the ones that are here.

Shapes: N tokens, E experts, K chosen per token, H hidden, I expert width, R rank, n rows of a few experts,
c experts at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.blocks.linear import ExpertWeights, trained
from quant.common.devices import on_cpu
from quant.kinds import new_storage
from quant.products import (
    Groups,
    grouped_linear,
    grouped_linear_input,
    grouped_linear_weight,
    product_dtype,
    row_padding,
    without_autocast,
)

# On an accelerator so many experts are dense at a time that those of the larger stack fit in here. By bytes, since an
# expert of GLM-5 is twelve times one of Qwen3.5, and every chunk launches the same few dozen kernels: of few small
# experts they would end before the host has launched the next. On CPU one expert fits the caches best.
DENSE_BYTES_AT_A_TIME = 512 * 2**20
# Tokens whose choices are summed at a time: bounds the float32 workspace of the sum.
TOKENS_AT_A_TIME = 2048


@dataclass(frozen=True)
class Chunk:
    """A few consecutive experts and their rows `[start, stop)` among the sorted ones."""

    experts: slice
    groups: Groups  # where each expert's rows end, from the chunk's first row
    start: int
    stop: int


@dataclass(frozen=True)
class Routing:
    """slots: int64 [N·K], the slot token·K + choice of every row, sorted by expert. ends: int32 [E], the rows up to and
    with each expert's. rows: the rows of each expert, on the host.
    """

    slots: Tensor
    ends: Tensor
    rows: tuple[int, ...]

    @staticmethod
    def by_expert(chosen: Tensor, experts: int, rows: tuple[int, ...] | None = None) -> Routing:
        """rows: those of each expert, where they are known already."""
        flat = chosen.flatten()
        # Stable: the rows of an expert keep the order of tokens, so a run repeats bit for bit.
        slots = torch.argsort(flat, stable=True)
        counts = count_choices(flat, experts)
        if rows is None:
            # The block's one wait for the device: the host must know which rows to give to which chunk of experts.
            rows = tuple(counts.tolist())
        return Routing(slots, counts.cumsum(0, dtype=torch.int32), rows)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """The experts that have rows, and no others, up to `size` consecutive ones at a time."""
        start = first = 0
        while first < len(self.rows):
            counts = tuple(itertools.takewhile(bool, self.rows[first : first + size]))
            if counts:
                ends = tuple(itertools.accumulate(counts))
                experts = slice(first, first + len(counts))
                offsets = self.ends[experts] - start if len(counts) > 1 else None
                yield Chunk(experts, Groups(ends, offsets), start, start + ends[-1])
                start += ends[-1]
            first += max(len(counts), 1)


def count_choices(flat: Tensor, experts: int) -> Tensor:
    """How often each expert is among `flat` int64 [n]: int64 [E]. Not bincount, which waits for the device."""
    return flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))


class LocalExperts(Protocol):
    """The block of the experts that are here, numbered from 0: as `Experts.forward`, for n rows that may be none.

    rows: how many choices each expert has, where the host knows it already; else it waits for the device to say so.
    """

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, rows: tuple[int, ...] | None = None) -> Tensor: ...


class Exchange(Protocol):
    """Computes what `Experts.forward` does where several processes own the experts; `compute` does it for those of
    this process. Every process calls it as often as the others, forward and backward.
    """

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, compute: LocalExperts) -> Tensor: ...


class Experts(nn.Module):
    """All routed experts of a layer. `gate_up_proj` [E, 2I, H] holds gate above up; `down_proj` is [E, H, I].

    owned: which of the layer's experts this process has, all of them before a call of `own`; E above is their number.
    exchange: how tokens reach the others; None: all are here.
    """

    group: ClassVar[Group] = "experts"

    def __init__(self, experts: int, hidden: int, width: int, factory: Factory) -> None:
        super().__init__()
        self.experts = experts
        self.owned = range(experts)
        self.exchange: Exchange | None = None

        shape = (experts, 2 * width, hidden)
        self.gate_up_proj = ExpertWeights(shape, ("gate_proj", "up_proj"), factory)
        self.down_proj = ExpertWeights((experts, hidden, width), ("down_proj",), factory)
        self.experts_at_a_time: int | None = None  # None: what suits the device

    def own(self, owned: range) -> None:
        """Keep only these consecutive experts of the layer, with their LoRA. For tensors on the meta device: those
        that are kept are new ones. Raises ValueError elsewhere, or for a range that is none of the layer's.
        """
        if owned.step != 1 or not 0 <= owned.start < owned.stop <= self.experts:
            raise ValueError(f"no experts {owned}: there are {self.experts}")

        def fewer(stack: nn.Parameter) -> nn.Parameter:
            return nn.Parameter(stack.new_empty(len(owned), *stack.shape[1:]), requires_grad=stack.requires_grad)

        for projection in (self.gate_up_proj, self.down_proj):
            whole, lora = projection.weight, projection.lora
            if whole.device.type != "meta":
                raise ValueError(f"{whole.name} has values already; experts are divided before that")
            shape = (len(owned), *whole.shape[1:])
            kept = new_storage(whole.spec, shape, whole.dtype, "meta", whole.name)
            for name, tensor in whole.named_parameters():
                kept.get_parameter(name).requires_grad_(tensor.requires_grad)
            projection.weight = kept
            if lora is not None:
                lora.A, lora.B = fewer(lora.A), fewer(lora.B)
        self.experts, self.owned = len(owned), owned

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [N, H], chosen int64 [N, K] of all experts, weights float32 [N, K]: [N, H] in the dtype of x."""
        if self.exchange is not None:
            return self.exchange(x, chosen, weights, self._local)
        return self._local(x, chosen, weights)

    def _local(self, x: Tensor, chosen: Tensor, weights: Tensor, rows: tuple[int, ...] | None = None) -> Tensor:
        """A LocalExperts."""
        routing = Routing.by_expert(chosen, self.experts, rows)
        tensors: list[Tensor | None] = []
        for projection in (self.gate_up_proj, self.down_proj):
            lora = projection.lora
            a, b = (lora.A, lora.B) if lora is not None else (None, None)
            tensors += [a, b, trained(projection.weight)]
        saved = _SaveForBackward.apply(x, weights, *tensors, routing, self)
        x, weights = x.detach(), weights.detach()
        return _Compute.apply(saved, lambda: _forward(self, x, weights, routing))

    def chunk_size(self, device: torch.device, dtype: torch.dtype) -> int:
        """How many experts are dense in `dtype` at a time: alike in all chunks, but for the last."""
        if self.experts_at_a_time is not None:
            return self.experts_at_a_time
        if on_cpu(device):
            return 1
        values = max(math.prod(stack.weight.shape[1:]) for stack in (self.gate_up_proj, self.down_proj))
        most = max(1, DENSE_BYTES_AT_A_TIME // (values * dtype.itemsize))
        return math.ceil(self.experts / math.ceil(self.experts / most))


# The block is two autograd functions in a row. `_SaveForBackward` comes first and computes nothing: it saves what the
# backward pass needs, and its backward is the whole block's. `_Compute` comes second, computes the output and saves
# nothing. Under activation checkpointing a layer's recomputation ends as soon as everything saved has been seen
# again, so the experts, last in their layer, are not multiplied a second time only to reach their own backward.


class _SaveForBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_a: Tensor | None,
        gate_up_b: Tensor | None,
        gate_up_value: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        down_value: Tensor | None,
        routing: Routing,
        module: Experts,
    ) -> Tensor:
        # The routing passes through save_for_backward like the rest: a recomputation replaces all of it together.
        ctx.save_for_backward(x, weights, routing.slots, routing.ends)
        ctx.rows, ctx.module = routing.rows, module
        return x.new_empty(()).expand(x.shape)  # stands for the output, so that its gradient comes back here

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weights, slots, ends = ctx.saved_tensors
        needs = ctx.needs_input_grad
        result = _backward(ctx.module, x, weights, Routing(slots, ends, ctx.rows), grads[0], needs)
        return (*result, None, None)


class _Compute(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, saved: Tensor, run: Callable[[], Tensor]) -> Tensor:
        return run()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Scratch:
    """Dense weights of one chunk of experts, in a buffer that the next chunk overwrites."""

    def __init__(self, projection: ExpertWeights, experts: int, dtype: torch.dtype, device: torch.device) -> None:
        self.storage = projection.weight
        self.dtype = dtype
        # Weights that are dense already are used in place.
        self.in_place = self.storage.kind == "none" and self.storage.dtype == dtype
        size = 0 if self.in_place else experts
        self.buffer = torch.empty(size, *self.storage.shape[1:], dtype=dtype, device=device)

    def __call__(self, experts: slice) -> Tensor:
        if self.in_place:
            return self.storage.dense(experts)
        return self.storage.dense(experts, out=self.buffer[: experts.stop - experts.start])


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


def _forward(module: Experts, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    dtype, chosen = product_dtype(x.device, x.dtype), weights.shape[1]
    size = module.chunk_size(x.device, dtype)
    gate_up, down = module.gate_up_proj, module.down_proj
    dense_gate_up, dense_down = (_Scratch(part, size, dtype, x.device) for part in (gate_up, down))
    gate_up_adapter, down_adapter = (_Adapter(part, dtype) for part in (gate_up, down))
    padding = row_padding(dtype, x.device) if size == 1 else 1
    slots = torch.empty(len(routing.slots), x.shape[1], dtype=dtype, device=x.device)
    source = x.to(dtype)

    def project(rows: Tensor, dense: _Scratch, adapter: _Adapter, chunk: Chunk) -> Tensor:
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


def _backward(
    module: Experts, x: Tensor, weights: Tensor, routing: Routing, grad: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients for x, the routing weights, and A, B, weight of both projections.

    With h the SwiGLU output of a row, g its routing weight and d the gradient of the token's output, the row's output
    is g · W h. So u = Wᵀ d gives both dh = g · u and dg = <W h, d> = <h, u>: the down projection is not computed again.
    """
    dtype, chosen = product_dtype(x.device, x.dtype), weights.shape[1]
    size = module.chunk_size(x.device, dtype)
    gate_up, down = module.gate_up_proj, module.down_proj
    dense_gate_up, dense_down = (_Scratch(part, size, dtype, x.device) for part in (gate_up, down))
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
