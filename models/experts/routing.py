"""Which rows belong to which expert: tokens' choices sorted by expert.

Shapes: N tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.kernels.expert_rows import rows_by_expert
from quant.kernels.choice import uses
from quant.products import Groups


@dataclass(frozen=True)
class Chunk:
    """A few consecutive experts and their rows `[start, stop)` among the sorted ones."""

    experts: slice
    groups: Groups  # where each expert's rows end, from the chunk's first row
    start: int
    stop: int


@dataclass(frozen=True)
class Routing:
    """slots: int64 [N·K], the slot token·K + choice of every row, sorted by expert. ends: int32 [E], the rows up to and
    with each expert's. rows: the rows of each expert on the host, which `chunks` needs, where it has them.
    """

    slots: Tensor
    ends: Tensor
    rows: tuple[int, ...] | None = None

    @staticmethod
    def by_expert(chosen: Tensor, experts: int, rows: tuple[int, ...] | None = None) -> Routing:
        """Of choices int64 [N, K]. rows: as the attribute, where they are known already."""
        if uses(rows_by_expert, chosen.device):
            slots = chosen.new_empty(chosen.numel())
            ends = torch.empty(experts, dtype=torch.int32, device=chosen.device)
            rows_by_expert(chosen.contiguous(), slots=slots, ends=ends)
            return Routing(slots, ends, rows)
        # Stable: the rows of an expert keep the order of tokens, so a run repeats bit for bit.
        experts_of_rows, slots = chosen.flatten().sort(stable=True)
        numbers = torch.arange(experts, device=chosen.device)
        return Routing(slots, torch.searchsorted(experts_of_rows, numbers, right=True, out_int32=True), rows)

    def on_host(self) -> Routing:
        """With `rows`, for which the host waits until the device has them."""
        if self.rows is not None:
            return self
        ends = self.ends.tolist()
        return replace(self, rows=tuple(stop - start for start, stop in itertools.pairwise([0, *ends])))

    def chunks(self, size: int) -> Iterator[Chunk]:
        """The experts that have rows, and no others, up to `size` consecutive ones at a time."""
        assert self.rows is not None
        start = first = 0
        while first < len(self.rows):
            counts = tuple(itertools.takewhile(bool, self.rows[first : first + size]))
            if counts:
                ends = tuple(itertools.accumulate(counts))
                experts = slice(first, first + len(counts))
                offsets = self.ends[experts] - start if len(counts) > 1 else None
                yield Chunk(experts, Groups(ends, offsets), start, start + ends[-1])
                start += ends[-1]
            first += max(len(counts), 1)


def count_choices(flat: Tensor, experts: int) -> Tensor:
    """How often each expert is among `flat` int64 [n]: int64 [E]. Not bincount, which waits for the device."""
    return flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
