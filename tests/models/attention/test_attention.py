"""Attention within documents against a softmax over a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention.causal import _by_document, _same_width, causal_attention
from models.blocks.documents import Documents
from tests.helpers import assert_close, relative_error

SCALE = 0.3


def make(heads: int, kv_heads: int, width: int, value_width: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, value_width))
    query, key, value = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return query, key, value


def plainly(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None = None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    if window is not None:
        mask &= torch.ones_like(mask).triu(1 - window)
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), value)


@pytest.mark.parametrize("lengths", [[7, 1, 20], [9, 9], [13]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize(("width", "value_width"), [(16, 16), (24, 12), (12, 24)])
def test_output_and_gradients(lengths: list[int], heads: int, kv_heads: int, width: int, value_width: int) -> None:
    inputs = query, key, value = make(heads, kv_heads, width, value_width, sum(lengths))
    out = causal_attention(query, key, value, Documents.from_lengths(lengths), SCALE)
    expected = plainly(query, key, value, lengths)
    assert_close(out, expected, what="output")
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad((expected * target).sum(), inputs)
    ours = torch.autograd.grad((out * target).sum(), inputs)
    for name, mine, other in zip(("query", "key", "value"), ours, theirs, strict=True):
        assert_close(mine, other, what=name)


def test_heads_widened_for_the_flash_kernel_compute_the_same() -> None:
    query, key, value = make(2, 2, 12, 5, 10)
    documents = Documents.from_lengths([4, 6])
    wide = _same_width(query, key, value, multiple=8)
    assert {x.shape[-1] for x in wide} == {16}
    out = _by_document(*wide, documents, SCALE, None)[..., :5]
    assert_close(out, plainly(query, key, value, [4, 6]))
    assert all(x is y for x, y in zip(_same_width(query, key, key), (query, key, key), strict=True))


@pytest.mark.parametrize("lengths", [[40], [40, 40], [16, 16, 16], [5, 33, 1, 17, 8, 16, 64]])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [1, 3, 8, 16, 40, 100])
def test_window(lengths: list[int], kv_heads: int, window: int) -> None:
    """Windows shorter than the documents, as long, and longer; lengths that are multiples of the window, and others."""
    inputs = query, key, value = make(4, kv_heads, 12, 12, sum(lengths))
    out = causal_attention(query, key, value, Documents.from_lengths(lengths), SCALE, window)
    expected = plainly(query, key, value, lengths, window)
    assert_close(out, expected, what="output")
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad((expected * target).sum(), inputs)
    ours = torch.autograd.grad((out * target).sum(), inputs)
    for name, mine, other in zip(("query", "key", "value"), ours, theirs, strict=True):
        if window == 1 and name != "value":  # the only key has the whole weight, whatever its score
            assert mine.abs().max() < 1e-5 and not other.any()
        else:
            assert_close(mine, other, what=name)
    wider = plainly(query, key, value, lengths, window + 1)
    assert window >= max(lengths) or relative_error(wider, expected) > 1e-2, "one more key would be seen"


def test_window_with_values_of_another_width() -> None:
    query, key, value = make(4, 2, 12, 20, 50)
    out = causal_attention(query, key, value, Documents.from_lengths([7, 43]), SCALE, 10)
    assert_close(out, plainly(query, key, value, [7, 43], 10))


class Scores(TorchDispatchMode):
    """Counts the scores that attention computes, forward and backward, and sees the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if "scaled_dot_product" in name:
            backward = "backward" in name
            query, key = args[1:3] if backward else args[:2]
            count = query.shape[:-1].numel() * key.shape[-2]
            self.backward += count * backward
            self.forward += count * (not backward)
        found = out if isinstance(out, tuple | list) else [out]
        self.largest = max([self.largest, *(x.numel() for x in found if isinstance(x, Tensor))])
        return out


@pytest.mark.parametrize("lengths", [[1000], [500, 500], [30, 900, 70]])
def test_the_cost_of_a_window_grows_with_the_length_and_not_with_its_square(lengths: list[int]) -> None:
    tokens, heads, window, width = sum(lengths), 2, 32, 8
    documents = Documents.from_lengths(lengths)

    def cost(window: int | None) -> Scores:
        query, key, value = make(heads, 1, width, width, tokens)
        with Scores() as scores:
            causal_attention(query, key, value, documents, SCALE, window).sum().backward()
        return scores

    windowed, whole = cost(window), cost(None)
    assert whole.forward == heads * sum(length**2 for length in lengths), "the count is of scores"
    assert 0 < windowed.forward <= heads * tokens * 2 * window
    assert 0 < windowed.backward <= heads * tokens * 2 * window
    assert windowed.largest <= 2 * heads * tokens * width, "keys and values are laid out twice at most, scores never"
