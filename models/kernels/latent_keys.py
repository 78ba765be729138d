"""Keys of latent attention in one launch each way: what each head has of its own, and the rotated one that all share.

Shapes: N tokens, h heads, `nope` dimensions of a head's own key, `value` of its value, `rotary` of the shared key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.kernels.choice import Arguments, kernel, uses
from quant.kernels.language import jit, launch, power_of_two, tl

_HEADS_AT_A_TIME = 8


@jit
def _latent_keys(
    expanded, shared, cos, sin, key, heads, expanded_token, expanded_head, shared_token, nope, half,
    INTERLEAVED: tl.constexpr, G: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (i, j): G heads of token i."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * G + tl.arange(0, G)
    size = nope + 2 * half
    own, pair = tl.arange(0, NOPE), tl.arange(0, HALF)
    there = (head < heads)[:, None] & (own < nope)[None, :]
    target = key + token * heads * size + head[:, None] * size
    source = expanded + token * expanded_token + head[:, None] * expanded_head + own[None, :]
    tl.store(target + own[None, :], tl.load(source, mask=there, other=0.0), mask=there)
    first_at, second_at = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + half)
    first = tl.load(shared + token * shared_token + first_at, mask=pair < half, other=0.0).to(tl.float32)
    second = tl.load(shared + token * shared_token + second_at, mask=pair < half, other=0.0).to(tl.float32)
    c = tl.load(cos + token * half + pair, mask=pair < half, other=0.0)
    s = tl.load(sin + token * half + pair, mask=pair < half, other=0.0)
    there = (head < heads)[:, None] & (pair < half)[None, :]
    kind: tl.constexpr = key.dtype.element_ty
    turned = (first * c - second * s).to(kind)
    tl.store(target + nope + pair[None, :], tl.broadcast_to(turned[None, :], (G, HALF)), mask=there)
    turned = (second * c + first * s).to(kind)
    tl.store(target + nope + half + pair[None, :], tl.broadcast_to(turned[None, :], (G, HALF)), mask=there)


@jit
def _latent_keys_backward(
    d_key, d_value, cos, sin, d_expanded, d_shared, heads, key_token, key_head, value_token, value_head, nope, half,
    value, INTERLEAVED: tl.constexpr, G: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Program i: token i, G heads after another."""
    token = tl.program_id(0).to(tl.int64)
    own, pair, column = tl.arange(0, NOPE), tl.arange(0, HALF), tl.arange(0, VALUE)
    size = nope + value
    kind: tl.constexpr = d_expanded.dtype.element_ty
    first, second = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    for start in range(0, heads, G):
        head = start + tl.arange(0, G)
        row = (head < heads)[:, None]
        source = d_key + token * key_token + head[:, None] * key_head
        target = d_expanded + token * heads * size + head[:, None] * size
        there = row & (own < nope)[None, :]
        part = tl.load(source + own[None, :], mask=there, other=0.0)
        tl.store(target + own[None, :], part.to(kind), mask=there)
        there = row & (pair < half)[None, :]
        first += tl.sum(tl.load(source + nope + pair[None, :], mask=there, other=0.0).to(tl.float32), 0)
        second += tl.sum(tl.load(source + nope + half + pair[None, :], mask=there, other=0.0).to(tl.float32), 0)
        there = row & (column < value)[None, :]
        part = tl.load(
            d_value + token * value_token + head[:, None] * value_head + column[None, :], mask=there, other=0.0
        )
        tl.store(target + nope + column[None, :], part.to(kind), mask=there)
    c = tl.load(cos + token * half + pair, mask=pair < half, other=0.0)
    s = tl.load(sin + token * half + pair, mask=pair < half, other=0.0)
    first_at, second_at = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + half)
    target = d_shared + token * 2 * half
    tl.store(target + first_at, (first * c + second * s).to(kind), mask=pair < half)
    tl.store(target + second_at, (second * c - first * s).to(kind), mask=pair < half)


