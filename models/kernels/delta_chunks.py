"""The gated delta rule's chunks, before the states are known: a launch for everything but the states.

Symbols as in models/attention/delta_rule.py, which says what is computed; here q and k are as they are before they are
scaled to unit length, and their factors ρ (of the query with dk**-0.5) go into what they are multiplied by.

Operands of products are rounded to the dtype of the value where that is bfloat16, and sums are float32. With float32
values a product is three products of TF32 parts, which is about float32.

Shapes: N tokens in n chunks of C, rows M = n · C, hk key heads of width dk, hv value heads of width dv.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.kernels.choice import Arguments, kernel
from quant.kernels.language import INTERPRETED, blocks, jit, launch, power_of_two, tl

NORM_EPS = 1e-6  # under the root when keys and queries are scaled to unit length


def chunk_of(dtype: torch.dtype) -> int:
    """Tokens in a chunk: of float32 fewer, so that a program's share of the smaller cards' memory holds them."""
    return 64 if dtype == torch.bfloat16 else 32


def sizes(query: Tensor, value: Tensor, chunk: int) -> dict[str, Any]:
    """What all kernels here are compiled for."""
    bfloat16 = value.dtype == torch.bfloat16 and not INTERPRETED
    return {
        "HEADS": value.shape[1], "GROUPS": value.shape[1] // query.shape[1], "C": chunk,
        "K": query.shape[2], "V": value.shape[2], "DK": power_of_two(query.shape[2], 16),
        "DV": power_of_two(value.shape[2], 16), "B": min(32, power_of_two(value.shape[2], 16)),
        "DOT": tl.bfloat16 if bfloat16 else tl.float32,
    }  # fmt: skip


@jit
def dot(a, b, DOT: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="tf32x3")


@jit
def rows_of(base, chunk, stride, head, columns, tokens, C: tl.constexpr, WIDTH: tl.constexpr):
    """A chunk's rows x[:, head, columns] of x [N, heads, WIDTH] with that stride of a token, zero outside."""
    at = tl.arange(0, C)
    base += tl.cast(chunk, tl.int64) * C * stride + head * WIDTH
    inside = (chunk * C + at < tokens)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + at[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@jit
def decays(decay, positions, chunk, head, tokens, HEADS: tl.constexpr, C: tl.constexpr):
    """The e_ij [C, C] and γ [C] of a chunk, and where each token's document starts [C].

    Every e_ij is a sum from token to token, not the difference of two: nothing is lost after a strong decay. The tokens
    that fill the last chunk belong to its last document.
    """
    at = tl.arange(0, C)
    token = chunk * C + at
    known = tl.minimum(token, tokens - 1)
    start = known - tl.load(positions + known).to(tl.int32)
    g = tl.load(decay + token.to(tl.int64) * HEADS + head, mask=token < tokens, other=0.0).to(tl.float32)
    between = tl.cumsum(tl.where(at[:, None] > at[None, :], g[:, None], 0.0), 0)
    between = tl.where((at[:, None] >= at[None, :]) & (start[:, None] == start[None, :]), tl.exp(between), 0.0)
    gamma = tl.where(start < chunk * C, tl.exp(tl.cumsum(g, 0)), 0.0)
    return between, gamma, start


@jit
def unit_lower_inverse(a, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)⁻¹ of a strictly lower triangular a [C, C].

    Blocks of b along the diagonal are inverted, then those of 2b from them: [[T₁, 0], [-T₂ a₂₁ T₁, T₂]], all at once as
    T - T a' T with the blocks a₂₁ as a'. As stable as forward substitution by blocks, unlike a series in powers of a.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inverse = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, a, 0.0)
    level = 1
    while (1 << level) < C:
        below = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level), a, 0.0)
        product = tl.dot(inverse, below, input_precision=PRECISION)
        inverse -= tl.dot(product, inverse, input_precision=PRECISION)
        level += 1
    return inverse


