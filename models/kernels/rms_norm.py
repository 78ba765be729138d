"""Root-mean-square normalisation in one launch each way, with the sum of the residual stream before it.

Computed in float32 and rounded once, as models/blocks/norm.py does in torch's operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.rows import rows_of, tile
from quant.kernels.choice import Arguments, kernel, uses
from quant.kernels.language import blocks, jit, launch, tl

MOST_GRADS = 4  # of a norm that several layers take


@jit
def _rms_norm(
    x, update, weight, out, inverse, total, rows, columns, x_row, update_row, out_row, eps, offset,
    ADDED: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program i: ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, B)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    values = tl.load(x + row[:, None] * x_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    if ADDED:
        values += tl.load(update + row[:, None] * update_row + column[None, :], mask=there, other=0.0).to(tl.float32)
        summed = values.to(total.dtype.element_ty)
        tl.store(total + at, summed, mask=there)
        values = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / columns + eps)
    tl.store(inverse + row, scale, mask=row < rows)
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + offset
    target = out + row[:, None] * out_row + column[None, :]
    tl.store(target, (values * scale[:, None] * factor[None, :]).to(out.dtype.element_ty), mask=there)


@jit
def _rms_norm_backward(
    grad, second, third, fourth, total_grad, x, weight, inverse, dx, rows, columns,
    grad_row, second_row, third_row, fourth_row, total_row, x_row, offset,
    GRADS: tl.constexpr, ADDED: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program i: ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, B)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    scale = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + offset
    unit = tl.load(x + row[:, None] * x_row + column[None, :], mask=there, other=0.0).to(tl.float32) * scale
    d_unit = tl.load(grad + row[:, None] * grad_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    if GRADS > 1:
        d_unit += tl.load(second + row[:, None] * second_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    if GRADS > 2:
        d_unit += tl.load(third + row[:, None] * third_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    if GRADS > 3:
        d_unit += tl.load(fourth + row[:, None] * fourth_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    d_unit = d_unit * factor[None, :]
    d = (d_unit - unit * (tl.sum(unit * d_unit, 1) / columns)[:, None]) * scale
    if ADDED:
        d += tl.load(total_grad + row[:, None] * total_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(dx + row[:, None] * columns + column[None, :], d.to(dx.dtype.element_ty), mask=there)


def _run(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, offset: float,
    *, out: Tensor, inverse: Tensor, total: Tensor | None = None,
) -> None:  # fmt: skip
    count, columns = x.shape
    rows, width, warps = tile(columns)
    launch(
        _rms_norm, (blocks(count, rows),),
        x, x if update is None else update, weight, out, inverse, out if total is None else total,
        count, columns, x.stride(0), 0 if update is None else update.stride(0), out.stride(0), eps, offset,
        ADDED=update is not None, ROWS=rows, B=width, warps=warps,
    )  # fmt: skip


def _reference(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, offset: float,
    *, out: Tensor, inverse: Tensor, total: Tensor | None = None,
) -> None:  # fmt: skip
    if update is not None and total is not None:
        x = total.copy_(x + update)
    wide = x.float()
    inverse.copy_(torch.rsqrt(wide.square().mean(-1) + eps))
    out.copy_(wide * inverse[:, None] * (weight.float() + offset))


def _run_backward(
    grads: Sequence[Tensor], total_grad: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, offset: float,
    *, dx: Tensor,
) -> None:  # fmt: skip
    count, columns = x.shape
    rows, width, warps = tile(columns)
    added = total_grad is not None
    given = [*grads, *[grads[0]] * (MOST_GRADS - len(grads))]  # what is not there is not read
    launch(
        _rms_norm_backward, (blocks(count, rows),),
        *given, grads[0] if total_grad is None else total_grad, x, weight, inverse, dx,
        count, columns, *(grad.stride(0) for grad in given), 0 if total_grad is None else total_grad.stride(0),
        x.stride(0), offset, GRADS=len(grads), ADDED=added, ROWS=rows, B=width, warps=warps,
    )  # fmt: skip


def _reference_backward(
    grads: Sequence[Tensor], total_grad: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, offset: float,
    *, dx: Tensor,
) -> None:  # fmt: skip
    scale = inverse[:, None]
    unit, d_unit = x.float() * scale, torch.stack([grad.float() for grad in grads]).sum(0) * (weight.float() + offset)
    d = (d_unit - unit * (unit * d_unit).mean(-1, keepdim=True)) * scale
    dx.copy_(d if total_grad is None else d + total_grad)


_TRIALS = (
    # rows, columns, columns of the tensor that x is a slice of, dtypes of x and the weight, sum, offset
    (7, 2048, 2048, torch.bfloat16, torch.bfloat16, True, 0.0),
    (33, 96, 160, torch.float32, torch.float32, False, 1.0),
    (5, 128, 128, torch.bfloat16, torch.float32, False, 0.0),
)


def _trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, wide, dtype, weight_dtype, added, offset in _TRIALS:
        x, update = (torch.randn(rows, wide, generator=generator).to(device, dtype)[:, :columns] for _ in range(2))
        weight = torch.randn(columns, generator=generator).to(device, weight_dtype)
        outputs = {"out": x.new_empty(rows, wide)[:, :columns], "inverse": x.new_empty(rows, dtype=torch.float32)}
        if added:
            outputs["total"] = x.new_empty(rows, columns)
        yield (x, update if added else None, weight, 1e-5, offset), outputs


def _trials_backward(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(1)
    for number, ((x, update, weight, _, offset), outputs) in enumerate(_trials(device)):
        grads = [torch.randn(x.shape, generator=generator).to(x) for _ in range(MOST_GRADS >> number)]
        inverse = torch.rand(len(x), generator=generator).to(device)
        yield (grads, update, x, weight, inverse, offset), {"dx": torch.empty_like(outputs["out"])}


# x, update, out [n, d] with any distance between rows, weight [d], total contiguous [n, d], inverse float32 [n]:
# total = x + update, or x where there is none; inverse of the root of its mean square; out = total · inverse ·
# (weight + offset).
rms_norm_forward = kernel(
    "rms_norm",
    "(Tensor x, Tensor? update, Tensor weight, float eps, float offset, *, Tensor(a!) out, Tensor(b!) inverse,"
    " Tensor(c!)? total=None) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=1e-5,
    tolerance_16_bit=2**-7,  # a value between two of bfloat16 may be rounded to either
)

# grads: up to MOST_GRADS of out, which are summed; total_grad: of total; x: what is called total above. dx contiguous
# [n, d].
rms_norm_backward = kernel(
    "rms_norm_backward",
    "(Tensor[] grads, Tensor? total_grad, Tensor x, Tensor weight, Tensor inverse, float offset, *, Tensor(a!) dx)"
    " -> ()",
    run=_run_backward,
    reference=_reference_backward,
    trials=_trials_backward,
    tolerance=1e-5,
    tolerance_16_bit=2**-7,
)


def usable(device: torch.device) -> bool:
    return uses(rms_norm_forward, device) and uses(rms_norm_backward, device)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, room: int = 0) -> Tensor:
    """x [..., d] over the root of its mean square, times weight + offset: [..., d + room] in the dtype of x, with
    nothing written to the last `room` columns.
    """
    out: Tensor = _RMSNorm.apply(x, None, weight, eps, offset, room, 1)[1]
    return out


def add_and_norm(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, offset: float, room: int = 0, copies: int = 1
) -> tuple[Tensor, ...]:
    """x + update (x where there is none), and its norm, as often as said. The gradients of all are summed where x's is
    computed.
    """
    out: tuple[Tensor, ...] = _RMSNorm.apply(x, update, weight, eps, offset, room, copies)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor | None, weight: Tensor, eps: float, offset: float, room: int,
        copies: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        rows, columns = rows_of(x), x.shape[-1]
        inverse = x.new_empty(len(rows), dtype=torch.float32)
        out = x.new_empty(*x.shape[:-1], columns + room)
        written = rows_of(out)[:, :columns]
        total = x
        if update is None:
            rms_norm_forward(rows, None, weight, eps, offset, out=written, inverse=inverse)
        else:
            total = x.new_empty(x.shape)
            rms_norm_forward(
                rows, rows_of(update), weight, eps, offset, out=written, inverse=inverse, total=rows_of(total)
            )
        ctx.save_for_backward(total, weight, inverse)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        # Each copy a tensor of its own. One alone is no view, so that its room may be written to.
        return total, *((out,) if copies == 1 else (out.view_as(out) for _ in range(copies)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total_grad, *each = grads
        x, weight, inverse = ctx.saved_tensors
        needs_x, needs_update, needs_weight, *_ = ctx.needs_input_grad
        dx = dw = None
        given = [rows_of(grad)[:, : x.shape[-1]] for grad in each if grad is not None]
        if not given:
            return total_grad, total_grad if needs_update else None, *(None,) * 5
        if needs_x or needs_update:
            dx = x.new_empty(x.shape)
            summed = None if total_grad is None else rows_of(total_grad)
            rms_norm_backward(given, summed, rows_of(x), weight, inverse, ctx.offset, dx=rows_of(dx))
        if needs_weight:
            unit = rows_of(x).to(torch.float32) * inverse[:, None]
            dw = (torch.stack([grad.to(torch.float32) for grad in given]).sum(0) * unit).sum(0).to(weight.dtype)
        return dx if needs_x else None, dx if needs_update else None, dw, *(None,) * 4
