"""The short causal convolution against torch's conv1d, document by document."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import short_conv
from models.attention.short_conv import short_convolution
from models.blocks.documents import Documents
from tests.helpers import assert_close


def by_document(x: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    channels, width = weight.shape
    pieces = []
    for piece in x.split(list(lengths)):
        padded = F.pad(piece.t()[None], (width - 1, 0))
        pieces.append(F.silu(F.conv1d(padded, weight[:, None], groups=channels))[0].t())
    return torch.cat(pieces)


def inputs(tokens: int, channels: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator, dtype=dtype)
    weight = torch.randn(channels, width, generator=generator, dtype=dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(tokens, channels, generator=generator, dtype=dtype)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(1,), (3,), (300,), (5, 70, 129), (1, 2, 1, 3, 4, 1), (128, 128, 1)])
def test_output_and_gradients_equal_conv1d_of_each_document(lengths: tuple[int, ...], width: int) -> None:
    x, weight, grad = inputs(sum(lengths), 6, width)
    out = short_convolution(x, weight, Documents.from_lengths(lengths))
    expected = by_document(x, weight, lengths)
    assert_close(out, expected, what="output")
    actual = torch.autograd.grad(out, (x, weight), grad)
    for name, ours, theirs in zip("xw", actual, torch.autograd.grad(expected, (x, weight), grad), strict=True):
        assert_close(ours, theirs, what=f"gradient of {name}")


def test_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (7, 2, 30)
    documents = Documents.from_lengths(lengths)
    x, weight, grad = inputs(sum(lengths), 5, 4)
    expected = short_convolution(x, weight, documents)
    expected_grads = torch.autograd.grad(expected, (x, weight), grad)
    for size in (1, 2, 3, 16):
        monkeypatch.setattr(short_conv, "TOKENS_ON_CPU", size)
        out = short_convolution(x, weight, documents)
        assert_close(out, expected, 1e-6, what=f"output, {size} at a time")
        for ours, theirs in zip(torch.autograd.grad(out, (x, weight), grad), expected_grads, strict=True):
            assert_close(ours, theirs, 1e-6, what=f"gradient, {size} at a time")


def test_gradients_in_float64() -> None:
    lengths = (2, 5, 1, 4)
    x, weight, _ = inputs(sum(lengths), 3, 4, torch.float64)
    documents = Documents.from_lengths(lengths)
    assert torch.autograd.gradcheck(lambda x, w: short_convolution(x, w, documents), (x, weight))


def test_bfloat16_is_rounded_once() -> None:
    lengths = (40, 9)
    documents = Documents.from_lengths(lengths)
    x, weight, grad = (tensor.detach().bfloat16() for tensor in inputs(sum(lengths), 8, 4))
    wide_x, wide_weight = x.float().requires_grad_(), weight.float().requires_grad_()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out, wide = short_convolution(x, weight, documents), short_convolution(wide_x, wide_weight, documents)
    assert torch.equal(out, wide.bfloat16())
    for ours, theirs in zip(
        torch.autograd.grad(out, (x, weight), grad),
        torch.autograd.grad(wide, (wide_x, wide_weight), grad.float()),
        strict=True,
    ):
        assert torch.equal(ours, theirs.bfloat16())


def test_only_gradients_that_are_needed() -> None:
    x, weight, grad = inputs(20, 4, 4)
    documents = Documents.from_lengths([20])
    both = torch.autograd.grad(short_convolution(x, weight, documents), (x, weight), grad)
    assert torch.equal(torch.autograd.grad(short_convolution(x, weight.detach(), documents), x, grad)[0], both[0])
    assert torch.equal(torch.autograd.grad(short_convolution(x.detach(), weight, documents), weight, grad)[0], both[1])
