"""Choices sorted by expert in one launch = torch's stable sort, exactly."""

from __future__ import annotations

import pytest
import torch

from models.experts.routing import Routing
from quant.kernels.choice import KERNELS, using


@pytest.mark.parametrize("chosen", range(1, 9))
@pytest.mark.parametrize("case", ["any", "one expert has all", "one token", "no token", "one expert"])
def test_rows_by_expert(chosen: int, case: str) -> None:
    tokens, experts = {"one token": 1, "no token": 0}.get(case, 600), 1 if case == "one expert" else 9
    generator = torch.Generator().manual_seed(chosen)
    choices = torch.randint(experts - 1, (tokens, chosen), generator=generator) if experts > 1 else None
    if choices is None or case == "one expert has all":
        choices = torch.full((tokens, chosen), experts // 2)
    right = Routing.by_expert(choices, experts)
    with using(KERNELS):
        given = Routing.by_expert(choices, experts)
    assert torch.equal(given.slots, right.slots) and torch.equal(given.ends, right.ends)
    assert given.ends.dtype == right.ends.dtype and int(given.ends[-1]) == tokens * chosen
