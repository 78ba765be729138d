"""The short causal convolution before the gated delta rule, with its SiLU, in one launch each way for the input.

Computed in float32 and rounded once, as models/attention/short_conv.py does in torch's operations. Which tokens belong
to a document is read from their positions on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.kernels.choice import Arguments, kernel, uses
from quant.kernels.language import blocks, jit, launch, tl

_TOKENS, _CHANNELS, _WARPS = 32, 64, 8  # of a program: a row's channels are 128 bytes in 16 bits
_WIDEST = 8  # filter: each of its taps is code of its own, backward their square
_PARTS = 3  # of the output, at most: queries, keys, values


@jit
def _short_conv(
    x, weight, positions, out, tokens, channels, x_row,
    WIDTH: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program (i, j): T tokens, B channels."""
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    column = tl.program_id(1) * B + tl.arange(0, B)
    there = column < channels
    position = tl.load(positions + token, mask=token < tokens, other=-1)
    y = tl.zeros((T, B), tl.float32)
    for s in tl.static_range(WIDTH):
        seen = (position >= s)[:, None] & there[None, :]
        earlier = tl.load(x + (token - s)[:, None] * x_row + column[None, :], mask=seen, other=0.0).to(tl.float32)
        y += earlier * tl.load(weight + column * WIDTH + (WIDTH - 1 - s), mask=there, other=0.0).to(tl.float32)[None, :]
    y = y / (1.0 + tl.exp(-y))
    known = (token < tokens)[:, None] & there[None, :]
    tl.store(out + token[:, None] * channels + column[None, :], y.to(out.dtype.element_ty), mask=known)


