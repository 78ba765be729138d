"""Rotary positions of queries and keys in one launch each way, with the norm of each head before them.

A head's d dimensions are `rotary` that are rotated, the first or the last ones, and the rest. Pairs are as
models/attention/rope.py has them: always halves in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.rotary_heads import heads_backward, heads_forward
from models.kernels.rows import VALUES_AT_A_TIME
from quant.kernels.choice import Arguments, kernel, uses
from quant.kernels.language import blocks, jit, launch, power_of_two, tl


@jit
def _rotary(
    q, k, q_out, k_out, q_weight, k_weight, q_inverse, k_inverse, cos, sin, tokens, q_heads, k_heads,
    q_token, q_head, k_token, k_head, half, rest, eps, offset, q_blocks,
    LAST: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATED: tl.constexpr, NORMED: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program i: ROWS heads of queries, from q_blocks on of keys."""
    block = tl.program_id(0)
    if block < q_blocks:
        heads_forward(
            q, q_out, q_weight, q_inverse, cos, sin, block, tokens * q_heads, q_heads, q_token, q_head, half, rest,
            eps, offset, LAST, INTERLEAVED, ROTATED, NORMED, ROWS, HALF, REST,
        )  # fmt: skip
    else:
        heads_forward(
            k, k_out, k_weight, k_inverse, cos, sin, block - q_blocks, tokens * k_heads, k_heads, k_token, k_head,
            half, rest, eps, offset, LAST, INTERLEAVED, ROTATED, NORMED, ROWS, HALF, REST,
        )  # fmt: skip


