"""The gated delta rule's gradients of queries, keys and decays, from those inside the chunks and those of the states.

Symbols, shapes and accuracy as in models/kernels/delta_chunks.py. A launch for parts of the keys' width, which meet in
the lengths of keys and queries and in the decays: a second launch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from models.kernels.delta_chunks import TOLERANCES, by_chunk, by_row, chunk_decays, dot, rows_of, sizes
from models.kernels.delta_inside import delta_inside, inside, through_scans
from quant.kernels.choice import Arguments, kernel
from quant.kernels.language import blocks, jit, launch, tl


@jit
def _through_states(
    query, key, beta, factors, corrected, states, d_out, d_right, d_states, d_attention, d_system,
    d_query, d_key, d_log, d_beta, d_carry, tokens, rows, query_stride, key_stride,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (i, h, p): chunk i of key head h and the value heads that read it; columns p · B … of the keys."""
    chunk, key_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, across = tl.arange(0, C), part * B + tl.arange(0, B)
    token = chunk * C + at
    known = token < tokens
    every = rows.to(tl.int64) * HEADS
    q = rows_of(query, chunk, query_stride, key_head, across, tokens, C, K)
    k = rows_of(key, chunk, key_stride, key_head, across, tokens, C, K)
    dq = tl.zeros((C, B), tl.float32)
    dk = tl.zeros((C, B), tl.float32)
    for group in range(GROUPS):
        head = key_head * GROUPS + group
        origin = tl.cast(chunk, tl.int64) * C * HEADS + head
        row = origin + at * HEADS
        b = tl.load(beta + row, mask=known, other=0.0).to(tl.float32)
        gamma, kappa = tl.load(factors + row), tl.load(factors + every + row)
        query_factor, key_factor = tl.load(factors + 2 * every + row), tl.load(factors + 3 * every + row)
        pairs = origin * C + at[:, None] * (HEADS * C) + at[None, :]
        square = tl.load(d_attention + pairs).to(tl.float32)
        dq += dot(square * key_factor[None, :], k, DOT)
        dk += dot(tl.trans(square * query_factor[:, None]), q, DOT)
        square = tl.load(d_system + pairs).to(tl.float32)
        dk += dot((square + tl.trans(square)) * key_factor[None, :], k, DOT)

        # γ q reads the states, T (β γ k) S erases, κ k writes; γ of the last token carries them on. One after another:
        # together they don't fit the registers of every card.
        of_states = (tl.cast(chunk, tl.int64) * HEADS + head) * K * V + across[:, None] * V
        of_values = origin * V + at[:, None] * (HEADS * V)
        wide = tl.zeros((C, B), tl.float32)
        for first in range(0, DV, B):
            column = (first + tl.arange(0, B))[None, :]
            state = tl.load(states + of_states + column, mask=(across < K)[:, None] & (column < V), other=0.0)
            do = tl.load(d_out + of_values + column, mask=known[:, None] & (column < V), other=0.0)
            wide += dot(do, tl.trans(state), DOT)
        wide *= gamma[:, None]
        dq += wide
        log = query_factor * tl.sum(q.to(tl.float32) * wide, 1)
        wide = tl.zeros((C, B), tl.float32)
        for first in range(0, DV, B):
            column = (first + tl.arange(0, B))[None, :]
            state = tl.load(states + of_states + column, mask=(across < K)[:, None] & (column < V), other=0.0)
            right = tl.load(d_right + of_values + column, mask=column < V, other=0.0)
            wide += dot(right, tl.trans(state), DOT)
        wide *= gamma[:, None]
        dk -= wide * b[:, None]
        common = key_factor * tl.sum(k.to(tl.float32) * wide, 1)
        tl.store(d_beta + part * every + row, -common)
        log -= b * common
        wide = tl.zeros((C, B), tl.float32)
        carried = tl.zeros((B,), tl.float32)
        for first in range(0, DV, B):
            column = (first + tl.arange(0, B))[None, :]
            there = (across < K)[:, None] & (column < V)
            d_state = tl.load(d_states + of_states + column, mask=there, other=0.0)
            right = tl.load(corrected + of_values + column, mask=column < V, other=0.0)
            wide += dot(right, tl.trans(d_state), DOT)
            state = tl.load(states + of_states + column, mask=there, other=0.0)
            carried += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
        wide *= kappa[:, None]
        dk += wide
        wide *= k.to(tl.float32) * key_factor[:, None]
        # Their sum is left to the next kernel: Triton 3.7 doesn't compile it here for data-centre Blackwell.
        carried = carried * tl.load(factors + origin + (C - 1) * HEADS) + tl.sum(wide, 0)
        tl.store(d_carry + (tl.cast(chunk, tl.int64) * HEADS + head) * K + across, carried, mask=across < K)
        log -= tl.sum(wide, 1)
        tl.store(d_log + part * every + row, log)
    own = (token.to(tl.int64)[:, None] * (HEADS // GROUPS) + key_head) * K + across[None, :]
    inside = known[:, None] & (across < K)[None, :]
    tl.store(d_query + own, dq, mask=inside)
    tl.store(d_key + own, dk, mask=inside)


def _run_through_states(
    query: Tensor, key: Tensor, beta: Tensor, factors: Tensor, corrected: Tensor, states: Tensor, d_out: Tensor,
    d_right: Tensor, d_states: Tensor, d_attention: Tensor, d_system: Tensor, *,
    d_query: Tensor, d_key: Tensor, d_log: Tensor, d_beta: Tensor, d_carry: Tensor,
) -> None:  # fmt: skip
    rows, _, chunk = d_attention.shape
    launch(
        _through_states,
        (rows // chunk, query.shape[1], len(d_log)),
        query, key, beta, factors, corrected, states, d_out, d_right, d_states, d_attention, d_system,
        d_query, d_key, d_log, d_beta, d_carry, len(d_out), rows, query.stride(0), key.stride(0),
        **sizes(query, corrected, chunk) | {"B": width_of(corrected)}, warps=8, stages=1,
    )  # fmt: skip


def width_of(value: Tensor) -> int:
    """Columns of keys that a program has."""
    return 32 if value.dtype == torch.bfloat16 else 16


def _reference_through_states(
    query: Tensor, key: Tensor, beta: Tensor, factors: Tensor, corrected: Tensor, states: Tensor, d_out: Tensor,
    d_right: Tensor, d_states: Tensor, d_attention: Tensor, d_system: Tensor, *,
    d_query: Tensor, d_key: Tensor, d_log: Tensor, d_beta: Tensor, d_carry: Tensor,
) -> None:  # fmt: skip
    chunk, heads = d_attention.shape[-1], corrected.shape[1]
    q, k = (by_chunk(x.repeat_interleave(heads // x.shape[1], 1), chunk) for x in (query, key))
    gamma, kappa, query_factor, key_factor = (by_chunk(x, chunk)[..., None] for x in factors)
    q, k, b = q * query_factor, k * key_factor, by_chunk(beta, chunk)[..., None]
    right, do, d_right, attention, system = (
        by_chunk(x, chunk) for x in (corrected, d_out, d_right, d_attention, d_system)
    )
    state, d_state = states.float(), d_states.float()
    read, erased, written = gamma * (do @ state.mT), gamma * (d_right @ state.mT), kappa * (right @ d_state.mT)
    for out, gradient in (
        (d_query, attention @ k + read),
        (d_key, attention.mT @ q + (system + system.mT) @ k + written - b * erased),
    ):
        out.copy_(by_row(gradient)[: len(out)].unflatten(1, (out.shape[1], -1)).sum(2))
    d_carry.copy_(gamma[:, :, -1] * (state * d_state).sum(-1) + (k * written).sum(2))
    width = width_of(corrected)
    for part in range(len(d_log)):  # by columns of the keys
        columns = slice(part * width, (part + 1) * width)
        of_read, of_erased, of_written = (
            (x * y)[..., columns].sum(-1) for x, y in ((q, read), (k, erased), (k, written))
        )
        log = of_read - b[..., 0] * of_erased - of_written
        d_log[part], d_beta[part] = by_row(log), by_row(-of_erased)


def parts(query: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """Empty outputs of `delta_through_states`."""
    count = blocks(query.shape[2], width_of(made["corrected"]))
    factors = made["factors"]
    empty = {name: factors.new_empty(count, *factors.shape[1:]) for name in ("d_log", "d_beta")}
    empty |= {name: factors.new_empty(query.shape) for name in ("d_query", "d_key")}
    _, heads, chunk = made["inverse"].shape
    return empty | {"d_carry": factors.new_empty(factors.shape[1] // chunk, heads, query.shape[2])}


def _through_states_trials(device: torch.device) -> Iterator[Arguments]:
    for inputs, made, states, d_out, back in through_scans(device):
        query, key, _, _, beta, _ = inputs
        within = inside(inputs[2], made)
        right, back_right = made["corrected"], back["d_corrected"]
        delta_inside.reference(
            *inputs, made["inverse"], right, made["factors"], d_out, d_corrected=back_right, **within
        )
        matrices = (within["d_attention"], within["d_system"])
        arguments = (query, key, beta, made["factors"], right, states, d_out, back_right, back["d_states"], *matrices)
        yield arguments, parts(query, made)


# query, key, beta as delta_prepare's, factors its result; corrected V', d_right (d_corrected), d_attention and d_system
# as delta_inside leaves them, states and d_states as the scans do, d_out [N, hv, dv]. d_query, d_key float32
# [N, hk, dk], of what is scaled to unit length; d_log, d_beta float32 [p, M, hv]: of each part of the keys' columns;
# d_carry float32 [n, hv, dk]: what each chunk's last token has to add to d_log, before it is summed over the columns.
delta_through_states = kernel(
    "delta_through_states",
    "(Tensor query, Tensor key, Tensor beta, Tensor factors, Tensor corrected, Tensor states, Tensor d_out,"
    " Tensor d_right, Tensor d_states, Tensor d_attention, Tensor d_system, *, Tensor(a!) d_query,"
    " Tensor(b!) d_key, Tensor(c!) d_log, Tensor(d!) d_beta, Tensor(e!) d_carry) -> ()",
    run=_run_through_states,
    reference=_reference_through_states,
    trials=_through_states_trials,
    **TOLERANCES,
)


@jit
def _lengths(
    query, key, decay, positions, factors, unit_query, unit_key, inner_log, inner_beta, log_parts, beta_parts, carried,
    d_query, d_key, d_decay, d_beta, tokens, rows, query_stride, key_stride, width, PARTS: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (i, h): chunk i of key head h and the value heads that read it."""
    chunk, key_head = tl.program_id(0), tl.program_id(1)
    at, down = tl.arange(0, C), tl.arange(0, DK)
    token = chunk * C + at
    known = token < tokens
    every = rows.to(tl.int64) * HEADS
    head = key_head * GROUPS
    row = token.to(tl.int64) * HEADS + head
    place = (token.to(tl.int64)[:, None] * (HEADS // GROUPS) + key_head) * K + down[None, :]
    there = known[:, None] & (down < K)[None, :]

    x = rows_of(query, chunk, query_stride, key_head, down, tokens, C, K).to(tl.float32)
    dx = tl.load(unit_query + place, mask=there, other=0.0)
    factor = tl.load(factors + 2 * every + row)
    dx = (dx - x * (tl.sum(x * dx, 1) * factor * factor * width)[:, None]) * factor[:, None]
    tl.store(d_query + place, dx.to(d_query.dtype.element_ty), mask=there)
    x = rows_of(key, chunk, key_stride, key_head, down, tokens, C, K).to(tl.float32)
    dx = tl.load(unit_key + place, mask=there, other=0.0)
    factor = tl.load(factors + 3 * every + row)
    dx = (dx - x * (tl.sum(x * dx, 1) * factor * factor)[:, None]) * factor[:, None]
    tl.store(d_key + place, dx.to(d_key.dtype.element_ty), mask=there)

    # The log of γ_i is the sum of its document's decays up to i.
    known_at = tl.minimum(token, tokens - 1)
    start = known_at - tl.load(positions + known_at).to(tl.int32)
    same = (at[:, None] >= at[None, :]) & (start[:, None] == start[None, :])
    for group in range(GROUPS):
        log, db = tl.load(inner_log + row + group), tl.load(inner_beta + row + group)
        for part in range(PARTS):
            log += tl.load(log_parts + part * every + row + group)
            db += tl.load(beta_parts + part * every + row + group)
        last = tl.load(carried + (tl.cast(chunk, tl.int64) * HEADS + head + group) * K + down, mask=down < K, other=0.0)
        log += tl.where(at == C - 1, tl.sum(last, 0), 0.0)
        dg = tl.sum(tl.where(same, log[:, None], 0.0), 0)
        tl.store(d_decay + row + group, dg, mask=known)
        tl.store(d_beta + row + group, db, mask=known)


def _run_lengths(
    query: Tensor, key: Tensor, decay: Tensor, positions: Tensor, factors: Tensor,
    unit_query: Tensor, unit_key: Tensor, inner_log: Tensor, inner_beta: Tensor,
    log_parts: Tensor, beta_parts: Tensor, carried: Tensor, chunk: int, *,
    d_query: Tensor, d_key: Tensor, d_decay: Tensor, d_beta: Tensor,
) -> None:  # fmt: skip
    rows, heads = inner_log.shape
    value = query.new_empty(0, heads, 1)
    launch(
        _lengths,
        (rows // chunk, query.shape[1]),
        query, key, decay, positions, factors, unit_query, unit_key, inner_log, inner_beta, log_parts, beta_parts,
        carried, d_query, d_key, d_decay, d_beta, len(decay), rows, query.stride(0), key.stride(0),
        float(query.shape[2]),
        PARTS=len(log_parts), **sizes(query, value, chunk), warps=4, stages=1,
    )  # fmt: skip


def _reference_lengths(
    query: Tensor, key: Tensor, decay: Tensor, positions: Tensor, factors: Tensor,
    unit_query: Tensor, unit_key: Tensor, inner_log: Tensor, inner_beta: Tensor,
    log_parts: Tensor, beta_parts: Tensor, carried: Tensor, chunk: int, *,
    d_query: Tensor, d_key: Tensor, d_decay: Tensor, d_beta: Tensor,
) -> None:  # fmt: skip
    tokens, groups = len(decay), decay.shape[1] // query.shape[1]
    for x, dx, factor, length, out in (
        (query, unit_query, factors[2], query.shape[2], d_query),
        (key, unit_key, factors[3], 1, d_key),
    ):
        scale = factor[:tokens, ::groups, None]
        wide = x.float()
        out.copy_((dx - wide * scale**2 * length * (wide * dx).sum(-1, keepdim=True)) * scale)
    _, _, same = chunk_decays(decay, positions, chunk)
    log = by_chunk(inner_log + log_parts.sum(0), chunk)[..., None]
    log[:, :, -1, 0] += carried.sum(-1)
    d_decay.copy_(by_row((same.float().mT @ log)[..., 0])[:tokens])
    d_beta.copy_((inner_beta + beta_parts.sum(0))[:tokens])


def _lengths_trials(device: torch.device) -> Iterator[Arguments]:
    for (inputs, made, _, _, _), (arguments, outputs) in zip(
        through_scans(device), _through_states_trials(device), strict=True
    ):
        query, key, _, decay, beta, positions = inputs
        delta_through_states.reference(*arguments, **outputs)
        inner = (torch.sin(made["factors"][0] * 9), torch.cos(made["factors"][0] * 9))
        chunk = made["inverse"].shape[-1]
        given = (
            outputs["d_query"],
            outputs["d_key"],
            *inner,
            outputs["d_log"],
            outputs["d_beta"],
            outputs["d_carry"],
            chunk,
        )
        results = zip(("d_query", "d_key", "d_decay", "d_beta"), (query, key, decay, beta), strict=True)
        yield (query, key, decay, positions, made["factors"], *given), {n: torch.empty_like(x) for n, x in results}


# unit_query and unit_key, log_parts, beta_parts and carried are delta_through_states' results, inner_log and inner_beta
# delta_inside's. Gradients contiguous, like the arguments of the rule.
delta_lengths = kernel(
    "delta_lengths",
    "(Tensor query, Tensor key, Tensor decay, Tensor positions, Tensor factors, Tensor unit_query, Tensor unit_key,"
    " Tensor inner_log, Tensor inner_beta, Tensor log_parts, Tensor beta_parts, Tensor carried, int chunk, *,"
    " Tensor(a!) d_query, Tensor(b!) d_key, Tensor(c!) d_decay, Tensor(d!) d_beta) -> ()",
    run=_run_lengths,
    reference=_reference_lengths,
    trials=_lengths_trials,
    **TOLERANCES,
)
