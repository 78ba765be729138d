"""What happens to the experts' rows before, between and after their products, a launch each: which they are, SwiGLU,
its gradients, and the sum of a token's slots.

Float32 inside, rounded once.

Shapes: N tokens, K slots each; n = N·K rows sorted by expert, and `slots` int64 [n] which slot each is; I expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quant.kernels.choice import Arguments, kernel
from quant.kernels.language import blocks, jit, launch, power_of_two, tl

_CHOICES_AT_A_TIME = 4096


@jit
def _rows_by_expert(chosen, slots, ends, count, B: tl.constexpr):
    """Program e: counts the rows of the experts before e, which are all that it needs of other programs, and then
    writes those of e in the order of their slots."""
    expert = tl.program_id(0)
    before = tl.zeros((B,), tl.int32)
    for start in range(0, count, B):
        at = start + tl.arange(0, B)
        choice = tl.load(chosen + at, mask=at < count, other=1 << 30).to(tl.int32)
        before += (choice < expert).to(tl.int32)
    row = tl.sum(before, 0)
    for start in range(0, count, B):
        at = start + tl.arange(0, B)
        own = tl.load(chosen + at, mask=at < count, other=1 << 30).to(tl.int32) == expert
        upto = tl.cumsum(own.to(tl.int32), 0)
        tl.store(slots + row + upto - 1, at.to(tl.int64), mask=own)
        row += tl.sum(own.to(tl.int32), 0)
    tl.store(ends + expert, row)


def _run_rows_by_expert(chosen: Tensor, *, slots: Tensor, ends: Tensor) -> None:
    launch(_rows_by_expert, (len(ends),), chosen, slots, ends, len(slots), B=_CHOICES_AT_A_TIME, warps=8)


def _reference_rows_by_expert(chosen: Tensor, *, slots: Tensor, ends: Tensor) -> None:
    # Stable: the rows of an expert keep the order of tokens, so a run repeats bit for bit.
    experts_of_rows, order = chosen.flatten().sort(stable=True)
    slots.copy_(order)
    numbers = torch.arange(len(ends), device=chosen.device)
    ends.copy_(torch.searchsorted(experts_of_rows, numbers, right=True, out_int32=True))


def _rows_by_expert_trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, k, experts in ((2500, 4, 64), (700, 8, 256), (1, 3, 5), (40, 1, 1)):
        scores = torch.rand(tokens, experts, generator=generator)
        scores[:, experts // 2] = 1.0 if k > 1 else 0.0  # everybody's choice
        scores[:, experts // 3] -= 2.0 if experts > 1 else 0.0  # nobody's
        chosen = scores.topk(k).indices.to(device)
        slots = torch.empty(tokens * k, dtype=torch.int64, device=device)
        yield (chosen,), {"slots": slots, "ends": torch.empty(experts, dtype=torch.int32, device=device)}


# chosen int64 [N, K] contiguous, from 0 to E - 1; slots int64 [n]: the choices token·K + k by expert, those of one in
# their order; ends int32 [E]: the rows up to and with each expert's.
rows_by_expert = kernel(
    "rows_by_expert",
    "(Tensor chosen, *, Tensor(a!) slots, Tensor(b!) ends) -> ()",
    run=_run_rows_by_expert,
    reference=_reference_rows_by_expert,
    trials=_rows_by_expert_trials,
    tolerance=0.0,
)


@jit
def _swiglu(gate_up, out, width, stride, B: tl.constexpr):
    """Program (row, i): B columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * B + tl.arange(0, B)
    there = column < width
    gate = tl.load(gate_up + row * stride + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=there)


def _run_swiglu(gate_up: Tensor, *, out: Tensor) -> None:
    rows, width = out.shape
    if rows:
        size = min(1024, power_of_two(width))
        launch(_swiglu, (rows, blocks(width, size)), gate_up, out, width, gate_up.stride(0), B=size)


