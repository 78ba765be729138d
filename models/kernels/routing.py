"""Tokens' choices sorted by expert, in one launch that asks the device for nothing.

Shapes: N tokens, K chosen per token, n = N·K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.kernels.choice import Arguments, kernel
from quant.kernels.language import jit, launch, tl

_CHOICES_AT_A_TIME = 4096


@jit
def _rows_by_expert(chosen, slots, ends, count, B: tl.constexpr):
    """Program e: counts the rows of the experts before e, which are all that it needs of other programs, and then
    writes those of e in the order of their slots."""
    expert = tl.program_id(0)
    before = tl.zeros((B,), tl.int32)
    for start in range(0, count, B):
        at = start + tl.arange(0, B)
        choice = tl.load(chosen + at, mask=at < count, other=1 << 30).to(tl.int32)
        before += (choice < expert).to(tl.int32)
    row = tl.sum(before, 0)
    for start in range(0, count, B):
        at = start + tl.arange(0, B)
        own = tl.load(chosen + at, mask=at < count, other=1 << 30).to(tl.int32) == expert
        upto = tl.cumsum(own.to(tl.int32), 0)
        tl.store(slots + row + upto - 1, at.to(tl.int64), mask=own)
        row += tl.sum(own.to(tl.int32), 0)
    tl.store(ends + expert, row)


def _run(chosen: Tensor, *, slots: Tensor, ends: Tensor) -> None:
    launch(_rows_by_expert, (len(ends),), chosen, slots, ends, len(slots), B=_CHOICES_AT_A_TIME, warps=8)


def _reference(chosen: Tensor, *, slots: Tensor, ends: Tensor) -> None:
    # Stable: the rows of an expert keep the order of tokens, so a run repeats bit for bit.
    experts_of_rows, order = chosen.flatten().sort(stable=True)
    slots.copy_(order)
    numbers = torch.arange(len(ends), device=chosen.device)
    ends.copy_(torch.searchsorted(experts_of_rows, numbers, right=True, out_int32=True))


def _trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, k, experts in ((2500, 4, 64), (700, 8, 256), (1, 3, 5), (40, 1, 1)):
        scores = torch.rand(tokens, experts, generator=generator)
        scores[:, experts // 2] = 1.0 if k > 1 else 0.0  # everybody's choice
        scores[:, experts // 3] -= 2.0 if experts > 1 else 0.0  # nobody's
        chosen = scores.topk(k).indices.to(device)
        slots = torch.empty(tokens * k, dtype=torch.int64, device=device)
        yield (chosen,), {"slots": slots, "ends": torch.empty(experts, dtype=torch.int32, device=device)}


# chosen int64 [N, K] contiguous, from 0 to E - 1; slots int64 [n]: the choices token·K + k by expert, those of one in
# their order; ends int32 [E]: the rows up to and with each expert's.
rows_by_expert = kernel(
    "rows_by_expert",
    "(Tensor chosen, *, Tensor(a!) slots, Tensor(b!) ends) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=0.0,
)
