"""The gated delta rule (models/attention/delta_rule.py) in Triton kernels: two launches forward, six backward.

Only its arguments are kept for the backward pass, which computes the states again and keeps one per chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.blocks.documents import Documents
from models.kernels.delta_chunks import chunk_of, delta_prepare, prepared
from models.kernels.delta_gradients import delta_lengths, delta_through_states, parts
from models.kernels.delta_inside import delta_inside, inside
from models.kernels.delta_scan import delta_scan, delta_scan_backward, empty_states, scan_inputs
from quant.kernels.choice import uses
from quant.products import without_autocast

_KERNELS = (delta_prepare, delta_scan, delta_scan_backward, delta_inside, delta_through_states, delta_lengths)
# Of a key: wider ones don't fit a program's registers.
_WIDEST = {torch.bfloat16: 128, torch.float32: 64}


def usable(device: torch.device, dtype: torch.dtype, width: int = 1) -> bool:
    """Whether all kernels are used on this device and hold heads of this dtype and width."""
    return width <= _WIDEST.get(dtype, 0) and all(uses(kernel, device) for kernel in _KERNELS)


def uses_kernels(query: Tensor, value: Tensor) -> bool:
    return usable(value.device, value.dtype, max(query.shape[2], value.shape[2]))


def delta_rule_in_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    documents: Documents,
    chunk: int | None = None,
) -> Tensor:
    """Arguments and result as of `gated_delta_rule`. chunk: tokens of a chunk, a power of two from 16 on."""
    arguments = (_rows(query), _rows(key), _rows(value), decay.contiguous(), beta.contiguous())
    result: Tensor = _InKernels.apply(chunk or chunk_of(value.dtype), *arguments, documents.positions)
    return result


def _rows(x: Tensor) -> Tensor:
    """x [N, heads, d] with the values of each token side by side, as in a view of columns."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


class _InKernels(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, chunk: int, *tensors: Tensor) -> Tensor:
        query, _, value, *_ = tensors
        made = prepared(query, value, chunk)
        delta_prepare(*tensors, **made)
        out, states = value.new_empty(value.shape), value.new_empty(0)
        scan = scan_inputs(tensors, made)
        delta_scan(*scan, len(value), corrected=made["corrected"], out=out, states=states)
        ctx.save_for_backward(*tensors)
        ctx.chunk = chunk
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, d_out = ctx.saved_tensors, grads[0].contiguous()
        query, key, value, decay, beta, positions = tensors
        made = prepared(query, value, ctx.chunk)
        delta_prepare(*tensors, **made)
        states, scan, corrected = empty_states(query, made), scan_inputs(tensors, made), made["corrected"]
        delta_scan(*scan, len(value), corrected=corrected, out=value.new_empty(0), states=states)
        d_states, d_right = torch.empty_like(states), torch.empty_like(corrected)
        delta_scan_backward(*scan, d_out, d_corrected=d_right, d_states=d_states)
        del scan, made["erasing"], made["attention"]

        within, factors = inside(value, made), made["factors"]
        delta_inside(*tensors, made["inverse"], corrected, factors, d_out, d_corrected=d_right, **within)
        matrices, part = (within["d_attention"], within["d_system"]), parts(query, made)
        delta_through_states(
            query, key, beta, factors, corrected, states, d_out, d_right, d_states, *matrices, **part
        )  # fmt: skip
        results = {"d_query": query, "d_key": key, "d_decay": decay, "d_beta": beta}
        made_of = {name: x.new_empty(x.shape) for name, x in results.items()}
        delta_lengths(
            query, key, decay, positions, factors, part["d_query"], part["d_key"],
            within["d_log"], within["d_beta"], part["d_log"], part["d_beta"], part["d_carry"], ctx.chunk, **made_of,
        )  # fmt: skip
        return (
            None,
            made_of["d_query"],
            made_of["d_key"],
            within["d_value"],
            made_of["d_decay"],
            made_of["d_beta"],
            None,
        )
