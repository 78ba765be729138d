"""Dense values of 4-bit and int8 storages in one kernel each: what quant/fourbit.py and quant/int8.py keep.

The arithmetic is float32, rounded after each of its operations, and then once to the dtype of the result: the same bits
as bitsandbytes' own kernels, which take three launches and a float32 copy of the scales with double quantisation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.kernels.choice import Arguments, kernel
from quant.kernels.language import blocks, jit, launch, power_of_two, tl

BLOCK = 64  # values that share a scale
NESTED_BLOCK = 256  # scales that share a nested scale
BLOCKS_AT_A_TIME = 64  # of a program: 16 packed bytes for each of its threads
INVERSE_127 = 7.874015718698502e-3  # 1/127 as bitsandbytes writes it; dividing by 127 would round differently


@jit
def decoded(
    packed, absmax, nested_absmax, nested_offset, code, scales_map, there, block, nested, matrix,
    NESTED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The values float32 [G, 2 · HALF] of G blocks, with nested scales at `nested`."""
    if NESTED:
        index = tl.load(absmax + block, mask=there, other=0).to(tl.int32)
        scale = tl.load(scales_map + index) * tl.load(nested_absmax + nested, mask=there, other=0.0)
        scale += tl.load(nested_offset + matrix)
    else:
        scale = tl.load(absmax + block, mask=there, other=0.0)
    pairs = tl.load(packed + block[:, None] * HALF + tl.arange(0, HALF)[None, :], mask=there[:, None], other=0)
    pairs = pairs.to(tl.int32)
    return tl.interleave(tl.load(code + (pairs >> 4)) * scale[:, None], tl.load(code + (pairs & 15)) * scale[:, None])


@jit
def _four_bit(
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    code,
    scales_map,
    out,
    blocks_each,  # blocks of BLOCK values of a matrix
    nested_each,
    NESTED: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
):
    """Program (i, e): G blocks of matrix e."""
    matrix = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * G + tl.arange(0, G)
    there = block < blocks_each
    scale_at = matrix * blocks_each + block
    values = decoded(
        packed, absmax, nested_absmax, nested_offset, code, scales_map, there, scale_at,
        matrix * nested_each + block // NESTED_BLOCK, matrix, NESTED, HALF,
    ).to(out.dtype.element_ty)  # fmt: skip
    column = tl.arange(0, 2 * HALF)
    tl.store(out + scale_at[:, None] * (2 * HALF) + column[None, :], values, mask=there[:, None])


def _run_four_bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    code: Tensor,
    scales_map: Tensor,
    *,
    out: Tensor,
) -> None:
    matrices = out.shape[0]
    each = out[0].numel() // BLOCK
    nested = nested_absmax is not None
    launch(
        _four_bit,
        (blocks(each, BLOCKS_AT_A_TIME), matrices),
        packed, absmax, nested_absmax if nested else code, nested_offset if nested else code, code, scales_map, out,
        each, nested_absmax.shape[-1] if nested_absmax is not None else 0,
        NESTED=nested, G=BLOCKS_AT_A_TIME, HALF=BLOCK // 2, NESTED_BLOCK=NESTED_BLOCK, fuse=False,
    )  # fmt: skip


def reference_four_bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    code: Tensor,
    scales_map: Tensor,
    *,
    out: Tensor,
) -> None:
    flat = absmax.flatten(1)
    if nested_absmax is not None and nested_offset is not None:
        scales = scales_map[flat.long()]
        scales = scales * nested_absmax.repeat_interleave(NESTED_BLOCK, 1)[:, : flat.shape[1]] + nested_offset[:, None]
    else:
        scales = flat
    codes = packed.flatten(1).long()
    values = torch.stack((code[codes >> 4], code[codes & 15]), dim=-1).flatten(1)
    out.copy_((values.unflatten(1, (-1, BLOCK)) * scales[..., None]).view(out.shape))


def _four_bit_trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)

    def bytes_of(*shape: int) -> Tensor:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8).to(device)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for (matrices, rows, columns), double, dtype in (
        ((3, 40, 128), True, torch.bfloat16),
        ((1, 4, 64), True, torch.float32),
        ((2, 33, 192), False, torch.bfloat16),
        ((5, 65, 320), True, torch.float16),
    ):
        scales = (matrices, rows, columns // BLOCK)
        nested = numbers(matrices, blocks(rows * columns // BLOCK, NESTED_BLOCK)).abs() if double else None
        offset = numbers(matrices) if double else None
        absmax = bytes_of(*scales) if double else numbers(*scales).abs()
        out = torch.empty(matrices, rows, columns, dtype=dtype, device=device)
        yield (bytes_of(matrices, rows, columns // 2), absmax, nested, offset, numbers(16), numbers(256)), {"out": out}


# packed uint8 [c, out, in/2], absmax uint8 or float32 [c, out, in/64], nested_absmax float32 [c, m] and nested_offset
# float32 [c] or neither, code float32 [16], scales_map float32 [256]; out [c, out, in]. All contiguous.
dequantise_four_bit = kernel(
    "dequantise_four_bit",
    "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor code, Tensor scales_map, *,"
    " Tensor(a!) out) -> ()",
    run=_run_four_bit,
    reference=reference_four_bit,
    trials=_four_bit_trials,
    tolerance=0.0,
)


@jit
def decoded_int8(packed, scale, at, there, row, row_there, INVERSE: tl.constexpr):
    """The values float32 [R, B] at `at` of R rows."""
    values = tl.load(packed + at, mask=there, other=0).to(tl.float32)
    return values * tl.load(scale + row, mask=row_there, other=0.0)[:, None] * INVERSE


@jit
def _int8(packed, scale, out, rows, columns, R: tl.constexpr, B: tl.constexpr, INVERSE: tl.constexpr):
    """Program (i, j): B columns of R rows."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * B + tl.arange(0, B)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    values = decoded_int8(packed, scale, at, there, row, row < rows, INVERSE)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=there)


def _run_int8(packed: Tensor, scale: Tensor, *, out: Tensor) -> None:
    columns, rows = out.shape[-1], scale.numel()
    size = min(1024, power_of_two(columns, 16))
    at_once = 4096 // size
    grid = (blocks(rows, at_once), blocks(columns, size))
    launch(_int8, grid, packed, scale, out, rows, columns, R=at_once, B=size, INVERSE=INVERSE_127)


def reference_int8(packed: Tensor, scale: Tensor, *, out: Tensor) -> None:
    out.copy_(packed.float() * scale[..., None] * INVERSE_127)


def _int8_trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in (((3, 5, 72), torch.bfloat16), ((1, 2, 2100), torch.float32)):
        packed = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(device)
        scale = torch.rand(shape[:-1], generator=generator).to(device)
        yield (packed, scale), {"out": torch.empty(shape, dtype=dtype, device=device)}


# packed int8 [c, out, in], scale float32 [c, out]; out [c, out, in]. All contiguous.
dequantise_int8 = kernel(
    "dequantise_int8",
    "(Tensor packed, Tensor scale, *, Tensor(a!) out) -> ()",
    run=_run_int8,
    reference=reference_int8,
    trials=_int8_trials,
    tolerance=0.0,
)
