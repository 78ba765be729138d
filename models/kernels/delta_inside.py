"""The gated delta rule's gradients inside each chunk, once those of the corrected values are known.

Symbols, shapes and accuracy as in models/kernels/delta_chunks.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.kernels.delta_chunks import (
    TOLERANCES,
    by_chunk,
    by_row,
    chunk_decays,
    decays,
    delta_prepare,
    dot,
    prepared,
    rows_of,
    sizes,
    trial_inputs,
    units,
)
from models.kernels.delta_scan import delta_scan, delta_scan_backward, empty_states, scan_inputs
from quant.kernels.choice import Arguments, kernel
from quant.kernels.language import jit, launch, tl


@jit
def _inside(
    query, key, value, decay, beta, positions, inverse, corrected, factors, d_out,
    d_corrected, d_attention, d_system, d_value, d_log, d_beta,
    tokens, rows, query_stride, key_stride, value_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (i, h): chunk i of value head h. Widths are taken B columns at a time."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, C)
    known = chunk * C + at < tokens
    i, j = at[:, None], at[None, :]
    origin = tl.cast(chunk, tl.int64) * C * HEADS + head
    row, square = origin + at * HEADS, origin * C + i * (HEADS * C) + j
    b = tl.load(beta + row, mask=known, other=0.0).to(tl.float32)

    attention = tl.zeros((C, C), tl.float32)
    system = tl.zeros((C, C), tl.float32)
    db = tl.zeros((C,), tl.float32)
    for first in range(0, DV, B):
        columns = first + tl.arange(0, B)
        there = (columns < V)[None, :]
        inside = i * (HEADS * V) + columns[None, :]
        right = tl.load(corrected + origin * V + inside, mask=there, other=0.0)
        do = tl.load(d_out + origin * V + inside, mask=known[:, None] & there, other=0.0)
        attention += dot(do, tl.trans(right), DOT)
        d_right = tl.load(d_corrected + origin * V + inside, mask=there, other=0.0)
        d_right = dot(tl.trans(tl.load(inverse + square)), d_right, DOT)
        tl.store(d_corrected + origin * V + inside, d_right.to(d_corrected.dtype.element_ty), mask=there)
        system -= dot(d_right, tl.trans(right), DOT)
        v = rows_of(value, chunk, value_stride, head, columns, tokens, C, V)
        db += tl.sum(v.to(tl.float32) * d_right, 1)
        d_right = (d_right * b[:, None]).to(d_value.dtype.element_ty)
        tl.store(d_value + origin * V + inside, d_right, mask=known[:, None] & there)

    # Both are k·k or q·k times e_ij, and e_ij grows with the log of γ_i and falls with that of γ_j.
    between, _, _ = decays(decay, positions, chunk, head, tokens, HEADS, C)
    attention *= between
    system = tl.where(i > j, system * between, 0.0)
    tl.store(d_attention + square, attention.to(d_attention.dtype.element_ty))
    tl.store(d_system + square, (system * b[:, None]).to(d_system.dtype.element_ty))
    keys = tl.zeros((C, C), tl.float32)
    scores = tl.zeros((C, C), tl.float32)
    for first in range(0, DK, B):
        columns = first + tl.arange(0, B)
        k = rows_of(key, chunk, key_stride, head // GROUPS, columns, tokens, C, K)
        q = rows_of(query, chunk, query_stride, head // GROUPS, columns, tokens, C, K)
        keys += dot(k, tl.trans(k), DOT)
        scores += dot(q, tl.trans(k), DOT)
    every = rows.to(tl.int64) * HEADS
    query_factor, key_factor = tl.load(factors + 2 * every + row), tl.load(factors + 3 * every + row)
    keys *= system * key_factor[:, None] * key_factor[None, :]
    db += tl.sum(keys, 1)
    scores = keys * b[:, None] + scores * attention * query_factor[:, None] * key_factor[None, :]
    tl.store(d_log + row, tl.sum(scores, 1) - tl.sum(scores, 0))
    tl.store(d_beta + row, db)


def _run(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, positions: Tensor,
    inverse: Tensor, corrected: Tensor, factors: Tensor, d_out: Tensor, *,
    d_corrected: Tensor, d_attention: Tensor, d_system: Tensor, d_value: Tensor, d_log: Tensor, d_beta: Tensor,
) -> None:  # fmt: skip
    rows, heads, chunk = inverse.shape
    launch(
        _inside,
        (rows // chunk, heads),
        query, key, value, decay, beta, positions, inverse, corrected, factors, d_out,
        d_corrected, d_attention, d_system, d_value, d_log, d_beta,
        len(value), rows, query.stride(0), key.stride(0), value.stride(0), **sizes(query, value, chunk) | {"B": 16},
        warps=8, stages=1,
    )  # fmt: skip


def _reference(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, positions: Tensor,
    inverse: Tensor, corrected: Tensor, factors: Tensor, d_out: Tensor, *,
    d_corrected: Tensor, d_attention: Tensor, d_system: Tensor, d_value: Tensor, d_log: Tensor, d_beta: Tensor,
) -> None:  # fmt: skip
    chunk, heads = inverse.shape[-1], value.shape[1]
    q, k = (torch.mul(*units(x, f, heads, chunk)) for x, f in ((query, query.shape[2] ** -0.5), (key, 1)))
    between, _, _ = chunk_decays(decay, positions, chunk)
    b, v = by_chunk(beta, chunk)[..., None], by_chunk(value, chunk)
    solved, right, do, d_right = (by_chunk(x, chunk) for x in (inverse, corrected, d_out, d_corrected))
    d_right = solved.mT @ d_right
    attention, system = do @ right.mT * between, (-(d_right @ right.mT) * between).tril(-1)
    keys = system * (k @ k.mT)
    both = b * keys + attention * (q @ k.mT)
    d_corrected.copy_(by_row(d_right))
    d_attention.copy_(by_row(attention))
    d_system.copy_(by_row(b * system))
    d_value.copy_(by_row(b * d_right)[: len(value)])
    d_log.copy_(by_row(both.sum(-1) - both.sum(-2)))
    d_beta.copy_(by_row((v * d_right).sum(-1) + keys.sum(-1)))


def inside(value: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Empty outputs of `delta_inside` but d_corrected."""
    empty = {"d_attention": torch.empty_like(made["inverse"]), "d_system": torch.empty_like(made["inverse"])}
    empty |= {name: torch.empty_like(made["factors"][0]) for name in ("d_log", "d_beta")}
    return empty | {"d_value": value.new_empty(value.shape)}


