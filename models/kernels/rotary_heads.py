"""What a program of models/kernels/rotary.py does with some heads of queries or keys: norm and rotation."""

from __future__ import annotations

from quant.kernels.language import jit, tl


@jit
def heads_forward(
    x, out, weight, inverse, cos, sin, block, rows, heads, x_token, x_head, half, rest, eps, offset,
    LAST: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATED: tl.constexpr, NORMED: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """ROWS heads, of `rows` = tokens · heads."""
    row = block * ROWS + tl.arange(0, ROWS)
    size = 2 * half + rest
    token, head = (row // heads).to(tl.int64), row % heads
    row = row.to(tl.int64)
    source, target = x + (token * x_token + head * x_head)[:, None], out + (row * size)[:, None]
    kind: tl.constexpr = out.dtype.element_ty

    pair, other = tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    there, others_there = (row < rows)[:, None] & (pair < half), (row < rows)[:, None] & (other < rest)
    turned_at = rest if LAST else 0
    rest_at = 0 if LAST else 2 * half
    first_at = turned_at + (2 * pair if INTERLEAVED else pair)
    second_at = turned_at + (2 * pair + 1 if INTERLEAVED else pair + half)
    straight = tl.load(source + rest_at + other, mask=others_there, other=0.0).to(tl.float32)
    if ROTATED:
        first = tl.load(source + first_at, mask=there, other=0.0).to(tl.float32)
        second = tl.load(source + second_at, mask=there, other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.sum(straight * straight, 1)
        if ROTATED:
            squares += tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / size + eps)
        tl.store(inverse + row, scale, mask=row < rows)
        factor = tl.load(weight + rest_at + other, mask=other < rest, other=0.0).to(tl.float32) + offset
        straight = (straight * scale[:, None] * factor).to(kind).to(tl.float32)
        if ROTATED:
            factor = tl.load(weight + first_at, mask=pair < half, other=0.0).to(tl.float32) + offset
            first = (first * scale[:, None] * factor).to(kind).to(tl.float32)
            factor = tl.load(weight + second_at, mask=pair < half, other=0.0).to(tl.float32) + offset
            second = (second * scale[:, None] * factor).to(kind).to(tl.float32)
    tl.store(target + rest_at + other, straight.to(kind), mask=others_there)
    if ROTATED:
        angle = (token * half)[:, None] + pair
        c, s = tl.load(cos + angle, mask=there, other=0.0), tl.load(sin + angle, mask=there, other=0.0)
        tl.store(target + turned_at + pair, (first * c - second * s).to(kind), mask=there)
        tl.store(target + turned_at + half + pair, (second * c + first * s).to(kind), mask=there)


@jit
def heads_backward(
    grad, dx, x, weight, inverse, cos, sin, block, rows, heads, grad_token, grad_head, x_token, x_head, half, rest,
    offset, LAST: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATED: tl.constexpr, NORMED: tl.constexpr,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = block * ROWS + tl.arange(0, ROWS)
    size = 2 * half + rest
    token, head = (row // heads).to(tl.int64), row % heads
    row = row.to(tl.int64)
    given, target = grad + (token * grad_token + head * grad_head)[:, None], dx + (row * size)[:, None]
    kind: tl.constexpr = dx.dtype.element_ty

    pair, other = tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    there, others_there = (row < rows)[:, None] & (pair < half), (row < rows)[:, None] & (other < rest)
    turned_at = rest if LAST else 0
    rest_at = 0 if LAST else 2 * half
    first_at = turned_at + (2 * pair if INTERLEAVED else pair)
    second_at = turned_at + (2 * pair + 1 if INTERLEAVED else pair + half)
    straight = tl.load(given + rest_at + other, mask=others_there, other=0.0).to(tl.float32)
    if ROTATED:
        angle = (token * half)[:, None] + pair
        c, s = tl.load(cos + angle, mask=there, other=0.0), tl.load(sin + angle, mask=there, other=0.0)
        d_first = tl.load(given + turned_at + pair, mask=there, other=0.0).to(tl.float32)
        d_second = tl.load(given + turned_at + half + pair, mask=there, other=0.0).to(tl.float32)
        first = d_first * c + d_second * s
        second = d_second * c - d_first * s
    if NORMED:
        source = x + (token * x_token + head * x_head)[:, None]
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(source + rest_at + other, mask=others_there, other=0.0).to(tl.float32) * scale
        straight *= tl.load(weight + rest_at + other, mask=other < rest, other=0.0).to(tl.float32) + offset
        mean = tl.sum(unit * straight, 1)
        if ROTATED:
            unit_first = tl.load(source + first_at, mask=there, other=0.0).to(tl.float32) * scale
            unit_second = tl.load(source + second_at, mask=there, other=0.0).to(tl.float32) * scale
            first *= tl.load(weight + first_at, mask=pair < half, other=0.0).to(tl.float32) + offset
            second *= tl.load(weight + second_at, mask=pair < half, other=0.0).to(tl.float32) + offset
            mean += tl.sum(unit_first * first, 1) + tl.sum(unit_second * second, 1)
        mean = (mean / size)[:, None]
        straight = (straight - unit * mean) * scale
        if ROTATED:
            first, second = (first - unit_first * mean) * scale, (second - unit_second * mean) * scale
    tl.store(target + rest_at + other, straight.to(kind), mask=others_there)
    if ROTATED:
        tl.store(target + first_at, first.to(kind), mask=there)
        tl.store(target + second_at, second.to(kind), mask=there)
