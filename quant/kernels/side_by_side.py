"""Dense values of several 4-bit or int8 matrices with the same inputs, one below the other, with LoRA beside and below
them, in one launch.

With layers i of matrices Wᵢ [outᵢ, in] and LoRA Aᵢ [Rᵢ, in], Bᵢ [outᵢ, Rᵢ], the columns of each B are its own:

    W₀  B₀  0
    W₁  0   B₁
    A₀              what is beside the A is not written
    A₁

The rows [x, x Aᵀ] times the upper part transposed are x Wᵢᵀ + (x Aᵢᵀ) Bᵢᵀ of every layer, and gradients dyᵢ times its
rows are dyᵢ Wᵢ beside dyᵢ Bᵢ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quant.kernels.choice import Arguments, kernel
from quant.kernels.dequantise import (
    BLOCK,
    BLOCKS_AT_A_TIME,
    INVERSE_127,
    NESTED_BLOCK,
    decoded,
    decoded_int8,
    reference_four_bit,
    reference_int8,
)
from quant.kernels.language import blocks, jit, launch, power_of_two, tl

MOST = 4  # matrices of a launch
_ROWS_AT_A_TIME = 64  # of B, by a program
_COLUMNS_AT_A_TIME = 1024  # of A


@jit
def _base(
    program, packed, absmax, nested_absmax, nested_offset, code, scales_map, out, rows, columns, width, first_row,
    INT8: tl.constexpr, NESTED: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """The program-th G blocks of a matrix. absmax: with INT8 the scales of its rows."""
    block = program * G + tl.arange(0, G)
    each = columns // (2 * HALF)
    there = block < rows * each
    if INT8:
        at = block.to(tl.int64)[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
        values = decoded_int8(packed, absmax, at, there[:, None], block // each, there, INVERSE)
    else:
        values = decoded(
            packed, absmax, nested_absmax, nested_offset, code, scales_map, there, block.to(tl.int64),
            block // NESTED_BLOCK, 0, NESTED, HALF,
        )  # fmt: skip
    row = (first_row + block // each).to(tl.int64)
    target = row[:, None] * width + (block % each * (2 * HALF))[:, None] + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + target, values.to(out.dtype.element_ty), mask=there[:, None])


@jit
def _lora(
    program, a, b, out, rows, columns, width, ranks, rank, first_rank, first_row, first_a,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The program-th ROWS rows of B, and row of A."""
    kind: tl.constexpr = out.dtype.element_ty
    row = program * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, RANKS)[None, :]
    inside = (row < rows)[:, None] & (place < ranks)
    at = place - first_rank
    of_b = tl.load(b + row[:, None] * rank + at, mask=inside & (at >= 0) & (at < rank), other=0.0)
    target = (first_row + row).to(tl.int64)[:, None] * width + columns + place
    tl.store(out + target, of_b.to(kind), mask=inside)
    below = out + (first_a + program).to(tl.int64) * width
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = (column < columns) & (program < rank)
        tl.store(below + column, tl.load(a + program * columns + column, mask=there, other=0.0).to(kind), mask=there)