@jit
def _rotary_backward(
    q_grad, k_grad, dq, dk, q, k, q_weight, k_weight, q_inverse, k_inverse, cos, sin, tokens, q_heads, k_heads,
    q_grad_token, q_grad_head, k_grad_token, k_grad_head, q_token, q_head, k_token, k_head, half, rest, offset,
    q_blocks,
    LAST: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATED: tl.constexpr, NORMED: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program i: ROWS heads of queries, from q_blocks on of keys."""
    block = tl.program_id(0)
    if block < q_blocks:
        heads_backward(
            q_grad, dq, q, q_weight, q_inverse, cos, sin, block, tokens * q_heads, q_heads, q_grad_token, q_grad_head,
            q_token, q_head, half, rest, offset, LAST, INTERLEAVED, ROTATED, NORMED, ROWS, HALF, REST,
        )  # fmt: skip
    else:
        heads_backward(
            k_grad, dk, k, k_weight, k_inverse, cos, sin, block - q_blocks, tokens * k_heads, k_heads, k_grad_token,
            k_grad_head, k_token, k_head, half, rest, offset, LAST, INTERLEAVED, ROTATED, NORMED, ROWS, HALF, REST,
        )  # fmt: skip


def _sizes(size: int, cos: Tensor | None) -> dict[str, Any]:
    half = 0 if cos is None else cos.shape[1]
    rest = size - 2 * half
    return {"ROWS": max(1, VALUES_AT_A_TIME // power_of_two(size)), "HALF": power_of_two(half, 16),
            "REST": power_of_two(rest, 16), "ROTATED": half > 0}  # fmt: skip


def _run(
    query: Tensor, key: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, eps: float, offset: float, last: bool, interleaved: bool,
    *, query_out: Tensor, key_out: Tensor | None = None,
    query_inverse: Tensor | None = None, key_inverse: Tensor | None = None,
) -> None:  # fmt: skip
    tokens, heads, size = query.shape
    sizes = _sizes(size, cos)
    q_blocks = blocks(tokens * heads, sizes["ROWS"])
    k = query if key is None else key
    k_blocks = 0 if key is None else blocks(key.shape[0] * key.shape[1], sizes["ROWS"])
    half = 0 if cos is None else cos.shape[1]
    launch(
        _rotary, (q_blocks + k_blocks,),
        query, k, query_out, key_out if key_out is not None else query_out, query_weight, key_weight,
        query_inverse, key_inverse, cos, sin, tokens, heads, k.shape[1],
        *query.stride()[:2], *k.stride()[:2], half, size - 2 * half, eps, offset, q_blocks,
        LAST=last, INTERLEAVED=interleaved, NORMED=query_weight is not None, **sizes,
    )  # fmt: skip


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


def _heads_reference(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, offset: float, last: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result and the inverse norm, in the dtype of x."""
    inverse = torch.rsqrt(x.float().square().mean(-1) + eps)
    out = x.float()
    if weight is not None:
        out = (out * inverse[..., None] * (weight.float() + offset)).to(x.dtype).float()
    if cos is not None and sin is not None:
        rotary = 2 * cos.shape[1]
        if last:
            out = torch.cat((out[..., :-rotary], _turned(out[..., -rotary:], cos, sin, interleaved)), dim=-1)
        else:
            out = torch.cat((_turned(out[..., :rotary], cos, sin, interleaved), out[..., rotary:]), dim=-1)
    return out, inverse.flatten()


def _reference(
    query: Tensor, key: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, eps: float, offset: float, last: bool, interleaved: bool,
    *, query_out: Tensor, key_out: Tensor | None = None,
    query_inverse: Tensor | None = None, key_inverse: Tensor | None = None,
) -> None:  # fmt: skip
    for x, weight, out, inverse in (
        (query, query_weight, query_out, query_inverse), (key, key_weight, key_out, key_inverse)
    ):  # fmt: skip
        if x is not None and out is not None:
            result, scale = _heads_reference(x, weight, cos, sin, eps, offset, last, interleaved)
            out.copy_(result)
            if inverse is not None:
                inverse.copy_(scale)


def _run_backward(
    query_grad: Tensor, key_grad: Tensor | None, query: Tensor | None, key: Tensor | None,
    query_weight: Tensor | None, key_weight: Tensor | None, query_inverse: Tensor | None, key_inverse: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, offset: float, last: bool, interleaved: bool,
    *, dq: Tensor, dk: Tensor | None = None,
) -> None:  # fmt: skip
    tokens, heads, size = dq.shape
    sizes = _sizes(size, cos)
    q_blocks = blocks(tokens * heads, sizes["ROWS"])
    k_blocks = 0 if dk is None else blocks(dk.shape[0] * dk.shape[1], sizes["ROWS"])
    k_grad = query_grad if key_grad is None else key_grad
    q, k = query_grad if query is None else query, k_grad if key is None else key
    half = 0 if cos is None else cos.shape[1]
    launch(
        _rotary_backward, (q_blocks + k_blocks,),
        query_grad, k_grad, dq, dq if dk is None else dk, q, k, query_weight, key_weight, query_inverse, key_inverse,
        cos, sin, tokens, heads, k_grad.shape[1], *query_grad.stride()[:2], *k_grad.stride()[:2], *q.stride()[:2],
        *k.stride()[:2], half, size - 2 * half, offset, q_blocks,
        LAST=last, INTERLEAVED=interleaved, NORMED=query_weight is not None, **sizes,
    )  # fmt: skip


def _reference_backward(
    query_grad: Tensor, key_grad: Tensor | None, query: Tensor | None, key: Tensor | None,
    query_weight: Tensor | None, key_weight: Tensor | None, query_inverse: Tensor | None, key_inverse: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, offset: float, last: bool, interleaved: bool,
    *, dq: Tensor, dk: Tensor | None = None,
) -> None:  # fmt: skip
    for grad, x, weight, inverse, dx in (
        (query_grad, query, query_weight, query_inverse, dq), (key_grad, key, key_weight, key_inverse, dk)
    ):  # fmt: skip
        if grad is None or dx is None:
            continue
        d = grad.float()
        if cos is not None and sin is not None:
            rotary = 2 * cos.shape[1]
            turned, rest = (d[..., -rotary:], d[..., :-rotary]) if last else (d[..., :rotary], d[..., rotary:])
            back = _turned(turned, cos, -sin, False)
            if interleaved:
                back = torch.stack(back.chunk(2, dim=-1), dim=-1).flatten(-2)
            d = torch.cat((rest, back) if last else (back, rest), dim=-1)
        if x is not None and weight is not None and inverse is not None:
            scale = inverse.view(x.shape[:2])[..., None]
            unit, d = x.float() * scale, d * (weight.float() + offset)
            d = (d - unit * (unit * d).mean(-1, keepdim=True)) * scale
        dx.copy_(d)


_TRIALS = (
    # tokens, heads of queries and keys (0: none), size, rotated dimensions, norms, last, interleaved, dtype
    (9, 6, 2, 128, 128, True, False, False, torch.bfloat16),
    (5, 4, 0, 256, 64, False, True, True, torch.bfloat16),
    (7, 3, 3, 40, 12, True, False, False, torch.float32),
    (3, 5, 1, 96, 48, False, False, True, torch.float32),
    (3, 2, 1, 64, 0, True, False, False, torch.float32),
)


def _random(
    device: torch.device, seed: int
) -> Iterator[tuple[Sequence[Any], list[Tensor], list[Tensor], list[Tensor]]]:
    """A trial's row, its tables (or none), its queries and keys, and their weights (or none)."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for row in _TRIALS:
        tokens, q_heads, k_heads, size, rotary, norms, *_, dtype = row
        angles = numbers(tokens, rotary // 2)
        tables = [angles.cos(), angles.sin()] if rotary else []
        # Heads lie beside others.
        heads = [numbers(tokens, 2 * count, size).to(dtype)[:, ::2] for count in (q_heads, k_heads) if count]
        yield row, tables, heads, [numbers(size).to(dtype) for _ in heads if norms]


def _pair(tensors: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    first, second = (*tensors, None, None)[:2]
    return first, second


def _trials(device: torch.device) -> Iterator[Arguments]:
    for row, tables, heads, weights in _random(device, 0):
        *_, last, interleaved, _ = row
        outputs = {}
        for name, x in zip(("query", "key"), heads, strict=False):
            outputs[f"{name}_out"] = x.new_empty(x.shape)
            if weights:
                outputs[f"{name}_inverse"] = x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32)
        yield (*_pair(heads), *_pair(weights), *_pair(tables), 1e-5, 0.5, last, interleaved), outputs


def _trials_backward(device: torch.device) -> Iterator[Arguments]:
    given = list(_random(device, 1))
    for (row, tables, heads, weights), (_, _, grads, _) in zip(_random(device, 0), given, strict=True):
        *_, last, interleaved, _ = row
        inverses = [x.float().square().mean(-1).rsqrt().flatten() for x in heads if weights]
        saved = heads if weights else []
        outputs = {name: x.new_empty(x.shape) for name, x in zip(("dq", "dk"), heads, strict=False)}
        arguments = (*_pair(grads), *_pair(saved), *_pair(weights), *_pair(inverses), *_pair(tables), 0.5)
        yield (*arguments, last, interleaved), outputs


# query [N, h, d], key [N, h', d] or none, of any strides but the last; weights [d] or none; cos, sin float32
# [N, rotary/2] contiguous, or none; last, interleaved: of the dimensions that are rotated. Outputs contiguous, the
# inverses of the roots float32 [N · h] where there are weights.
rotary_forward = kernel(
    "rotary",
    "(Tensor query, Tensor? key, Tensor? query_weight, Tensor? key_weight, Tensor? cos, Tensor? sin, float eps,"
    " float offset, bool last, bool interleaved, *, Tensor(a!) query_out, Tensor(b!)? key_out=None,"
    " Tensor(c!)? query_inverse=None, Tensor(d!)? key_inverse=None) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=1e-5,
    tolerance_16_bit=2**-6,  # a value between two of bfloat16 may be rounded to either, twice
)

# Gradients of the outputs; query, key and inverses where there are weights; dq, dk contiguous.
rotary_backward = kernel(
    "rotary_backward",
    "(Tensor query_grad, Tensor? key_grad, Tensor? query, Tensor? key, Tensor? query_weight, Tensor? key_weight,"
    " Tensor? query_inverse, Tensor? key_inverse, Tensor? cos, Tensor? sin, float offset, bool last,"
    " bool interleaved, *, Tensor(a!) dq, Tensor(b!)? dk=None) -> ()",
    run=_run_backward,
    reference=_reference_backward,
    trials=_trials_backward,
    tolerance=1e-5,
    tolerance_16_bit=2**-7,
)


def usable(device: torch.device) -> bool:
    return uses(rotary_forward, device) and uses(rotary_backward, device)


def rotated_query(query: Tensor, tables: tuple[Tensor, Tensor], *, last: bool, interleaved: bool) -> Tensor:
    """query [N, h, d] with its first or last dimensions, as many as the tables are for, rotated."""
    out: Tensor = _Rotary.apply(query, None, None, None, *tables, 0.0, 0.0, last, interleaved)[0]
    return out


def rotated_heads(
    query: Tensor,
    key: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    offset: float,
    tables: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """query [N, h, d] and key [N, h', d], each head normed where there are weights (frozen: they get no gradient),
    and its first dimensions rotated where there are tables."""
    cos, sin = tables or (None, None)
    out: tuple[Tensor, Tensor] = _Rotary.apply(
        query, key, *(weights or (None, None)), cos, sin, eps, offset, False, False
    )
    return out


def _by_head(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor | None, query_weight: Tensor | None, key_weight: Tensor | None,
        cos: Tensor | None, sin: Tensor | None, eps: float, offset: float, last: bool, interleaved: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        inputs = [_by_head(x) for x in (query, key) if x is not None]
        out = [x.new_empty(x.shape) for x in inputs]
        normed = query_weight is not None
        inverses = [x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32) for x in inputs if normed]
        key_out, (q_inverse, k_inverse) = _pair(out)[1], _pair(inverses)
        rotary_forward(
            *_pair(inputs), query_weight, key_weight, cos, sin, eps, offset, last, interleaved,
            query_out=out[0], key_out=key_out, query_inverse=q_inverse, key_inverse=k_inverse,
        )  # fmt: skip
        saved = _pair(inputs if normed else [])
        ctx.save_for_backward(*saved, query_weight, key_weight, q_inverse, k_inverse, cos, sin)
        ctx.options = offset, last, interleaved
        return out[0], key_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [_by_head(grad) for grad in grads if grad is not None]
        made = [grad.new_empty(grad.shape) for grad in given]
        rotary_backward(*_pair(given), *ctx.saved_tensors, *ctx.options, dq=made[0], dk=_pair(made)[1])
        return (*_pair(made), *(None,) * 8)
