"""The short convolution, and decay and beta, with their kernels = in torch's operations: values and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.short_conv import split_convolution
from models.blocks.documents import Documents
from models.kernels.delta_gates import delta_gates
from models.kernels.short_conv import usable
from quant.kernels.choice import KERNELS, using
from tests.helpers import assert_close


def convolved(x: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """By torch's own convolution, document by document."""
    width = weight.shape[1]
    padded = (F.pad(document.t(), (width - 1, 0)) for document in x.split(list(lengths)))
    return F.silu(torch.cat([F.conv1d(each, weight[:, None], groups=len(weight)).t() for each in padded]))


@pytest.mark.parametrize(
    ("lengths", "sizes", "width"),
    [((1, 2, 3, 4, 31), (8, 8, 24), 4), ((70,), (64, 3, 65), 4), ((1,), (5,), 3), ((3, 2, 2), (40, 130), 2)],
    ids=str,
)
@pytest.mark.parametrize("trained", [False, True])
def test_the_short_convolution(lengths: Sequence[int], sizes: Sequence[int], width: int, trained: bool) -> None:
    """x is a slice of what several projections gave; parts of the output get gradients that are slices too."""
    generator = torch.Generator().manual_seed(len(lengths))
    channels, documents = sum(sizes), Documents.from_lengths(lengths)
    wide = torch.randn(sum(lengths), channels + 7, generator=generator, requires_grad=True)
    x = wide[:, 3 : 3 + channels]
    weight = torch.randn(channels, width, generator=generator, requires_grad=trained)
    grads = torch.randn(sum(lengths), 2 * channels, generator=generator)[:, 1 : 1 + channels].split(list(sizes), 1)
    inputs = (wide, weight) if trained else (wide,)

    right = convolved(x, weight, lengths).split(list(sizes), 1)
    with using(KERNELS):
        assert usable(x, weight)
        given = split_convolution(x, weight, documents, sizes)
        gradients = torch.autograd.grad(given, inputs, grads)
    for ours, theirs in zip(given, right, strict=True):
        assert_close(ours, theirs)
    for ours, theirs in zip(gradients, torch.autograd.grad(right, inputs, grads), strict=True):
        assert_close(ours, theirs)


def test_a_wide_filter_and_float64_are_convolved_in_torch() -> None:
    with using(KERNELS):
        assert not usable(torch.empty(2, 3), torch.empty(3, 9))
        assert not usable(torch.empty(2, 3, dtype=torch.float64), torch.empty(3, 4))


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (5, 3), (130, 32)])
def test_decay_and_beta(tokens: int, heads: int) -> None:
    """Also where softplus is its argument, and where it is next to nothing."""
    generator = torch.Generator().manual_seed(heads)
    both = (15 * torch.randn(tokens, 2 * heads, generator=generator)).requires_grad_()
    a_log, dt_bias = (torch.randn(heads, generator=generator, requires_grad=True) for _ in range(2))
    grads = [torch.randn(heads, tokens, generator=generator).t() for _ in range(2)]
    inputs = (both, a_log, dt_bias)
    right = delta_gates(both[:, heads:], both[:, :heads], a_log, dt_bias)
    with using(KERNELS):
        given = delta_gates(both[:, heads:], both[:, :heads], a_log, dt_bias)
        assert given[0].grad_fn is given[1].grad_fn  # one launch for both
    assert_close(given[0], right[0])
    assert_close(given[1], right[1])
    for ours, theirs in zip(*(torch.autograd.grad(out, inputs, grads) for out in (given, right)), strict=True):
        assert_close(ours, theirs)


def test_the_smallest_decays_keep_their_digits() -> None:
    step, zero = torch.linspace(-30, 25, 111)[:, None], torch.zeros(1)
    with using(KERNELS):
        decay, _ = delta_gates(step, step, zero, zero)
    torch.testing.assert_close(decay, -F.softplus(step), rtol=1e-5, atol=0)