@jit
def _prepare(
    query, key, value, decay, beta, positions, inverse, attention, erasing, corrected, factors,
    tokens, rows, query_stride, key_stride, value_stride, scale, EPS: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, B: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (i, h): chunk i of value head h. Widths are taken B columns at a time."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, C)
    token = chunk * C + at
    i, j = at[:, None], at[None, :]
    origin = tl.cast(chunk, tl.int64) * C * HEADS + head
    row, square = origin + at * HEADS, origin * C + i * (HEADS * C) + j

    system = tl.zeros((C, C), tl.float32)
    scores = tl.zeros((C, C), tl.float32)
    key_squares = tl.zeros((C,), tl.float32)
    query_squares = tl.zeros((C,), tl.float32)
    for first in range(0, DK, B):
        columns = first + tl.arange(0, B)
        k = rows_of(key, chunk, key_stride, head // GROUPS, columns, tokens, C, K)
        q = rows_of(query, chunk, query_stride, head // GROUPS, columns, tokens, C, K)
        system += dot(k, tl.trans(k), DOT)
        scores += dot(q, tl.trans(k), DOT)
        wide = k.to(tl.float32)
        key_squares += tl.sum(wide * wide, 1)
        wide = q.to(tl.float32)
        query_squares += tl.sum(wide * wide, 1)
    key_factor, query_factor = 1.0 / tl.sqrt(key_squares + EPS), scale / tl.sqrt(query_squares + EPS)
    between, gamma, _ = decays(decay, positions, chunk, head, tokens, HEADS, C)
    kappa = tl.sum(tl.where(i == C - 1, between, 0.0), 0)
    between *= key_factor[None, :]
    scores *= query_factor[:, None] * between
    tl.store(attention + square, scores.to(attention.dtype.element_ty))
    every = rows.to(tl.int64) * HEADS
    tl.store(factors + row, gamma)
    tl.store(factors + every + row, kappa)
    tl.store(factors + 2 * every + row, query_factor)
    tl.store(factors + 3 * every + row, key_factor)

    b = tl.load(beta + row, mask=token < tokens, other=0.0).to(tl.float32)
    system = tl.where(i > j, system * (b * key_factor)[:, None] * between, 0.0)
    solved = unit_lower_inverse(system, C, PRECISION)
    tl.store(inverse + square, solved.to(inverse.dtype.element_ty))
    solved *= b[None, :]
    for first in range(0, DV, B):
        columns = first + tl.arange(0, B)
        v = rows_of(value, chunk, value_stride, head, columns, tokens, C, V)
        right = dot(solved, v, DOT).to(corrected.dtype.element_ty)
        tl.store(corrected + origin * V + i * (HEADS * V) + columns[None, :], right, mask=(columns < V)[None, :])
    solved *= (gamma * key_factor)[None, :]
    for first in range(0, DK, B):
        columns = first + tl.arange(0, B)
        k = rows_of(key, chunk, key_stride, head // GROUPS, columns, tokens, C, K)
        erased = dot(solved, k, DOT).to(erasing.dtype.element_ty)
        tl.store(erasing + origin * K + i * (HEADS * K) + columns[None, :], erased, mask=(columns < K)[None, :])


def _run(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, positions: Tensor, *,
    inverse: Tensor, attention: Tensor, erasing: Tensor, corrected: Tensor, factors: Tensor,
) -> None:  # fmt: skip
    rows, heads, chunk = inverse.shape
    launch(
        _prepare,
        (rows // chunk, heads),
        query, key, value, decay, beta, positions, inverse, attention, erasing, corrected, factors,
        len(value), rows, query.stride(0), key.stride(0), value.stride(0), query.shape[2] ** -0.5, EPS=NORM_EPS,
        PRECISION="tf32" if value.dtype == torch.bfloat16 else "tf32x3", **sizes(query, value, chunk),
        warps=8, stages=1,
    )  # fmt: skip


def by_chunk(x: Tensor, chunk: int) -> Tensor:
    """[N, h, ...] as [n, h, C, ...], filled up with zeros."""
    padding = (0, 0) * (x.dim() - 1) + (0, -len(x) % chunk)
    return F.pad(x.float(), padding).unflatten(0, (-1, chunk)).transpose(1, 2)


def by_row(x: Tensor) -> Tensor:
    """[n, h, C, ...] as [M, h, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def units(x: Tensor, factor: float, heads: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Keys or queries as they are [n, hv, C, dk], and their factors ρ [n, hv, C, 1]."""
    x = by_chunk(x.repeat_interleave(heads // x.shape[1], 1), chunk)
    return x, factor * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


def chunk_decays(decay: Tensor, positions: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The e_ij [n, hv, C, C], γ [n, hv, C, 1], and which i and j are of one document, [n, 1, C, C]."""
    g, tokens = by_chunk(decay, chunk), len(decay)
    starts = torch.arange(tokens, device=decay.device) - positions
    starts = torch.cat((starts, starts[-1:].expand(-tokens % chunk))).view(-1, 1, chunk)
    same = (starts[..., :, None] == starts[..., None, :]).tril()
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=decay.device).tril(-1)
    between = (g[..., :, None] * later).cumsum(-2).exp() * same
    begun = starts < torch.arange(len(g), device=decay.device)[:, None, None] * chunk
    return between, (g.cumsum(-1).exp() * begun)[..., None], same


def _reference(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, positions: Tensor, *,
    inverse: Tensor, attention: Tensor, erasing: Tensor, corrected: Tensor, factors: Tensor,
) -> None:  # fmt: skip
    chunk, heads = inverse.shape[-1], value.shape[1]
    (q, query_factor), (k, key_factor) = units(query, query.shape[2] ** -0.5, heads, chunk), units(key, 1, heads, chunk)
    between, gamma, _ = chunk_decays(decay, positions, chunk)
    b = by_chunk(beta, chunk)[..., None]
    unit = k * key_factor
    solved = torch.linalg.inv(torch.eye(chunk, device=key.device) + (b * (unit @ unit.mT) * between).tril(-1))
    inverse.copy_(by_row(solved))
    attention.copy_(by_row((q * query_factor) @ unit.mT * between))
    erasing.copy_(by_row(solved @ (b * gamma * unit)))
    corrected.copy_(by_row(solved @ (b * by_chunk(value, chunk))))
    for out, factor in zip(factors, (gamma, between[:, :, -1, :, None], query_factor, key_factor), strict=True):
        out.copy_(by_row(factor)[..., 0])


def trial_inputs(device: torch.device) -> Iterator[tuple[list[Tensor], int]]:
    """query, key, value, decay, beta and positions of several documents, and the tokens of a chunk."""
    generator = torch.Generator().manual_seed(0)
    for lengths, key_heads, heads, dk, dv, dtype in (
        ((5, 30, 1, 40), 1, 2, 16, 24, torch.float32),
        ((70,), 1, 1, 128, 128, torch.bfloat16),
        ((30, 40), 1, 2, 64, 32, torch.bfloat16),
    ):
        tokens = sum(lengths)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        made = [numbers(tokens, h, d).to(dtype) for h, d in ((key_heads, dk), (key_heads, dk), (heads, dv))]
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        made += [-F.softplus(numbers(tokens, heads)), numbers(tokens, heads).sigmoid(), positions]
        yield made, chunk_of(dtype)


def prepared(query: Tensor, value: Tensor, chunk: int) -> dict[str, Tensor]:
    """Empty outputs of `delta_prepare`."""
    rows, heads = blocks(len(value), chunk) * chunk, value.shape[1]
    widths = {"inverse": chunk, "attention": chunk, "erasing": query.shape[2], "corrected": value.shape[2]}
    made = {name: value.new_empty(rows, heads, width) for name, width in widths.items()}
    return made | {"factors": value.new_empty(4, rows, heads, dtype=torch.float32)}


def _trials(device: torch.device) -> Iterator[Arguments]:
    for inputs, chunk in trial_inputs(device):
        yield tuple(inputs), prepared(inputs[0], inputs[2], chunk)


TOLERANCES = {"tolerance": 2e-5, "tolerance_16_bit": 2e-2}

# query, key [N, hk, dk], value [N, hv, dv], of any stride along N; decay, beta float32 [N, hv]; positions int64 [N].
# inverse T, attention P [M, hv, C], erasing T β γ k [M, hv, dk], corrected T (β v) [M, hv, dv], in the dtype of value;
# factors float32 [4, M, hv]: γ, κ, ρ of the query, ρ of the key.
delta_prepare = kernel(
    "delta_prepare",
    "(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor positions, *, Tensor(a!) inverse,"
    " Tensor(b!) attention, Tensor(c!) erasing, Tensor(d!) corrected, Tensor(e!) factors) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    **TOLERANCES,
)
