"""Attention within documents against a softmax over a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.attention import _by_document, _same_width, causal_attention
from models.documents import Documents
from tests.helpers import assert_close

SCALE = 0.3


def make(heads: int, kv_heads: int, width: int, value_width: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, value_width))
    query, key, value = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    return query, key, value


def plainly(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
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
    out = _by_document(*wide, documents, SCALE)[..., :5]
    assert_close(out, plainly(query, key, value, [4, 6]))
    assert all(x is y for x, y in zip(_same_width(query, key, key), (query, key, key), strict=True))