def through_scans(
    device: torch.device,
) -> Iterator[tuple[list[Tensor], dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]]:
    """Trial arguments of the rule, what is prepared of them, their states, a d_out, and what the scan back leaves."""
    for inputs, chunk in trial_inputs(device):
        query, value = inputs[0], inputs[2]
        made = prepared(query, value, chunk)
        delta_prepare.reference(*inputs, **made)
        states, scan = empty_states(query, made), scan_inputs(inputs, made)
        delta_scan.reference(*scan, len(value), corrected=made["corrected"], out=value[:0], states=states)
        d_out, back = torch.sin(value * 9), {"d_corrected": made["corrected"].clone(), "d_states": states.clone()}
        delta_scan_backward.reference(*scan, d_out, **back)
        yield inputs, made, states, d_out, back


def _trials(device: torch.device) -> Iterator[Arguments]:
    for inputs, made, _, d_out, back in through_scans(device):
        outputs = {"d_corrected": back["d_corrected"], **inside(inputs[2], made)}
        yield (*inputs, made["inverse"], made["corrected"], made["factors"], d_out), outputs


# Arguments of the rule as delta_prepare's, whose results inverse and factors are; corrected V' [M, hv, dv]; d_out
# [N, hv, dv]. d_corrected [M, hv, dv], of V', becomes that of β v - β γ k S. d_attention and d_system [M, hv, C], of
# q_i·k_j and k_i·k_j; d_value [N, hv, dv]; d_log, of the log of γ, and d_beta float32 [M, hv]: the parts from here.
delta_inside = kernel(
    "delta_inside",
    "(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor positions, Tensor inverse,"
    " Tensor corrected, Tensor factors, Tensor d_out, *, Tensor(a!) d_corrected, Tensor(b!) d_attention,"
    " Tensor(c!) d_system, Tensor(d!) d_value, Tensor(e!) d_log, Tensor(f!) d_beta) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    **TOLERANCES,
)