@jit
def _short_conv_backward(
    grad_0, grad_1, grad_2, x, weight, positions, dx, tokens, columns_0, columns_1, columns_2,
    row_0, row_1, row_2, x_row, WIDTH: tl.constexpr, T: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program (i, j): T tokens, B channels of one of the three parts that the output was split into.

    What SiLU was applied to is computed again, also for the WIDTH - 1 tokens after these, which had these as input.
    """
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    grad, grad_row, columns, first, block = grad_0, row_0, columns_0, columns_0 * 0, tl.program_id(1)
    blocks_0, blocks_1 = tl.cdiv(columns_0, B), tl.cdiv(columns_1, B)
    if block >= blocks_0 + blocks_1:
        grad, grad_row, columns, first, block = (
            grad_2,
            row_2,
            columns_2,
            columns_0 + columns_1,
            block - blocks_0 - blocks_1,
        )
    elif block >= blocks_0:
        grad, grad_row, columns, first, block = grad_1, row_1, columns_1, columns_0, block - blocks_0
    column = block * B + tl.arange(0, B)
    there = column < columns
    channel = first + column
    taps = weight + channel * WIDTH + (WIDTH - 1)
    d = tl.zeros((T, B), tl.float32)
    for s in tl.static_range(WIDTH):
        later = token + s
        position = tl.load(positions + later, mask=later < tokens, other=-1)
        y = tl.zeros((T, B), tl.float32)
        for r in tl.static_range(WIDTH):
            # The mask depends on s - r only, so that the compiler loads each distance once.
            source = token + (s - r)
            inside = ((source >= 0) & (source < tokens))[:, None] & there[None, :]
            value = tl.load(x + source[:, None] * x_row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            value = tl.where((position >= r)[:, None], value, 0.0)
            y += value * tl.load(taps - r, mask=there, other=0.0).to(tl.float32)[None, :]
        seen = (position >= s)[:, None] & there[None, :]
        dy = tl.load(grad + later[:, None] * grad_row + column[None, :], mask=seen, other=0.0).to(tl.float32)
        chance = 1.0 / (1.0 + tl.exp(-y))
        dy *= chance * (1.0 + y * (1.0 - chance))
        d += dy * tl.load(taps - s, mask=there, other=0.0).to(tl.float32)[None, :]
    known = (token < tokens)[:, None] & there[None, :]
    channels = columns_0 + columns_1 + columns_2
    tl.store(dx + token[:, None] * channels + channel[None, :], d.to(dx.dtype.element_ty), mask=known)


def _run(x: Tensor, weight: Tensor, positions: Tensor, *, out: Tensor) -> None:
    count, channels = x.shape
    launch(
        _short_conv, (blocks(count, _TOKENS), blocks(channels, _CHANNELS)),
        x, weight, positions, out, count, channels, x.stride(0),
        WIDTH=weight.shape[1], T=_TOKENS, B=_CHANNELS, warps=_WARPS,
    )  # fmt: skip


def _run_backward(grads: Sequence[Tensor], x: Tensor, weight: Tensor, positions: Tensor, *, dx: Tensor) -> None:
    columns = [grad.shape[1] for grad in grads] + [0] * (_PARTS - len(grads))
    parts = [*grads, *[grads[0]] * (_PARTS - len(grads))]
    launch(
        _short_conv_backward, (blocks(len(x), _TOKENS), sum(blocks(each, _CHANNELS) for each in columns)),
        *parts, x, weight, positions, dx, len(x), *columns, *(part.stride(0) for part in parts), x.stride(0),
        WIDTH=weight.shape[1], T=_TOKENS, B=_CHANNELS, warps=_WARPS,
    )  # fmt: skip


def _before_silu(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    wide, taps = x.float(), weight.float().flip(1)
    y = torch.zeros_like(wide)
    for s in range(taps.shape[1]):
        y += F.pad(wide, (0, 0, s, 0))[: len(x)] * (positions >= s)[:, None] * taps[:, s]
    return y


def _reference(x: Tensor, weight: Tensor, positions: Tensor, *, out: Tensor) -> None:
    out.copy_(F.silu(_before_silu(x, weight, positions)))


def _reference_backward(grads: Sequence[Tensor], x: Tensor, weight: Tensor, positions: Tensor, *, dx: Tensor) -> None:
    dy = torch.ops.aten.silu_backward(torch.cat(list(grads), 1).float(), _before_silu(x, weight, positions))
    total, taps = torch.zeros_like(dy), weight.float().flip(1)
    for s in range(taps.shape[1]):
        total += F.pad(dy * (positions >= s)[:, None], (0, 0, 0, s))[s:] * taps[:, s]
    dx.copy_(total)


_TRIALS = (
    # lengths of documents, channels of the parts, width of the filter, dtypes of x and the weight
    ((1, 2, 3, 40), (64, 64, 128), 4, torch.bfloat16, torch.bfloat16),
    ((5, 33), (40, 24, 72), 4, torch.float32, torch.float32),
    ((2,), (17,), 3, torch.bfloat16, torch.float32),
)


def _random(device: torch.device) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(0)
    for lengths, parts, width, dtype, weight_dtype in _TRIALS:
        x = torch.randn(sum(lengths), sum(parts) + 16, generator=generator).to(device, dtype)[:, : sum(parts)]
        weight = torch.randn(sum(parts), width, generator=generator).to(device, weight_dtype)
        yield (x, weight, torch.cat([torch.arange(length) for length in lengths]).to(device)), parts


def _trials(device: torch.device) -> Iterator[Arguments]:
    for inputs, _ in _random(device):
        yield inputs, {"out": inputs[0].new_empty(inputs[0].shape)}


def _trials_backward(device: torch.device) -> Iterator[Arguments]:
    for inputs, parts in _random(device):
        grads = list(inputs[0].flip(0).split(parts, 1))
        yield (grads, *inputs), {"dx": inputs[0].new_empty(inputs[0].shape)}


# x [N, C] with any distance between rows, weight contiguous [C, width], positions int64 [N], of tokens in their
# documents; out contiguous [N, C]: silu(Σ_s weight[:, width - 1 - s] · x[t - s]) over the tokens of the document.
short_conv_forward = kernel(
    "short_conv",
    "(Tensor x, Tensor weight, Tensor positions, *, Tensor(a!) out) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=2**-7,  # a value between two of bfloat16 may be rounded to either
)

# grads: of one to three parts of out, side by side, each with any distance between rows; dx contiguous [N, C].
short_conv_backward = kernel(
    "short_conv_backward",
    "(Tensor[] grads, Tensor x, Tensor weight, Tensor positions, *, Tensor(a!) dx) -> ()",
    run=_run_backward,
    reference=_reference_backward,
    trials=_trials_backward,
    tolerance=2**-7,
)


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether both kernels are used on this device and hold filters of this width."""
    fits = x.dtype != torch.float64 and weight.shape[1] <= _WIDEST
    return fits and uses(short_conv_forward, x.device) and uses(short_conv_backward, x.device)
