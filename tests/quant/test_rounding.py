"""Stochastic rounding to bfloat16, held to torch's own rounding and neighbours, and to what chance may do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.kernels.rounding import BLOCK, keys_of, round_stochastically

EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # value of bfloat16


def rounded(values: Tensor, numbers: Tensor | int = 0, seed: int = 0, step: int = 1) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically(values, numbers, keys_of(seed, step), out=out)
    return out


def test_what_bfloat16_expresses_stays() -> None:
    numbers = EVERY[~EVERY.isnan()]
    assert torch.equal(rounded(numbers.float()).view(torch.int16), numbers.view(torch.int16))  # signs of zero too


def test_nan_stays_nan() -> None:
    """Also where all that makes it one is in the bits that are cut off, or where adding to it would carry."""
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7FC00000, -0x400000], dtype=torch.int32)
    values = bits.view(torch.float32).repeat(1000)
    assert values.isnan().all() and rounded(values).isnan().all()


def test_no_neighbour_is_crossed() -> None:
    """Random bits, so values of all sizes: each becomes what torch rounds it to, or the next on its other side."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    bits[::2] &= ~0x7F000000  # subnormal values, or nearly
    values = bits.view(torch.float32)
    values = values[values.isfinite()]
    nearest = values.bfloat16()
    between = nearest.float() != values
    towards = torch.where(values > nearest.float(), torch.inf, -torch.inf).bfloat16()
    other = torch.where(between, torch.nextafter(nearest, towards), nearest)
    given = rounded(values)
    as_nearest, as_other = given == nearest, given == other
    assert (as_nearest | as_other).all()
    assert torch.equal(given.signbit(), values.signbit())
    share = (as_other & between).sum() / between.sum()
    assert 0.24 < share < 0.26  # the mean distance of the nearest


@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -2.5e-5, 3e37, -1e-39, 1e-40, -0.0], ids=str)
def test_the_mean_of_many_is_the_value(value: float) -> None:
    low = torch.tensor(value).bfloat16()
    bits = low.view(torch.int16).int() << 16
    draws = 20_000
    for lower in (1, 0x2000, 0x8000, 0xC123, 0xFFFF):
        exact = (bits + lower).view(torch.float32)
        given = rounded(exact.repeat(draws), numbers=lower * 50_000).double()
        high = (bits + 0x10000).view(torch.float32).double()
        share, chance = float((given == high).double().mean()), lower / 2**16
        assert abs(share - chance) <= 4.5 * (chance * (1 - chance) / draws) ** 0.5 + 1 / draws
        step = high - low.double()
        assert abs(float((given.mean() - exact.double()) / step)) <= 4.5 * 0.5 / draws**0.5


def test_steps_and_values_are_independent() -> None:
    """Sums over values in a step, and over steps of a value, scatter as those of fair coins."""
    steps, count = 64, 4096
    half = torch.full((count,), 1.0 + 2**-8)
    up = torch.stack([rounded(half, numbers=2**31 - 1000, step=step) > 1 for step in range(steps)]).double()
    assert abs(up.mean() - 0.5) < 4.5 * 0.5 / (steps * count) ** 0.5
    assert 0.9 < up.sum(0).var() / (steps / 4) < 1.1
    assert 0.4 < up.sum(1).var() / (count / 4) < 1.9
    assert abs(float(torch.corrcoef(torch.stack((up[:-1].flatten(), up[1:].flatten())))[0, 1])) < 0.01
    assert not torch.equal(rounded(half), rounded(half, seed=1))


def test_bits_go_by_number_however_values_are_cut() -> None:
    values, first = torch.randn(1000, generator=torch.Generator().manual_seed(0)), 2**32 - 500
    whole = rounded(values, first)
    pieces = [rounded(values[at : at + 300], first + at) for at in range(0, 1000, 300)]
    table = torch.arange(first, first + 1000, BLOCK).to(torch.int32)
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(rounded(values, table), whole)
    assert torch.equal(rounded(values[2 * BLOCK :], table[2:]), whole[2 * BLOCK :])
    assert torch.equal(rounded(values, first + 2**32), whole)
    assert not torch.equal(rounded(values, first + 1), whole)