def _reference_swiglu(gate_up: Tensor, *, out: Tensor) -> None:
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def _numbers(device: torch.device, generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


_TRIAL_SIZES = ((6, 2, 64, torch.bfloat16), (5, 3, 1100, torch.float32), (1, 1, 24, torch.bfloat16))


def _swiglu_trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, chosen, width, dtype in _TRIAL_SIZES:
        gate_up = _numbers(device, generator, tokens * chosen, 2 * width, dtype=dtype)
        yield (gate_up,), {"out": gate_up.new_empty(tokens * chosen, width)}


# gate_up [n, 2I] has the gate first; out [n, I].
expert_swiglu = kernel(
    "expert_swiglu",
    "(Tensor gate_up, *, Tensor(a!) out) -> ()",
    run=_run_swiglu,
    reference=_reference_swiglu,
    trials=_swiglu_trials,
    tolerance=1e-5,
    tolerance_16_bit=8e-3,
)


@jit
def _swiglu_backward(
    gate_up, d_hidden, weights, slots, ends, d_weights, first, experts, width,
    B: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program row: all columns of a row, B at a time, if it is one of the chunk's experts."""
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(ends + first - 1, mask=first > 0, other=0):
        return
    if row >= tl.load(ends + first + experts - 1):
        return
    slot = tl.load(slots + row)
    weight = tl.load(weights + slot)
    dot = tl.zeros((B,), dtype=tl.float32)
    for step in tl.static_range(STEPS):
        column = step * B + tl.arange(0, B)
        there = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=there, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=there, other=0.0).to(tl.float32)
        u = tl.load(d_hidden + row * width + column, mask=there, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(gate)
        silu = gate * open_
        h = silu * up
        dot += u * h
        d = weight * u
        d_gate = d * up * (open_ + silu * (1.0 - open_))
        kind = gate_up.dtype.element_ty
        tl.store(gate_up + row * 2 * width + column, d_gate.to(kind), mask=there)
        tl.store(gate_up + row * 2 * width + width + column, (d * silu).to(kind), mask=there)
        tl.store(d_hidden + row * width + column, (weight * h).to(kind), mask=there)
    tl.store(d_weights + slot, tl.sum(dot, 0))


def _run_swiglu_backward(
    weights: Tensor,
    slots: Tensor,
    ends: Tensor,
    first: int,
    experts: int,
    *,
    gate_up: Tensor,
    d_hidden: Tensor,
    d_weights: Tensor,
) -> None:
    rows, width = d_hidden.shape
    if rows:
        size = min(1024, power_of_two(width))
        launch(
            _swiglu_backward, (rows,),
            gate_up, d_hidden, weights, slots, ends, d_weights, first, experts, width,
            B=size, STEPS=blocks(width, size),
        )  # fmt: skip


def _reference_swiglu_backward(
    weights: Tensor,
    slots: Tensor,
    ends: Tensor,
    first: int,
    experts: int,
    *,
    gate_up: Tensor,
    d_hidden: Tensor,
    d_weights: Tensor,
) -> None:
    here = slice(int(ends[first - 1]) if first else 0, int(ends[first + experts - 1]))
    gate, up = gate_up[here].float().chunk(2, dim=-1)
    h, u = torch.nn.functional.silu(gate) * up, d_hidden[here].float()
    weight = weights.view(-1)[slots[here]][:, None]
    d = weight * u
    d_gate = torch.ops.aten.silu_backward(d * up, gate)
    d_weights.view(-1)[slots[here]] = (u * h).sum(-1)
    gate_up[here] = torch.cat((d_gate, d * torch.nn.functional.silu(gate)), dim=-1).to(gate_up.dtype)
    d_hidden[here] = (weight * h).to(d_hidden.dtype)


def _swiglu_backward_trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, chosen, width, dtype in _TRIAL_SIZES:
        n = tokens * chosen
        gate_up = _numbers(device, generator, n, 2 * width, dtype=dtype)
        u = _numbers(device, generator, n, width, dtype=dtype)
        weights = torch.rand(tokens, chosen, generator=generator).to(device)
        slots = torch.randperm(n, generator=generator).to(device)
        ends = torch.tensor([n // 4, n // 2, n], dtype=torch.int32, device=device)
        for first, experts in ((0, 3), (1, 2)):
            outputs = {"gate_up": gate_up.clone(), "d_hidden": u.clone(), "d_weights": torch.zeros_like(weights)}
            yield (weights, slots, ends, first, experts), outputs


# For the rows of `experts` experts from `first` on, as `ends` int32 [E] has them. A row's output is weight · W h for
# h = silu(gate) · up; weights, d_weights float32 [N, K]. In place: gate_up [n, 2I] becomes its gradient, and d_hidden
# [n, I], which is Wᵀ d without the weight, becomes weight · h. Contiguous.
expert_swiglu_backward = kernel(
    "expert_swiglu_backward",
    "(Tensor weights, Tensor slots, Tensor ends, int first, int experts, *, Tensor(a!) gate_up, Tensor(b!) d_hidden,"
    " Tensor(c!) d_weights) -> ()",
    run=_run_swiglu_backward,
    reference=_reference_swiglu_backward,
    trials=_swiglu_backward_trials,
    tolerance=1e-5,
    tolerance_16_bit=8e-3,
)


@jit
def _combine(
    slots, weights, first, second, out, width,
    CHOSEN: tl.constexpr, WEIGHTED: tl.constexpr, PLUS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program (token, i): B columns of a token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * B + tl.arange(0, B)
    there = column < width
    total = tl.zeros((B,), dtype=tl.float32)
    for k in tl.static_range(CHOSEN):
        slot = token * CHOSEN + k
        value = tl.load(slots + slot * width + column, mask=there, other=0.0).to(tl.float32)
        total += value * tl.load(weights + slot) if WEIGHTED else value
    if PLUS > 0:
        total += tl.load(first + token * width + column, mask=there, other=0.0).to(tl.float32)
    if PLUS > 1:
        total += tl.load(second + token * width + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=there)


def _run_combine(slots: Tensor, weights: Tensor | None, plus: Sequence[Tensor], *, out: Tensor) -> None:
    tokens, width = out.shape
    if tokens:
        size = min(1024, power_of_two(width))
        given = slots if weights is None else weights
        first, second = (*plus, out, out)[:2]  # what is not there is not read
        launch(
            _combine, (tokens, blocks(width, size)), slots, given, first, second, out, width,
            CHOSEN=len(slots) // tokens, WEIGHTED=weights is not None, PLUS=len(plus), B=size,
        )  # fmt: skip


def _reference_combine(slots: Tensor, weights: Tensor | None, plus: Sequence[Tensor], *, out: Tensor) -> None:
    wide = slots.float().view(len(out), -1, out.shape[1])
    out.copy_((wide if weights is None else wide * weights[..., None]).sum(1) + sum(part.float() for part in plus))


def _combine_trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, chosen, width, dtype in _TRIAL_SIZES:
        slots = _numbers(device, generator, tokens * chosen, width, dtype=dtype)
        for weights in (None, torch.rand(tokens, chosen, generator=generator).to(device)):
            plus = [_numbers(device, generator, tokens, width, dtype=dtype) for _ in range(tokens % 3)]
            yield (slots, weights, plus), {"out": slots.new_empty(tokens, width)}


# slots [N·K, H], weights float32 [N, K] or None, up to two [N, H] in `plus`; out [N, H], the sum over K in the order of
# slots, and then of these. Contiguous.
combine_slots = kernel(
    "combine_slots",
    "(Tensor slots, Tensor? weights, Tensor[] plus, *, Tensor(a!) out) -> ()",
    run=_run_combine,
    reference=_reference_combine,
    trials=_combine_trials,
    tolerance=1e-5,
    tolerance_16_bit=8e-3,
)
