"""Products of rows that are sorted by expert with each expert's own matrix, where only the device knows how many rows
an expert has.

`ends` int32 [E] says where each expert's rows end among the n sorted ones; every tile finds its expert in it, so that
the host neither waits for the numbers nor launches by them. Rows may be gathered from tokens, and results be written
to the slots they belong to, without a copy in between. Sums are float32, rounded once.

Shapes: E experts, c of them in a chunk that begins with expert `first`; n sorted rows; K slots a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.kernels.choice import Arguments, kernel
from quant.kernels.language import INTERPRETED, blocks, capability, jit, launch, power_of_two, tl


@jit
def _dot(a, b, total, WIDE: tl.constexpr):
    """total + a @ b. WIDE: operands as float32, which they are, or the interpreter can't multiply; else those of a."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b.to(a.dtype), total)


@jit
def _grouped_product(
    rows, ends, slots, matrices, more_rows, more_matrices, out,
    first, experts, inner, columns, more_inner, chosen, scale,
    row_stride, expert_stride, inner_stride, column_stride,
    more_row_stride, more_expert_stride, more_inner_stride, more_column_stride, out_stride,
    E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, MORE: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (j, i): N columns of the i-th tile of M rows among those of the chunk's experts."""
    tile = tl.program_id(1)
    expert = tl.arange(0, E)
    here = expert < experts
    stop = tl.load(ends + first + expert, mask=here, other=0)
    start = tl.load(ends + first + expert - 1, mask=here & (first + expert > 0), other=0)
    tiles = tl.where(here, (stop - start + M - 1) // M, 0)
    upto = tl.cumsum(tiles, 0)
    if tile >= tl.sum(tiles, 0):
        return
    own = tl.sum((upto <= tile).to(tl.int32), 0)
    is_own = expert == own
    begin = tl.sum(tl.where(is_own, start, 0), 0)
    end = tl.sum(tl.where(is_own, stop, 0), 0)
    row = begin + (tile - tl.sum(tl.where(is_own, upto - tiles, 0), 0)) * M + tl.arange(0, M)
    valid = row < end
    row = tl.where(valid, row, begin).to(tl.int64)  # rows that are there, so that loads need no mask
    column = tl.program_id(0) * N + tl.arange(0, N)
    column_there = column < columns

    source = tl.load(slots + row) // chosen if GATHER else row
    row_at = rows + source[:, None] * row_stride
    matrix_at = matrices + own.to(tl.int64) * expert_stride + column[None, :].to(tl.int64) * column_stride
    along = tl.arange(0, K)
    total = tl.zeros((M, N), dtype=tl.float32)
    for k in range(0, inner, K):
        at = k + along
        if EVEN:
            a = tl.load(row_at + at[None, :])
            b = tl.load(matrix_at + at[:, None].to(tl.int64) * inner_stride)
        else:
            a = tl.load(row_at + at[None, :], mask=(at < inner)[None, :], other=0.0)
            there = (at < inner)[:, None] & column_there[None, :]
            b = tl.load(matrix_at + at[:, None].to(tl.int64) * inner_stride, mask=there, other=0.0)
        total = _dot(a, b, total, WIDE)
    if MORE:
        more_at = more_rows + row[:, None] * more_row_stride
        more_matrix = more_matrices + (first + own).to(tl.int64) * more_expert_stride
        for k in range(0, more_inner, R):
            at = k + tl.arange(0, R)
            there = at < more_inner
            a = tl.load(more_at + at[None, :], mask=there[None, :], other=0.0)
            b = tl.load(
                more_matrix + at[:, None] * more_inner_stride + column[None, :].to(tl.int64) * more_column_stride,
                mask=there[:, None] & column_there[None, :],
                other=0.0,
            )
            total = _dot(a, b, total, WIDE)
    target = tl.load(slots + row) if SCATTER else row
    result = (total * scale).to(out.dtype.element_ty)
    tl.store(out + target[:, None] * out_stride + column[None, :], result, mask=valid[:, None] & column_there[None, :])


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile: no more than what an expert has on average, which the host knows, within what is fast."""
    return min(128, power_of_two(blocks(rows, experts), 16))


def _run_product(
    rows: Tensor,
    ends: Tensor,
    slots: Tensor,
    matrices: Tensor,
    more_rows: Tensor | None,
    more_matrices: Tensor | None,
    first: int,
    chosen: int,
    scale: float,
    gather: bool,
    scatter: bool,
    *,
    out: Tensor,
) -> None:
    experts, inner, columns = matrices.shape
    n = len(slots)
    if n == 0:
        return
    size = rows.element_size()
    m = tile_rows(n, len(ends))
    wide = INTERPRETED or rows.dtype == torch.float32
    n_columns = min(128, power_of_two(columns, 16))
    k = min(64 if size == 2 else 32, power_of_two(inner, 16))
    large = capability(out.device)[0] in (9, 10) and size == 2  # shared memory for a fourth stage
    more = more_rows is not None and more_matrices is not None
    # What is not there is not read: something of a type that is.
    other_rows, others = (
        (more_rows, more_matrices) if more_rows is not None and more_matrices is not None else (rows, matrices)
    )
    more_inner = others.shape[1] if more else 0
    launch(
        _grouped_product,
        (blocks(columns, n_columns), blocks(n, m) + experts),
        rows, ends, slots, matrices, other_rows, others, out,
        first, experts, inner, columns, more_inner, chosen, scale,
        rows.stride(0), *matrices.stride(), other_rows.stride(0), *others.stride(), out.stride(0),
        E=power_of_two(experts), M=m, N=n_columns, K=k, R=min(64, power_of_two(more_inner, 16)),
        GATHER=gather, SCATTER=scatter, MORE=more, EVEN=inner % k == 0 and columns % n_columns == 0, WIDE=wide,
        warps=8 if m * n_columns >= 128 * 128 else 4, stages=4 if large else 3,
    )  # fmt: skip


def _rows_of(ends: Tensor) -> list[slice]:
    return [slice(start, stop) for start, stop in zip([0, *ends.tolist()], ends.tolist(), strict=False)]


def _reference_product(
    rows: Tensor,
    ends: Tensor,
    slots: Tensor,
    matrices: Tensor,
    more_rows: Tensor | None,
    more_matrices: Tensor | None,
    first: int,
    chosen: int,
    scale: float,
    gather: bool,
    scatter: bool,
    *,
    out: Tensor,
) -> None:
    parts = _rows_of(ends)
    for expert, matrix in enumerate(matrices, first):
        part = parts[expert]
        given = rows[slots[part] // chosen] if gather else rows[part]
        total = given.float() @ matrix.float()
        if more_rows is not None and more_matrices is not None:
            total += more_rows[part].float() @ more_matrices[expert].float()
        out[slots[part] if scatter else torch.arange(part.start, part.stop, device=out.device)] = (total * scale).to(
            out.dtype
        )


class Trial:
    """Rows of several experts, some without any, of `tokens` tokens that chose K experts each, sorted by expert."""

    def __init__(self, device: torch.device, tokens: int, chosen: int, experts: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        choice = torch.rand(tokens, experts, generator=self.generator).square()
        choice[:, experts // 2] = -1.0 if chosen < experts else 1.0  # nobody's choice
        flat = choice.topk(chosen).indices.flatten()
        self.slots = torch.argsort(flat, stable=True).to(device)
        self.ends = torch.bincount(flat, minlength=experts).cumsum(0).to(torch.int32).to(device)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)


def _product_trials(device: torch.device) -> Iterator[Arguments]:
    half = torch.bfloat16
    for tokens, chosen, experts, hidden, width, rank, dtype in (
        (70, 2, 5, 128, 256, 32, half),
        (300, 2, 4, 192, 128, 8, half),
        (5, 1, 1, 40, 24, 1, torch.float32),
        (33, 3, 6, 72, 136, 64, half),
    ):
        made = Trial(device, tokens, chosen, experts)
        n = tokens * chosen
        x, a = made.numbers(tokens, hidden, dtype=dtype), made.numbers(experts, rank, hidden, dtype=dtype)
        out = torch.zeros(n, rank, dtype=dtype, device=device)
        plain = (made.ends, made.slots)
        yield (x, *plain, a.transpose(1, 2), None, None, 0, chosen, 0.5, True, False), {"out": out}
        first = experts // 2
        w = made.numbers(experts - first, width, hidden, dtype=dtype)
        inner, b = made.numbers(n, rank, dtype=dtype), made.numbers(experts, width, rank, dtype=dtype)
        out = torch.zeros(n, width, dtype=dtype, device=device)
        pairs = (w.transpose(1, 2), inner, b.transpose(1, 2))
        yield (x, *plain, *pairs, first, chosen, 1.0, True, False), {"out": out}
        dy, out = made.numbers(n, width, dtype=dtype), torch.zeros(n, hidden, dtype=dtype, device=device)
        yield (dy, *plain, w, inner, a, first, chosen, 1.0, False, True), {"out": out}


# rows [n or N, a], with slots // chosen as their indices where they are gathered; matrices [c, a, b] with any strides;
# more_rows [n, R] and more_matrices [E, R, b], or neither; out [n, b], written at `slots` where they are scattered. The
# last dimension of rows, more_rows and out is contiguous. out = scale · (rows @ matrices + more_rows @ more_matrices)
# for the rows of the chunk's experts; the others are left alone.
grouped_product = kernel(
    "grouped_product",
    "(Tensor rows, Tensor ends, Tensor slots, Tensor matrices, Tensor? more_rows, Tensor? more_matrices, int first,"
    " int chosen, float scale, bool gather, bool scatter, *, Tensor(a!) out) -> ()",
    run=_run_product,
    reference=_reference_product,
    trials=_product_trials,
    tolerance=1e-5,
    tolerance_16_bit=8e-3,  # a rounding to bfloat16
)


@jit
def _grouped_gradient(
    left, right, ends, slots, out,
    left_width, right_width, chosen, scale,
    left_stride, right_stride, out_expert_stride, out_left_stride, out_right_stride,
    M: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program (j, i, e): A × B values of expert e's matrix, summed over its rows, M at a time."""
    expert = tl.program_id(2)
    stop = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    a, b = tl.program_id(1) * A + tl.arange(0, A), tl.program_id(0) * B + tl.arange(0, B)
    a_there, b_there = a < left_width, b < right_width
    total = tl.zeros((A, B), dtype=tl.float32)
    for begin in range(start, stop, M):
        row = begin + tl.arange(0, M)
        valid = row < stop
        row = tl.where(valid, row, start).to(tl.int64)
        token = tl.load(slots + row) // chosen if GATHER_LEFT or GATHER_RIGHT else row
        l_row, r_row = token if GATHER_LEFT else row, token if GATHER_RIGHT else row
        # Transposed as it is loaded; rows that are none of this expert's are zero here.
        lefts = tl.load(
            left + l_row[None, :] * left_stride + a[:, None], mask=a_there[:, None] & valid[None, :], other=0.0
        )
        rights = tl.load(right + r_row[:, None] * right_stride + b[None, :], mask=b_there[None, :], other=0.0)
        total = _dot(lefts, rights, total, WIDE)
    at = out + expert.to(tl.int64) * out_expert_stride
    at += a[:, None].to(tl.int64) * out_left_stride + b[None, :].to(tl.int64) * out_right_stride
    tl.store(at, (total * scale).to(out.dtype.element_ty), mask=a_there[:, None] & b_there[None, :])


def _run_gradient(
    left: Tensor,
    right: Tensor,
    ends: Tensor,
    slots: Tensor,
    chosen: int,
    scale: float,
    gather_left: bool,
    gather_right: bool,
    *,
    out: Tensor,
) -> None:
    experts, left_width, right_width = out.shape
    wide = INTERPRETED or left.dtype == torch.float32
    a, b = (min(128, power_of_two(width, 16)) for width in (left_width, right_width))
    launch(
        _grouped_gradient,
        (blocks(right_width, b), blocks(left_width, a), experts),
        left, right, ends, slots, out, left_width, right_width, chosen, scale,
        left.stride(0), right.stride(0), *out.stride(),
        M=min(64 if left.element_size() == 2 else 32, tile_rows(len(slots), experts)), A=a, B=b,
        GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right, WIDE=wide, warps=8 if a * b >= 128 * 128 else 4,
    )  # fmt: skip


def _reference_gradient(
    left: Tensor,
    right: Tensor,
    ends: Tensor,
    slots: Tensor,
    chosen: int,
    scale: float,
    gather_left: bool,
    gather_right: bool,
    *,
    out: Tensor,
) -> None:
    for expert, part in enumerate(_rows_of(ends)):
        token = slots[part] // chosen
        lefts, rights = left[token] if gather_left else left[part], right[token] if gather_right else right[part]
        out[expert] = (scale * (lefts.float().t() @ rights.float())).to(out.dtype)


def _gradient_trials(device: torch.device) -> Iterator[Arguments]:
    for tokens, chosen, experts, width, rank, dtype, out_dtype in (
        (70, 2, 5, 256, 32, torch.bfloat16, torch.bfloat16),
        (300, 2, 4, 136, 8, torch.bfloat16, torch.float32),
        (5, 1, 1, 40, 1, torch.float32, torch.float32),
    ):
        made = Trial(device, tokens, chosen, experts)
        n = tokens * chosen
        x, dy = made.numbers(tokens, width, dtype=dtype), made.numbers(n, width, dtype=dtype)
        inner = made.numbers(n, rank, dtype=dtype)
        out = torch.empty(experts, rank, width, dtype=out_dtype, device=device)
        yield (inner, x, made.ends, made.slots, chosen, 0.5, False, True), {"out": out}
        out = torch.empty(experts, width, rank, dtype=out_dtype, device=device)
        yield (dy, inner, made.ends, made.slots, chosen, 1.0, False, False), {"out": out}
        out = torch.empty(experts, width, rank, dtype=out_dtype, device=device)
        yield (x, inner, made.ends, made.slots, chosen, 1.0, True, False), {"out": out}


# left [n or N, a] and right [n or N, b], gathered by slots // chosen or not, their last dimension contiguous; out
# [E, a, b] with any strides. out[e] = scale · leftᵀ @ right over the rows of expert e: zero where it has none.
grouped_gradient = kernel(
    "grouped_gradient",
    "(Tensor left, Tensor right, Tensor ends, Tensor slots, int chosen, float scale, bool gather_left,"
    " bool gather_right, *, Tensor(a!) out) -> ()",
    run=_run_gradient,
    reference=_reference_gradient,
    trials=_gradient_trials,
    tolerance=1e-5,
    tolerance_16_bit=8e-3,
)
