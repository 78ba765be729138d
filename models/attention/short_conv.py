"""The short causal convolution before the gated delta rule: one filter per channel, then SiLU.

Shapes: N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.attention.cache import Continued
from models.blocks.documents import Documents
from models.kernels.rows import rows_of
from models.kernels.short_conv import short_conv_backward, short_conv_forward, usable
from quant.common.devices import on_cpu

# Scratch in float32 is a few times this many rows of C channels.
TOKENS_ON_CPU, TOKENS_ELSEWHERE = 128, 4096


def short_convolution(x: Tensor, weight: Tensor, documents: Documents) -> Tensor:
    """silu(Σ_s weight[:, width - 1 - s] · x[t - s]) over the tokens of the same document, zeros before its start.

    x [N, C], weight [C, width]. Computed in float32, or in float64 when x is; returns [N, C] in the dtype of x.
    Gradients for x and weight. Only these two are kept for the backward pass.
    """
    return split_convolution(x, weight, documents, [x.shape[1]])[0]


def split_convolution(x: Tensor, weight: Tensor, documents: Documents, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`short_convolution` split into up to three parts of so many channels, whose gradients come apart too."""
    result: tuple[Tensor, ...] = _ShortConvolution.apply(x, weight, documents.positions, sizes)
    return result


def continued_convolution(x: Tensor, weight: Tensor, documents: Continued, owner: nn.Module) -> Tensor:
    """`short_convolution` after the last width - 1 tokens of every row, which the cache keeps for `owner`.

    Without gradients.
    """
    width = weight.shape[1]
    tails = documents.cache.state(owner, "tail", (width - 1, x.shape[1]), x)
    source = torch.cat((tails.flatten(0, 1), x))
    first = tails.shape[0] * (width - 1)  # row of `source` where x begins
    starts = documents.offsets[:-1].repeat_interleave(documents.offsets.diff(), output_size=len(x))

    def earlier(token: Tensor, distance: int) -> Tensor:
        """Where in `source` the token so far before `token` of x is: in x, or in its row's tail."""
        back = token - distance
        tail = documents.rows[token] * (width - 1) + back - starts[token] + width - 1
        return torch.where(back >= starts[token], first + back, tail)

    dtype, token = torch.promote_types(x.dtype, torch.float32), torch.arange(len(x), device=x.device)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for distance in range(width):
        y.addcmul_(source[earlier(token, distance)].to(dtype), weight[:, width - 1 - distance].to(dtype))
    last = documents.offsets[1:].long() - 1
    for distance in range(width - 1):
        tails[documents.rows[last], width - 2 - distance] = source[earlier(last, distance)]
    return torch.nn.functional.silu(y, inplace=True).to(x.dtype)


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, positions: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight, positions)
        out = x.new_empty(x.shape)
        if usable(x, weight):
            short_conv_forward(rows_of(x), weight.contiguous(), positions, out=out)
        else:
            taps = _Taps(weight, positions, x.dtype)
            for start, stop in _blocks(x):
                out[start:stop] = torch.nn.functional.silu(taps.convolve(x, start, stop), inplace=True)
        return out.split(list(sizes), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, positions = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        dx = x.new_empty(x.shape) if needs_x else None
        if dx is not None and usable(x, weight):
            short_conv_backward([rows_of(grad) for grad in grads], rows_of(x), weight.contiguous(), positions, dx=dx)
            needs_x = False
        if not needs_x and not needs_weight:
            return dx, None, None, None
        grad = torch.cat(grads, 1) if len(grads) > 1 else grads[0]
        taps = _Taps(weight, positions, x.dtype)
        width = weight.shape[1]
        dw = torch.zeros_like(taps.rows) if needs_weight else None
        for start, stop in _blocks(x):
            # A token's gradient comes from the next width - 1 tokens too: their part is computed again.
            end = min(stop + width - 1, len(x)) if needs_x else stop
            y = taps.convolve(x, start, end)
            dy = torch.ops.aten.silu_backward(grad[start:end].to(y.dtype), y)
            if dx is not None and needs_x:
                dx[start:stop] = taps.input_gradient(dy, start, stop)
            if dw is not None:
                taps.add_weight_gradient(x, dy[: stop - start], start, dw)
        return dx, None if dw is None else dw.flip(0).t().to(weight.dtype), None, None


def _blocks(x: Tensor) -> list[tuple[int, int]]:
    size = TOKENS_ON_CPU if on_cpu(x.device) else TOKENS_ELSEWHERE
    return [(start, min(start + size, len(x))) for start in range(0, len(x), size)]


class _Taps:
    """The filters in the dtype of the computation, and for each distance the tokens that have a token so far back.

    rows [width, C]: rows[s] multiplies the token s before. inside: for each s, [N, 1], one where that token is of the
    same document, else zero.
    """

    def __init__(self, weight: Tensor, positions: Tensor, dtype: torch.dtype) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        self.rows = weight.to(dtype).t().flip(0).contiguous()
        self.inside = [(positions >= s).to(dtype)[:, None] for s in range(weight.shape[1])]

    def convolve(self, x: Tensor, start: int, stop: int) -> Tensor:
        """What SiLU is applied to, for the tokens from start to stop."""
        y = x[start:stop] * self.rows[0]
        for s in range(1, len(self.rows)):
            first = max(start, s)
            if first < stop:
                earlier = x[first - s : stop - s] * self.inside[s][first:stop]
                y[first - start :].addcmul_(earlier, self.rows[s])
        return y

    def input_gradient(self, dy: Tensor, start: int, stop: int) -> Tensor:
        """dy: gradients of the convolution for the tokens from start on; those after stop count for the ones before."""
        dx = dy[: stop - start] * self.rows[0]
        for s in range(1, len(self.rows)):
            later = dy[s : stop - start + s]
            if len(later):
                inside = self.inside[s][start + s : start + s + len(later)]
                dx[: len(later)].addcmul_(later * inside, self.rows[s])
        return dx

    def add_weight_gradient(self, x: Tensor, dy: Tensor, start: int, dw: Tensor) -> None:
        """dy: gradients of the convolution for len(dy) tokens from start on; dw [width, C] like `rows`."""
        stop = start + len(dy)
        dw[0] += (x[start:stop] * dy).sum(0)
        for s in range(1, len(self.rows)):
            first = max(start, s)
            if first < stop:
                earlier = x[first - s : stop - s] * self.inside[s][first:stop]
                dw[s] += earlier.mul_(dy[first - start :]).sum(0)