@jit
def _one(
    program, packed, absmax, nested_absmax, nested_offset, a, b, code, scales_map, out,
    rows, columns, width, ranks, rank, first_rank, first_row, first_a, decoding,
    INT8: tl.constexpr, NESTED: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The program-th of a matrix: the first `decoding` make it dense."""
    if program < decoding:
        _base(
            program, packed, absmax, nested_absmax, nested_offset, code, scales_map, out, rows, columns, width,
            first_row, INT8, NESTED, G, HALF, NESTED_BLOCK, INVERSE,
        )  # fmt: skip
    else:
        _lora(
            program - decoding, a, b, out, rows, columns, width, ranks, rank, first_rank, first_row, first_a,
            ROWS, RANKS, COLUMNS,
        )  # fmt: skip


@jit
def _side_by_side(
    packed_0, absmax_0, nested_0, offset_0, a_0, b_0, rows_0, rank_0, decoding_0, programs_0,
    packed_1, absmax_1, nested_1, offset_1, a_1, b_1, rows_1, rank_1, decoding_1, programs_1,
    packed_2, absmax_2, nested_2, offset_2, a_2, b_2, rows_2, rank_2, decoding_2, programs_2,
    packed_3, absmax_3, nested_3, offset_3, a_3, b_3, rows_3, rank_3, decoding_3,
    code, scales_map, out, columns, width, ranks, all_rows,
    INT8: tl.constexpr, NESTED: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """programs_i: how many the matrices up to and with i have."""
    program = tl.program_id(0)
    if program < programs_0:
        _one(
            program, packed_0, absmax_0, nested_0, offset_0, a_0, b_0, code, scales_map, out, rows_0, columns, width,
            ranks, rank_0, 0, 0, all_rows, decoding_0, INT8, NESTED, G, HALF, NESTED_BLOCK, INVERSE, ROWS, RANKS,
            COLUMNS,
        )  # fmt: skip
    elif program < programs_1:
        _one(
            program - programs_0, packed_1, absmax_1, nested_1, offset_1, a_1, b_1, code, scales_map, out, rows_1,
            columns, width, ranks, rank_1, rank_0, rows_0, all_rows + rank_0, decoding_1, INT8, NESTED, G, HALF,
            NESTED_BLOCK, INVERSE, ROWS, RANKS, COLUMNS,
        )  # fmt: skip
    elif program < programs_2:
        _one(
            program - programs_1, packed_2, absmax_2, nested_2, offset_2, a_2, b_2, code, scales_map, out, rows_2,
            columns, width, ranks, rank_2, rank_0 + rank_1, rows_0 + rows_1, all_rows + rank_0 + rank_1, decoding_2,
            INT8, NESTED, G, HALF, NESTED_BLOCK, INVERSE, ROWS, RANKS, COLUMNS,
        )  # fmt: skip
    else:
        _one(
            program - programs_2, packed_3, absmax_3, nested_3, offset_3, a_3, b_3, code, scales_map, out, rows_3,
            columns, width, ranks, rank_3, rank_0 + rank_1 + rank_2, rows_0 + rows_1 + rows_2,
            all_rows + rank_0 + rank_1 + rank_2, decoding_3, INT8, NESTED, G, HALF, NESTED_BLOCK, INVERSE, ROWS,
            RANKS, COLUMNS,
        )  # fmt: skip


def _run(
    packed: Sequence[Tensor], absmax: Sequence[Tensor], nested_absmax: Sequence[Tensor],
    nested_offset: Sequence[Tensor], a: Sequence[Tensor | None], b: Sequence[Tensor | None], code: Tensor | None,
    scales_map: Tensor | None, *, out: Tensor,
) -> None:  # fmt: skip
    columns = _columns(packed)
    ranks = out.shape[1] - columns
    spare = packed[0]  # stands for what is not there and not read
    arguments: list[Tensor | int] = []
    programs = 0
    for index in range(MOST):
        is_there = index < len(packed)
        at = index if is_there else 0  # what is not there has no programs; something of a type that is
        own_a, own_b = a[at], b[at]
        rows, rank = (len(packed[at]), 0 if own_a is None else len(own_a)) if is_there else (0, 0)
        nested = (nested_absmax[at], nested_offset[at]) if nested_absmax else (spare, spare)
        lora = spare if own_a is None else own_a, spare if own_b is None else own_b
        decoding = blocks(rows * columns // BLOCK, BLOCKS_AT_A_TIME)
        programs += decoding + (max(blocks(rows, _ROWS_AT_A_TIME), rank) if ranks else 0)
        arguments += [packed[at], absmax[at], *nested, *lora, rows, rank, decoding, programs]
    launch(
        _side_by_side, (programs,), *arguments[:-1], spare if code is None else code,
        spare if scales_map is None else scales_map, out, columns, out.shape[1], ranks, sum(map(len, packed)),
        INT8=_is_int8(packed), NESTED=bool(nested_absmax), G=BLOCKS_AT_A_TIME, HALF=BLOCK // 2,
        NESTED_BLOCK=NESTED_BLOCK, INVERSE=INVERSE_127, ROWS=_ROWS_AT_A_TIME, RANKS=power_of_two(ranks, 16),
        COLUMNS=_COLUMNS_AT_A_TIME, fuse=False,
    )  # fmt: skip


def _is_int8(packed: Sequence[Tensor]) -> bool:
    return packed[0].dtype == torch.int8


def _columns(packed: Sequence[Tensor]) -> int:
    """Dense ones."""
    return packed[0].shape[1] * (1 if _is_int8(packed) else 2)


def _reference(
    packed: Sequence[Tensor], absmax: Sequence[Tensor], nested_absmax: Sequence[Tensor],
    nested_offset: Sequence[Tensor], a: Sequence[Tensor | None], b: Sequence[Tensor | None], code: Tensor | None,
    scales_map: Tensor | None, *, out: Tensor,
) -> None:  # fmt: skip
    columns = _columns(packed)
    row, rank, place = 0, columns, sum(map(len, packed))
    for index, matrix in enumerate(packed):
        part = out[row : row + len(matrix)]
        dense = torch.empty(1, len(matrix), columns, dtype=out.dtype, device=out.device)
        if _is_int8(packed):
            reference_int8(matrix[None], absmax[index][None], out=dense)
        else:
            assert code is not None and scales_map is not None
            scale, offset = (nested_absmax[index][None], nested_offset[index][None]) if nested_absmax else (None, None)
            reference_four_bit(matrix[None], absmax[index][None], scale, offset, code, scales_map, out=dense)
        part[:, :columns], part[:, columns:] = dense[0], 0.0
        its_a, its_b = a[index], b[index]
        if its_a is not None and its_b is not None:
            part[:, rank : rank + len(its_a)] = its_b
            out[place : place + len(its_a), :columns] = its_a
            rank, place = rank + len(its_a), place + len(its_a)
        row += len(matrix)


def _trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)

    def bytes_of(*shape: int) -> Tensor:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for columns, rows, ranks, kind, dtype, lora_dtype in (
        (128, (40, 130, 9, 64), (8, 24, 0, 16), "double", torch.bfloat16, torch.bfloat16),
        (1088, (33, 64), (0, 7), "single", torch.bfloat16, torch.float32),
        (64, (70,), (32,), "double", torch.float32, torch.float32),
        (192, (20, 24), (0, 0), "double", torch.bfloat16, torch.bfloat16),
        (192, (40, 130, 9), (8, 0, 24), "int8", torch.bfloat16, torch.bfloat16),
        (1088, (33,), (0,), "int8", torch.float32, torch.float32),
    ):
        double, int8 = kind == "double", kind == "int8"
        packed = [bytes_of(count, columns if int8 else columns // 2) for count in rows]
        scales = [(count,) if int8 else (count, columns // BLOCK) for count in rows]
        nested = [numbers(blocks(math.prod(shape), NESTED_BLOCK)).abs() for shape in scales if double]
        out = torch.zeros(sum(rows) + sum(ranks), columns + sum(ranks), dtype=dtype, device=device)
        yield (
            [matrix.view(torch.int8) if int8 else matrix for matrix in packed],
            [bytes_of(*shape) if double else numbers(*shape).abs() for shape in scales],
            nested, [numbers(1)[0] for _ in nested],
            [numbers(rank, columns, dtype=lora_dtype) if rank else None for rank in ranks],
            [numbers(count, rank, dtype=lora_dtype) if rank else None for count, rank in zip(rows, ranks, strict=True)],
            None if int8 else numbers(16), None if int8 else numbers(256),
        ), {"out": out}  # fmt: skip


# Of up to MOST matrices: packed uint8 [outᵢ, in/2], absmax uint8 or float32 [outᵢ, in/64], nested_absmax float32 [mᵢ]
# and nested_offset float32 [] or no such, code float32 [16], scales_map float32 [256]; or packed int8 [outᵢ, in],
# absmax float32 [outᵢ] and nothing of the rest. a [Rᵢ, in] and b [outᵢ, Rᵢ] of any dtype, or None where there is no
# LoRA. out [Σ outᵢ + Σ Rᵢ, in + Σ Rᵢ]. All contiguous.
side_by_side = kernel(
    "dequantise_side_by_side",
    "(Tensor[] packed, Tensor[] absmax, Tensor[] nested_absmax, Tensor[] nested_offset, Tensor?[] a, Tensor?[] b,"
    " Tensor? code, Tensor? scales_map, *, Tensor(a!) out) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=0.0,
)