def _run(expanded: Tensor, shared: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, key: Tensor) -> None:
    tokens, heads, size = key.shape
    half = cos.shape[1]
    nope = size - 2 * half
    launch(
        _latent_keys, (tokens, -(-heads // _HEADS_AT_A_TIME)),
        expanded, shared, cos, sin, key, heads, *expanded.stride()[:2], shared.stride(0), nope, half,
        INTERLEAVED=interleaved, G=_HEADS_AT_A_TIME, NOPE=power_of_two(nope, 16), HALF=power_of_two(half, 16),
    )  # fmt: skip


def _reference(expanded: Tensor, shared: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, *, key: Tensor) -> None:
    nope = key.shape[-1] - 2 * cos.shape[1]
    wide = shared.float()
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    key[..., :nope] = expanded[..., :nope]
    key[..., nope:] = turned[:, None]


def _run_backward(
    d_key: Tensor, d_value: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
    *, d_expanded: Tensor, d_shared: Tensor,
) -> None:  # fmt: skip
    tokens, heads, size = d_key.shape
    half, value = cos.shape[1], d_value.shape[-1]
    nope = size - 2 * half
    launch(
        _latent_keys_backward, (tokens,),
        d_key, d_value, cos, sin, d_expanded, d_shared, heads, *d_key.stride()[:2], *d_value.stride()[:2], nope, half,
        value, INTERLEAVED=interleaved, G=_HEADS_AT_A_TIME, NOPE=power_of_two(nope, 16), HALF=power_of_two(half, 16),
        VALUE=power_of_two(value, 16),
    )  # fmt: skip


def _reference_backward(
    d_key: Tensor, d_value: Tensor, cos: Tensor, sin: Tensor, interleaved: bool,
    *, d_expanded: Tensor, d_shared: Tensor,
) -> None:  # fmt: skip
    nope = d_key.shape[-1] - 2 * cos.shape[1]
    d_expanded[..., :nope], d_expanded[..., nope:] = d_key[..., :nope], d_value
    first, second = d_key[..., nope:].float().sum(1).chunk(2, dim=-1)
    pair = (first * cos + second * sin, second * cos - first * sin)
    d_shared.copy_(torch.stack(pair, dim=-1).flatten(1) if interleaved else torch.cat(pair, dim=-1))


_TRIALS = (
    # tokens, heads, nope, rotary, value, interleaved, dtype
    (5, 20, 192, 64, 256, True, torch.bfloat16),
    (3, 3, 20, 6, 12, False, torch.float32),
)


def _trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, heads, nope, rotary, value, interleaved, dtype in _TRIALS:
        expanded = torch.randn(tokens, heads, nope + value, generator=generator).to(device, dtype)
        shared = torch.randn(tokens, 2 * rotary, generator=generator).to(device, dtype)[:, rotary:]
        angles = torch.randn(tokens, rotary // 2, generator=generator).to(device)
        key = expanded.new_empty(tokens, heads, nope + rotary)
        yield (expanded, shared, angles.cos(), angles.sin(), interleaved), {"key": key}


def _trials_backward(device: torch.device) -> Iterator[Arguments]:
    for (expanded, shared, cos, sin, interleaved), outputs in _trials(device):
        key = outputs["key"]
        generator = torch.Generator().manual_seed(1)
        d_key = torch.randn(key.shape, generator=generator).to(key)
        d_value = torch.randn(expanded.shape, generator=generator).to(key)[..., key.shape[2] - shared.shape[1] :]
        made = {"d_expanded": torch.empty_like(expanded), "d_shared": shared.new_empty(shared.shape)}
        yield (d_key, d_value, cos, sin, interleaved), made


# expanded [N, h, nope + value], shared [N, rotary] (strides of any kind but the last), cos, sin float32 [N, rotary/2]
# contiguous; key contiguous [N, h, nope + rotary].
latent_keys_forward = kernel(
    "latent_keys",
    "(Tensor expanded, Tensor shared, Tensor cos, Tensor sin, bool interleaved, *, Tensor(a!) key) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=1e-5,
    tolerance_16_bit=2**-7,  # a value between two of bfloat16 may be rounded to either
)

# d_key [N, h, nope + rotary], d_value [N, h, value]; d_expanded and d_shared contiguous. Over heads d_shared is summed
# in float32.
latent_keys_backward = kernel(
    "latent_keys_backward",
    "(Tensor d_key, Tensor d_value, Tensor cos, Tensor sin, bool interleaved, *, Tensor(a!) d_expanded,"
    " Tensor(b!) d_shared) -> ()",
    run=_run_backward,
    reference=_reference_backward,
    trials=_trials_backward,
    tolerance=1e-5,
    tolerance_16_bit=2**-7,
)


def usable(device: torch.device) -> bool:
    return uses(latent_keys_forward, device) and uses(latent_keys_backward, device)


def latent_keys(
    expanded: Tensor, shared: Tensor, tables: tuple[Tensor, Tensor], nope: int, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Keys [N, h, nope + rotary] and values [N, h, value], a view, of expanded [N, h, nope + value] and the key
    [N, rotary] that all heads share, before its rotation."""
    out: tuple[Tensor, Tensor] = _LatentKeys.apply(expanded, shared, *tables, nope, interleaved)
    return out


class _LatentKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, expanded: Tensor, shared: Tensor, cos: Tensor, sin: Tensor, nope: int, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        key = expanded.new_empty(*expanded.shape[:2], nope + shared.shape[1])
        latent_keys_forward(expanded, shared, cos, sin, interleaved, key=key)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return key, expanded[..., nope:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_key, d_value = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        cos, sin = ctx.saved_tensors
        rotary = 2 * cos.shape[1]
        d_expanded = d_key.new_empty(*d_key.shape[:2], d_key.shape[2] - rotary + d_value.shape[2])
        d_shared = d_key.new_empty(len(d_key), rotary)
        latent_keys_backward(d_key, d_value, cos, sin, ctx.interleaved, d_expanded=d_expanded, d_shared=d_shared)
        return d_expanded, d_shared, None, None, None, None
