"""One half times an activation of the other, in one launch each way: SwiGLU, and attention's output gates.

The activation is rounded to the dtype of x before the product, as torch's two operations do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.rows import VALUES_AT_A_TIME, rows_of, tile
from quant.kernels.choice import Arguments, kernel, uses
from quant.kernels.language import blocks, jit, launch, tl

_COLUMNS_AT_A_TIME = 1024


@jit
def _gated(
    gate, x, out, rows, columns, gate_row, x_row,
    SILU: tl.constexpr, BY_ROW: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program (i, j): ROWS rows, B columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * B + tl.arange(0, B)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    if BY_ROW:
        g = tl.load(gate + row * gate_row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    else:
        g = tl.load(gate + row[:, None] * gate_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    value = tl.load(x + row[:, None] * x_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    active = 1.0 / (1.0 + tl.exp(-g))
    if SILU:
        active = g * active
    active = active.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row[:, None] * columns + column[None, :], (active * value).to(out.dtype.element_ty), mask=there)


@jit
def _gated_backward(
    grad, gate, x, d_gate, d_x, rows, columns, grad_row, gate_row, x_row,
    SILU: tl.constexpr, BY_ROW: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program (i, j): ROWS rows, B columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * B + tl.arange(0, B)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    d = tl.load(grad + row[:, None] * grad_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    if BY_ROW:
        g = tl.load(gate + row * gate_row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    else:
        g = tl.load(gate + row[:, None] * gate_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    value = tl.load(x + row[:, None] * x_row + column[None, :], mask=there, other=0.0).to(tl.float32)
    chance = 1.0 / (1.0 + tl.exp(-g))
    if SILU:
        active, slope = g * chance, chance * (1.0 + g * (1.0 - chance))
    else:
        active, slope = chance, chance * (1.0 - chance)
    at = row[:, None] * columns + column[None, :]
    slope = d * value * slope
    if BY_ROW:
        tl.store(d_gate + row, tl.sum(slope, 1).to(d_gate.dtype.element_ty), mask=row < rows)
    else:
        tl.store(d_gate + at, slope.to(d_gate.dtype.element_ty), mask=there)
    tl.store(d_x + at, (d * active).to(d_x.dtype.element_ty), mask=there)


def _grid(gate: Tensor, x: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    count, columns = x.shape
    by_row = gate.shape[1] != columns
    rows, width, warps = tile(columns)
    if not by_row:
        width = min(width, _COLUMNS_AT_A_TIME)
        rows, warps = VALUES_AT_A_TIME // width, 4
    return (blocks(count, rows), blocks(columns, width)), {
        "BY_ROW": by_row, "ROWS": rows, "B": width, "warps": warps
    }  # fmt: skip


def _run(gate: Tensor, x: Tensor, silu: bool, *, out: Tensor) -> None:
    grid, options = _grid(gate, x)
    launch(_gated, grid, gate, x, out, *x.shape, gate.stride(0), x.stride(0), SILU=silu, **options)


def _reference(gate: Tensor, x: Tensor, silu: bool, *, out: Tensor) -> None:
    out.copy_((F.silu(gate) if silu else gate.sigmoid()) * x)


def _run_backward(grad: Tensor, gate: Tensor, x: Tensor, silu: bool, *, d_gate: Tensor, d_x: Tensor) -> None:
    grid, options = _grid(gate, x)
    strides = (grad.stride(0), gate.stride(0), x.stride(0))
    launch(_gated_backward, grid, grad, gate, x, d_gate, d_x, *x.shape, *strides, SILU=silu, **options)


def _reference_backward(grad: Tensor, gate: Tensor, x: Tensor, silu: bool, *, d_gate: Tensor, d_x: Tensor) -> None:
    d, g = grad.float(), gate.float()
    backward = torch.ops.aten.silu_backward if silu else lambda d, g: torch.ops.aten.sigmoid_backward(d, g.sigmoid())
    d_active = d * x.float()
    d_gate.copy_(backward(d_active if g.shape == x.shape else d_active.sum(-1, keepdim=True), g))
    d_x.copy_(d * (F.silu(g) if silu else g.sigmoid()))


def _random(device: torch.device) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Gates and what they are beside, and whether SwiGLU's."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, dtype in ((7, 1536, torch.bfloat16), (33, 40, torch.float32), (1, 256, torch.bfloat16)):
        for silu, width in ((True, columns), (False, columns), (False, 1)):
            both = torch.randn(rows, 2 * columns, generator=generator).to(device, dtype)
            yield both[:, :width], both[:, columns:], silu


def _trials(device: torch.device) -> Iterator[Arguments]:
    for gate, x, silu in _random(device):
        yield (gate, x, silu), {"out": x.new_empty(x.shape)}


def _trials_backward(device: torch.device) -> Iterator[Arguments]:
    for gate, x, silu in _random(device):
        yield (x.flip(-1), gate, x, silu), {"d_gate": x.new_empty(gate.shape), "d_x": x.new_empty(x.shape)}


# gate [n, d] or [n, 1], x [n, d] with any distance between rows; silu: else sigmoid; out contiguous [n, d]:
# activation(gate) · x.
gated_forward = kernel(
    "gated",
    "(Tensor gate, Tensor x, bool silu, *, Tensor(a!) out) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=1e-5,
    tolerance_16_bit=2**-6,  # a value between two of bfloat16 may be rounded to either, twice
)

# grad: of out. d_gate and d_x contiguous, of the shapes of gate and x.
gated_backward = kernel(
    "gated_backward",
    "(Tensor grad, Tensor gate, Tensor x, bool silu, *, Tensor(a!) d_gate, Tensor(b!) d_x) -> ()",
    run=_run_backward,
    reference=_reference_backward,
    trials=_trials_backward,
    tolerance=1e-5,
    tolerance_16_bit=2**-7,
)


def usable(device: torch.device) -> bool:
    return uses(gated_forward, device) and uses(gated_backward, device)


def gated(gate: Tensor, x: Tensor, *, silu: bool) -> Tensor:
    """silu(gate) · x, or sigmoid(gate) · x, of x [..., d] and gates alike or [..., 1]: contiguous. Keeps both."""
    out: Tensor = _Gated.apply(gate, x, silu)
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor, silu: bool) -> Tensor:
        out = x.new_empty(x.shape)
        gated_forward(rows_of(gate), rows_of(x), silu, out=rows_of(out))
        ctx.save_for_backward(gate, x)
        ctx.silu = silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, x = ctx.saved_tensors
        d_gate, d_x = x.new_empty(gate.shape), x.new_empty(x.shape)
        gated_backward(rows_of(grads[0]), rows_of(gate), rows_of(x), ctx.silu, d_gate=rows_of(d_gate), d_x=rows_of(d_x))
        return d_gate, d_x, None
