"""What steers the gated delta rule, decay and beta, of their two narrow projections: in one launch each way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.rows import rows_of, tile
from quant.kernels.choice import Arguments, kernel, uses
from quant.kernels.language import blocks, jit, launch, tl


@jit
def _delta_gates(
    step, write, a_log, dt_bias, decay, beta, rows, heads, step_row, write_row, ROWS: tl.constexpr, B: tl.constexpr
):
    """Program i: ROWS tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, B)
    there = (row < rows)[:, None] & (head < heads)[None, :]
    at = row[:, None] * heads + head[None, :]
    z = tl.load(step + row[:, None] * step_row + head[None, :], mask=there, other=0.0).to(tl.float32)
    z += tl.load(dt_bias + head, mask=head < heads, other=0.0).to(tl.float32)[None, :]
    rate = tl.exp(tl.load(a_log + head, mask=head < heads, other=0.0).to(tl.float32))[None, :]
    # log(1 + e^z): from 20 on it is z, and where 1 + e^z has lost digits of e^z the quotient gives them back.
    grown = tl.exp(tl.minimum(z, 20.0))
    sum = 1.0 + grown
    soft = tl.where(sum == 1.0, grown, tl.log(sum) * grown / tl.where(sum == 1.0, 1.0, sum - 1.0))
    tl.store(decay + at, -rate * tl.where(z > 20.0, z, soft), mask=there)
    b = tl.load(write + row[:, None] * write_row + head[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(beta + at, 1.0 / (1.0 + tl.exp(-b)), mask=there)


@jit
def _delta_gates_backward(
    d_decay, d_beta, step, write, a_log, dt_bias, d_step, d_write, rows, heads, step_row, write_row,
    ROWS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program i: ROWS tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, B)
    there = (row < rows)[:, None] & (head < heads)[None, :]
    at = row[:, None] * heads + head[None, :]
    z = tl.load(step + row[:, None] * step_row + head[None, :], mask=there, other=0.0).to(tl.float32)
    z += tl.load(dt_bias + head, mask=head < heads, other=0.0).to(tl.float32)[None, :]
    rate = tl.exp(tl.load(a_log + head, mask=head < heads, other=0.0).to(tl.float32))[None, :]
    d = tl.load(d_decay + at, mask=there, other=0.0) * -rate / (1.0 + tl.exp(-z))
    tl.store(d_step + at, d.to(d_step.dtype.element_ty), mask=there)
    b = tl.load(write + row[:, None] * write_row + head[None, :], mask=there, other=0.0).to(tl.float32)
    beta = 1.0 / (1.0 + tl.exp(-b))
    d = tl.load(d_beta + at, mask=there, other=0.0) * beta * (1.0 - beta)
    tl.store(d_write + at, d.to(d_write.dtype.element_ty), mask=there)


def _run(step: Tensor, write: Tensor, a_log: Tensor, dt_bias: Tensor, *, decay: Tensor, beta: Tensor) -> None:
    rows, width, warps = tile(step.shape[1])
    launch(
        _delta_gates, (blocks(len(step), rows),),
        step, write, a_log, dt_bias, decay, beta, *step.shape, step.stride(0), write.stride(0),
        ROWS=rows, B=width, warps=warps,
    )  # fmt: skip


def _run_backward(
    d_decay: Tensor, d_beta: Tensor, step: Tensor, write: Tensor, a_log: Tensor, dt_bias: Tensor,
    *, d_step: Tensor, d_write: Tensor,
) -> None:  # fmt: skip
    rows, width, warps = tile(step.shape[1])
    launch(
        _delta_gates_backward, (blocks(len(step), rows),),
        d_decay, d_beta, step, write, a_log, dt_bias, d_step, d_write, *step.shape, step.stride(0), write.stride(0),
        ROWS=rows, B=width, warps=warps,
    )  # fmt: skip


def _reference(step: Tensor, write: Tensor, a_log: Tensor, dt_bias: Tensor, *, decay: Tensor, beta: Tensor) -> None:
    for out, right in zip((decay, beta), in_torch(step, write, a_log, dt_bias), strict=True):
        out.copy_(right)


def _reference_backward(
    d_decay: Tensor, d_beta: Tensor, step: Tensor, write: Tensor, a_log: Tensor, dt_bias: Tensor,
    *, d_step: Tensor, d_write: Tensor,
) -> None:  # fmt: skip
    d_step.copy_(_before_softplus(d_decay, step, a_log, dt_bias))
    d_write.copy_(torch.ops.aten.sigmoid_backward(d_beta, write.float().sigmoid()))


def _before_softplus(d_decay: Tensor, step: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """The gradient of step + dt_bias, float32."""
    return -a_log.exp() * d_decay * (step.to(torch.float32) + dt_bias).sigmoid()


def _random(device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for rows, heads, dtype in ((70, 32, torch.bfloat16), (33, 5, torch.float32), (1, 48, torch.bfloat16)):
        both = 12 * torch.randn(rows, 2 * heads, generator=generator).to(device, dtype)
        a_log, dt_bias = torch.randn(2, heads, generator=generator).to(device)
        yield both[:, heads:], both[:, :heads], a_log, dt_bias


def _outputs(step: Tensor, names: tuple[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: step.new_empty(step.shape, dtype=dtype) for name in names}


def _trials(device: torch.device) -> Iterator[Arguments]:
    for inputs in _random(device):
        yield inputs, _outputs(inputs[0], ("decay", "beta"), torch.float32)


def _trials_backward(device: torch.device) -> Iterator[Arguments]:
    for inputs in _random(device):
        grads = (torch.sin(inputs[number].float() * 9).contiguous() for number in (0, 1))
        yield (*grads, *inputs), _outputs(inputs[0], ("d_step", "d_write"), inputs[0].dtype)


# step, write [n, h] with any distance between rows, a_log and dt_bias [h]; contiguous float32 [n, h]: decay
# -e^a_log · softplus(step + dt_bias) and beta sigmoid(write).
delta_gates_forward = kernel(
    "delta_gates",
    "(Tensor step, Tensor write, Tensor a_log, Tensor dt_bias, *, Tensor(a!) decay, Tensor(b!) beta) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=1e-5,
)

# d_decay and d_beta contiguous float32 [n, h]; d_step and d_write contiguous, of the dtypes of step and write.
delta_gates_backward = kernel(
    "delta_gates_backward",
    "(Tensor d_decay, Tensor d_beta, Tensor step, Tensor write, Tensor a_log, Tensor dt_bias, *, Tensor(a!) d_step,"
    " Tensor(b!) d_write) -> ()",
    run=_run_backward,
    reference=_reference_backward,
    trials=_trials_backward,
    tolerance=1e-5,
    tolerance_16_bit=2**-7,  # a value between two of bfloat16 may be rounded to either
)


def delta_gates(step: Tensor, write: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The rule's decay -e^a_log · softplus(step + dt_bias) and beta sigmoid(write): float32 [N, h] of [N, h]."""
    if uses(delta_gates_forward, step.device) and uses(delta_gates_backward, step.device):
        decay, beta = _DeltaGates.apply(step, write, a_log, dt_bias)
        return decay, beta
    return in_torch(step, write, a_log, dt_bias)


def in_torch(step: Tensor, write: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """`delta_gates` in torch's operations."""
    beta = write.to(torch.float32).sigmoid()
    return -a_log.exp() * F.softplus(step.to(torch.float32) + dt_bias), beta


class _DeltaGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Tensor, write: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
        decay, beta = _outputs(step, ("decay", "beta"), torch.float32).values()
        delta_gates_forward(rows_of(step), rows_of(write), a_log, dt_bias, decay=decay, beta=beta)
        ctx.save_for_backward(step, write, a_log, dt_bias)
        return decay, beta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        step, write, a_log, dt_bias = saved = ctx.saved_tensors
        d_decay, d_beta = (grad.contiguous() for grad in grads)
        d_step, d_write = step.new_empty(step.shape), write.new_empty(write.shape)
        delta_gates_backward(
            d_decay, d_beta, rows_of(step), rows_of(write), a_log, dt_bias, d_step=d_step, d_write=d_write
        )  # fmt: skip
        _, _, needs_rate, needs_bias = ctx.needs_input_grad
        d_rate = (d_decay * in_torch(*saved)[0]).sum(0).to(a_log.dtype) if needs_rate else None
        d_bias = _before_softplus(d_decay, step, a_log, dt_bias).sum(0).to(dt_bias.dtype) if needs_bias else None
        return d_step, d_write, d_rate, d_bias
