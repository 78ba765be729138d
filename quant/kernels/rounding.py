"""Stochastic rounding of float32 to bfloat16: up or down by chance, so that the mean is the value itself.

Rounding to the nearest loses an update of less than half the distance between two neighbours, 2⁻⁹ of the value, every
time; this one makes it whole in a share of the steps. Values are magnitude and sign: 16 random bits are added to the
lower half of the magnitude, which is then cut off, so that the magnitude grows with the probability lower half / 2¹⁶.
What bfloat16 can express, infinities among it, stays; NaN stays NaN.

The random bits are no generator's but a hash of a number that each value has and of two keys: there is no state to
keep, and who holds the same value draws the same bits, on whatever device and in whatever part of a tensor. The hash is
a multiplication by a key and MurmurHash3's last steps (Appleby, fmix32), of which the upper half is taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from quant.kernels.choice import Arguments, kernel, uses
from quant.kernels.language import blocks, jit, launch, tl

BLOCK = 256  # values that an entry of `numbers` is for: of a block of bitsandbytes' 8-bit states
_VALUES_AT_A_TIME = 2048  # of a program
_INFINITY = 0x7F800000  # float32's; larger magnitudes are NaN


# Numbers and keys change with every tensor and step: compiled once, not again for multiples of 16.
@jit(do_not_specialize=("number", "key1", "key2"))
def _rounded(
    values, numbers, number, key1, key2, out, count, TABLE: tl.constexpr, BLOCK: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Program i: B values."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    there = at < count
    bits = tl.load(values + at, mask=there, other=0.0).to(tl.int32, bitcast=True)
    if TABLE:
        index = tl.load(numbers + at // BLOCK, mask=there, other=0) + at % BLOCK
    else:
        index = number + at
    random = ((index ^ key1) * (key2 | 1)).to(tl.uint32, bitcast=True)
    random ^= random >> 16
    random *= 0x85EBCA6B
    random ^= random >> 13
    random *= 0xC2B2AE35
    upper = (bits + (random >> 16).to(tl.int32, bitcast=True)) >> 16
    upper = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, upper)
    tl.store(out + at, upper.to(tl.int16), mask=there)


def _run(values: Tensor, numbers: Tensor | None, number: int, key1: int, key2: int, *, out: Tensor) -> None:
    table, size = numbers is not None, _VALUES_AT_A_TIME
    arguments = (values, numbers if table else values, number, key1, key2, out, values.numel())
    launch(_rounded, (blocks(values.numel(), size),), *arguments, TABLE=table, BLOCK=BLOCK, B=size)


def _reference(values: Tensor, numbers: Tensor | None, number: int, key1: int, key2: int, *, out: Tensor) -> None:
    count = values.numel()
    index = torch.arange(count if numbers is None else BLOCK, dtype=torch.int32, device=values.device)
    if numbers is None:
        index += number
    else:
        index = (numbers[: blocks(count, BLOCK), None] + index).view(-1)[:count]
    # Shifts of int32 keep the sign, and its products wrap around.
    random = index.bitwise_xor_(key1).mul_(key2 | 1)
    random ^= random >> 16 & 0xFFFF
    random *= 0x85EBCA6B - 2**32
    random ^= random >> 13 & 0x7FFFF
    random *= 0xC2B2AE35 - 2**32
    bits = values.view(torch.int32)
    upper = (bits + (random >> 16 & 0xFFFF)) >> 16
    out.copy_(torch.where(bits & 0x7FFFFFFF > _INFINITY, bits >> 16 | 0x40, upper))


def _trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 3.4e38, float("inf"), -float("inf"), float("nan"), -1.0])
    for count, table in ((1, False), (3000, False), (513, True), (4096, True)):
        values = torch.randn(count, generator=generator) * 10.0 ** torch.randint(-38, 38, (count,), generator=generator)
        values[: len(special)] = special[:count]
        number, key1, key2, *numbers = torch.randint(-(2**31), 2**31, (3 + blocks(count, BLOCK),), generator=generator)
        given = torch.stack(numbers).to(device, torch.int32) if table else None
        out = torch.zeros(count, dtype=torch.int16, device=device)
        yield (values.to(device), given, int(number), int(key1), int(key2)), {"out": out}


# values float32 [n]; numbers int32 [⌈n / BLOCK⌉]: of each block's first value, else number: of the first of all;
# numbers and keys are any integers of 32 bits. out int16 [n]: bfloat16's bits.
_rounding = kernel(
    "stochastic_rounding",
    "(Tensor values, Tensor? numbers, int number, int key1, int key2, *, Tensor(a!) out) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=0.0,
)


def keys_of(*what: int) -> tuple[int, int]:
    """Two keys that are others for other integers."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:8], "little", signed=True)


def wrapped(number: int) -> int:
    """The signed integer of 32 bits that `number` is modulo 2³²."""
    return (number + 2**31) % 2**32 - 2**31


def round_stochastically(values: Tensor, numbers: Tensor | int, keys: tuple[int, int], *, out: Tensor) -> None:
    """values float32 [n], out bfloat16 [n], both contiguous. One launch on an accelerator that has the kernel.

    numbers: of the first value, after which they count on, or int32 [⌈n / BLOCK⌉] of the first value of each block.
    Values with the same number and keys get the same bits; numbers count modulo 2³².
    """
    table = numbers if isinstance(numbers, Tensor) else None
    number = 0 if isinstance(numbers, Tensor) else wrapped(numbers)
    compute = _rounding if uses(_rounding, values.device) else _reference
    compute(values, table, number, *keys, out=out.view(torch.int16))
