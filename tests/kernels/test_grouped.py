"""The grouped products against torch, in float32, over the shapes that routing can bring."""

from __future__ import annotations

import pytest
import torch

from quant.kernels.grouped import Trial, grouped_gradient, grouped_product
from tests.helpers import assert_close

CPU = torch.device("cpu")


def routing(tokens: int, chosen: int, experts: int, case: str) -> Trial:
    made = Trial(CPU, tokens, chosen, experts)
    if case == "all on one":
        assert chosen == 1
        made.slots = torch.arange(tokens)
        made.ends = torch.tensor([0] * (experts - 1) + [tokens], dtype=torch.int32)
    return made


CASES = [
    (70, 2, 5, 33, 40, 4, "spread"),
    (1, 1, 3, 16, 16, 1, "spread"),
    (1, 8, 8, 65, 24, 64, "spread"),
    (37, 1, 4, 48, 130, 16, "all on one"),
    (19, 3, 1 + 2, 128, 128, 70, "spread"),
    (200, 1, 1, 64, 32, 3, "spread"),
    (9, 4, 17, 20, 12, 2, "spread"),
]


@pytest.mark.parametrize(("tokens", "chosen", "experts", "hidden", "width", "rank", "case"), CASES)
def test_products_and_gradients(
    tokens: int, chosen: int, experts: int, hidden: int, width: int, rank: int, case: str
) -> None:
    made = routing(tokens, chosen, experts, case)
    n, ends, slots = tokens * chosen, made.ends, made.slots
    of_row = torch.repeat_interleave(torch.arange(experts), ends.diff(prepend=ends.new_zeros(1)))
    x, w = made.numbers(tokens, hidden), made.numbers(experts, width, hidden)
    a, b = made.numbers(experts, rank, hidden), made.numbers(experts, width, rank)
    rows = x[slots // chosen].double()

    inner = torch.empty(n, rank)
    grouped_product(x, ends, slots, a.transpose(1, 2), None, None, 0, chosen, 0.5, True, False, out=inner)
    right_inner = 0.5 * torch.einsum("ni,nri->nr", rows, a[of_row].double())
    assert_close(inner, right_inner.float(), what="x Aᵀ")

    right = torch.einsum("ni,noi->no", rows, w[of_row].double()) + torch.einsum(
        "nr,nor->no", inner.double(), b[of_row].double()
    )
    size = max(2, experts // 3)
    for scatter in (False, True):
        y = torch.full((n, width), float("nan"))
        for first in range(0, experts, size):  # in chunks, which may end unevenly
            chunk = w[first : first + size]
            grouped_product(
                x, ends, slots, matrices=chunk.transpose(1, 2), more_rows=inner,
                more_matrices=b.transpose(1, 2), first=first, chosen=chosen,
                scale=1.0, gather=True, scatter=scatter, out=y,
            )  # fmt: skip
        assert_close(y[slots] if scatter else y, right.float(), what="x Wᵀ + inner Bᵀ")

    dy = made.numbers(n, width)
    for transposed in (False, True):
        d_b = torch.full((experts, rank, width) if transposed else (experts, width, rank), float("nan"))
        grouped_gradient(
            dy, inner, ends, slots, chosen, 2.0, False, False, out=d_b.transpose(1, 2) if transposed else d_b
        )
        right_b = torch.zeros(experts, width, rank, dtype=torch.float64)
        right_b.index_add_(0, of_row, 2 * torch.einsum("no,nr->nor", dy.double(), inner.double()))
        assert_close(d_b.transpose(1, 2) if transposed else d_b, right_b.float(), what="dyᵀ inner")
    d_a = torch.full((experts, rank, hidden), float("nan"))
    grouped_gradient(inner, x, ends, slots, chosen, 1.0, False, True, out=d_a)
    right_a = torch.zeros(experts, rank, hidden, dtype=torch.float64)
    right_a.index_add_(0, of_row, torch.einsum("nr,ni->nri", inner.double(), rows))
    assert_close(d_a, right_a.float(), what="innerᵀ x")
