"""The gated delta rule's states from chunk to chunk, and their gradients back: one launch each way.

A program has some columns of a head's state, in registers, and goes through the chunks in order; columns don't meet.
Symbols, shapes and accuracy as in models/kernels/delta_chunks.py, whose results these take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from models.kernels.delta_chunks import (
    TOLERANCES,
    by_chunk,
    by_row,
    delta_prepare,
    dot,
    prepared,
    rows_of,
    sizes,
    trial_inputs,
)
from quant.kernels.choice import Arguments, kernel
from quant.kernels.language import blocks, capability, jit, launch, power_of_two, tl


@jit
def _forward(
    query, key, erasing, attention, factors, corrected, out, states,
    tokens, rows, query_stride, key_stride, READ: tl.constexpr, KEEP: tl.constexpr, HEADS: tl.constexpr,
    GROUPS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (i, h): columns i · B … of the states of value head h."""
    head = tl.program_id(1).to(tl.int64)
    at, down, column = tl.arange(0, C), tl.arange(0, DK), tl.program_id(0) * B + tl.arange(0, B)
    state = tl.zeros((DK, B), tl.float32)
    every = rows.to(tl.int64) * HEADS
    for chunk in range(rows // C):
        token = chunk * C + at
        origin = tl.cast(chunk, tl.int64) * C * HEADS + head
        row = origin + at * HEADS
        place = origin * V + at[:, None] * (HEADS * V) + column[None, :]
        there = (column < V)[None, :]
        if KEEP:
            inside = (chunk * HEADS + head) * K * V + down[:, None] * V + column[None, :]
            tl.store(states + inside, state.to(states.dtype.element_ty), mask=(down < K)[:, None] & there)
        k = rows_of(key, chunk, key_stride, head // GROUPS, down, tokens, C, K)
        erased = tl.load(
            erasing + origin * K + at[:, None] * (HEADS * K) + down[None, :], mask=(down < K)[None, :], other=0.0
        )
        right = tl.load(corrected + place, mask=there, other=0.0).to(tl.float32) - dot(erased, state, DOT)
        if KEEP:
            tl.store(corrected + place, right.to(corrected.dtype.element_ty), mask=there)
        if READ:
            reading = tl.load(factors + row) * tl.load(factors + 2 * every + row)
            q = rows_of(query, chunk, query_stride, head // GROUPS, down, tokens, C, K)
            scores = tl.load(attention + origin * C + at[:, None] * (HEADS * C) + at[None, :])
            read = dot(q, state, DOT) * reading[:, None] + dot(scores, right, DOT)
            tl.store(out + place, read.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & there)
        writing = tl.load(factors + every + row) * tl.load(factors + 3 * every + row)
        written = dot(tl.trans(k), right * writing[:, None], DOT)
        state = state * tl.load(factors + origin + (C - 1) * HEADS) + written


def _options(query: Tensor, value: Tensor, chunk: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The programs, and what they are compiled for."""
    half = value.dtype == torch.bfloat16
    columns = min(32 if half else 16, power_of_two(value.shape[2], 16))
    constants = sizes(query, value, chunk) | {"B": columns}
    return (blocks(value.shape[2], columns), value.shape[1]), constants | {"stages": 2 if half else 1, "warps": 8}


def _run_forward(
    query: Tensor, key: Tensor, erasing: Tensor, attention: Tensor, factors: Tensor,
    tokens: int, *, corrected: Tensor, out: Tensor, states: Tensor,
) -> None:  # fmt: skip
    grid, options = _options(query, corrected, attention.shape[-1])
    launch(
        _forward,
        grid,
        query, key, erasing, attention, factors, corrected, out, states,
        tokens, len(corrected), query.stride(0), key.stride(0),
        READ=out.numel() > 0, KEEP=states.numel() > 0, **options,
    )  # fmt: skip


def _reference_forward(
    query: Tensor, key: Tensor, erasing: Tensor, attention: Tensor, factors: Tensor,
    tokens: int, *, corrected: Tensor, out: Tensor, states: Tensor,
) -> None:  # fmt: skip
    heads, chunk = corrected.shape[1], attention.shape[-1]
    q, k = (by_chunk(x.repeat_interleave(heads // x.shape[1], 1), chunk) for x in (query, key))
    erased, scores, right = (by_chunk(x, chunk) for x in (erasing, attention, corrected))
    gamma, kappa, query_factor, key_factor = (by_chunk(x, chunk)[..., None] for x in factors)
    q, k = q * gamma * query_factor, k * kappa * key_factor
    state, outputs = right.new_zeros(heads, q.shape[-1], right.shape[-1]), torch.empty_like(right)
    for n in range(len(q)):
        if states.numel():
            states[n] = state
        right[n] -= erased[n] @ state
        outputs[n] = q[n] @ state + scores[n] @ right[n]
        state = gamma[n, :, -1:] * state + k[n].mT @ right[n]
    if out.numel():
        out.copy_(by_row(outputs)[:tokens])
    if states.numel():
        corrected.copy_(by_row(right))


def _prepared_trials(device: torch.device) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
    for inputs, chunk in trial_inputs(device):
        outputs = prepared(inputs[0], inputs[2], chunk)
        delta_prepare.reference(*inputs, **outputs)
        yield inputs, outputs


def scan_inputs(inputs: Sequence[Tensor], made: dict[str, Tensor]) -> list[Tensor]:
    return [*inputs[:2], *(made[name] for name in ("erasing", "attention", "factors"))]


def empty_states(query: Tensor, made: dict[str, Tensor]) -> Tensor:
    rows, heads, chunk = made["inverse"].shape
    value = made["corrected"]
    return value.new_empty(rows // chunk, heads, query.shape[2], value.shape[2])


def _forward_trials(device: torch.device) -> Iterator[Arguments]:
    for keep in (False, True):
        for inputs, made in _prepared_trials(device):
            out = torch.empty_like(inputs[2][:0] if keep else inputs[2])
            states = empty_states(inputs[0], made)[: None if keep else 0]
            outputs = {"corrected": made["corrected"], "out": out, "states": states}
            yield (*scan_inputs(inputs, made), len(inputs[2])), outputs


# After delta_prepare, of whose results these are. Either out [N, hv, dv] or states [n, hv, dk, dv] may be empty: then
# it is left out. states, of the dtype of value: before each chunk; with them, V' replaces T (β v) in corrected.
delta_scan = kernel(
    "delta_scan",
    "(Tensor query, Tensor key, Tensor erasing, Tensor attention, Tensor factors,"
    " int tokens, *, Tensor(a!) corrected, Tensor(b!) out, Tensor(c!) states) -> ()",
    run=_run_forward,
    reference=_reference_forward,
    trials=_forward_trials,
    **TOLERANCES,
)


@jit
def _backward(
    query, key, erasing, attention, factors, d_out, d_corrected, d_states,
    tokens, rows, query_stride, key_stride, HEADS: tl.constexpr, GROUPS: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (i, h): columns i · B … of the gradients of the states of value head h."""
    head = tl.program_id(1).to(tl.int64)
    at, down, column = tl.arange(0, C), tl.arange(0, DK), tl.program_id(0) * B + tl.arange(0, B)
    d_state = tl.zeros((DK, B), tl.float32)
    every = rows.to(tl.int64) * HEADS
    chunks = rows // C
    for step in range(chunks):
        chunk = chunks - 1 - step
        token = chunk * C + at
        origin = tl.cast(chunk, tl.int64) * C * HEADS + head
        row = origin + at * HEADS
        place = origin * V + at[:, None] * (HEADS * V) + column[None, :]
        there = (column < V)[None, :]
        inside = (chunk * HEADS + head) * K * V + down[:, None] * V + column[None, :]
        tl.store(d_states + inside, d_state.to(d_states.dtype.element_ty), mask=(down < K)[:, None] & there)
        k = rows_of(key, chunk, key_stride, head // GROUPS, down, tokens, C, K)
        q = rows_of(query, chunk, query_stride, head // GROUPS, down, tokens, C, K)
        reading = tl.load(factors + row) * tl.load(factors + 2 * every + row)
        writing = tl.load(factors + every + row) * tl.load(factors + 3 * every + row)
        scores = tl.load(attention + origin * C + at[:, None] * (HEADS * C) + at[None, :])
        do = tl.load(d_out + place, mask=(token < tokens)[:, None] & there, other=0.0)
        d_right = dot(tl.trans(scores), do, DOT) + dot(k, d_state, DOT) * writing[:, None]
        tl.store(d_corrected + place, d_right.to(d_corrected.dtype.element_ty), mask=there)
        erased = tl.load(
            erasing + origin * K + at[:, None] * (HEADS * K) + down[None, :], mask=(down < K)[None, :], other=0.0
        )
        d_state = d_state * tl.load(factors + origin + (C - 1) * HEADS)
        d_state += dot(tl.trans(q), do.to(tl.float32) * reading[:, None], DOT)
        d_state -= dot(tl.trans(erased), d_right, DOT)


def _run_backward(
    query: Tensor, key: Tensor, erasing: Tensor, attention: Tensor, factors: Tensor,
    d_out: Tensor, *, d_corrected: Tensor, d_states: Tensor,
) -> None:  # fmt: skip
    grid, options = _options(query, d_corrected, attention.shape[-1])
    if capability(query.device)[0] == 10:
        options["stages"] = 1  # Triton 3.6 spills registers with loads ahead
    launch(
        _backward,
        grid,
        query, key, erasing, attention, factors, d_out, d_corrected, d_states,
        len(d_out), len(d_corrected), query.stride(0), key.stride(0), **options,
    )  # fmt: skip


def _reference_backward(
    query: Tensor, key: Tensor, erasing: Tensor, attention: Tensor, factors: Tensor,
    d_out: Tensor, *, d_corrected: Tensor, d_states: Tensor,
) -> None:  # fmt: skip
    heads, chunk = d_out.shape[1], attention.shape[-1]
    q, k = (by_chunk(x.repeat_interleave(heads // x.shape[1], 1), chunk) for x in (query, key))
    erased, scores, do = (by_chunk(x, chunk) for x in (erasing, attention, d_out))
    gamma, kappa, query_factor, key_factor = (by_chunk(x, chunk)[..., None] for x in factors)
    q, k = q * gamma * query_factor, k * kappa * key_factor
    d_state, d_right = do.new_zeros(d_states.shape[1:]), torch.empty_like(do)
    for n in reversed(range(len(q))):
        d_states[n] = d_state
        d_right[n] = scores[n].mT @ do[n] + k[n] @ d_state
        d_state = gamma[n, :, -1:] * d_state + q[n].mT @ do[n] - erased[n].mT @ d_right[n]
    d_corrected.copy_(by_row(d_right))


def _backward_trials(device: torch.device) -> Iterator[Arguments]:
    for inputs, made in _prepared_trials(device):
        outputs = {"d_corrected": torch.empty_like(made["corrected"]), "d_states": empty_states(inputs[0], made)}
        yield (*scan_inputs(inputs, made), torch.sin(inputs[2] * 9)), outputs


# d_out [N, hv, dv]; d_corrected [M, hv, dv], of V'; d_states [n, hv, dk, dv], of the states after each chunk; both in
# the dtype of value.
delta_scan_backward = kernel(
    "delta_scan_backward",
    "(Tensor query, Tensor key, Tensor erasing, Tensor attention, Tensor factors,"
    " Tensor d_out, *, Tensor(a!) d_corrected, Tensor(b!) d_states) -> ()",
    run=_run_backward,
    reference=_reference_backward,
    trials=_backward_trials,
    **TOLERANCES,
)
