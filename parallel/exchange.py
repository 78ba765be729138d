"""Expert parallelism: tokens travel to the processes that own their experts, and the results travel back.

A group of P processes owns E / P consecutive experts each. Per token: its K choices become K rows among the N·K
that this process sends, sorted by expert and so by owner; each row goes to its owner with its routing weight, is
computed there by the block of models/experts/block.py, and comes back weighted; a token's K rows are summed in
float32, in the order of its choices. Gradients are exchanged the same way in the other direction.

Time: five exchanges of rows per layer and step (two forward, one in the recomputation of activation checkpointing, two
backward) and one small exchange of counts before the first. The host waits for the device once, for the counts: it must
know how much to send and to expect. The recomputation and the backward pass send as much as the first pass did.

Memory: what a process receives is kept for the backward pass, n rows [n, H] in the dtype of x: N·K on average, which is
K times what the layer of one process keeps, and P·N·K when all tokens choose the experts of one process. Activation
checkpointing bounds it to one layer at a time.

Shapes: N tokens of this process, E experts of the layer, K chosen per token, H hidden, n rows received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.blocks.recomputed import kept
from models.experts.block import LocalExperts
from models.experts.routing import count_choices
from models.experts.torch_form import combine
from models.kernels.expert_rows import combine_slots
from quant.kernels.choice import uses


@dataclass(frozen=True)
class _Routes:
    """Which rows go to which process of the group, and which come from each.

    slots, tokens: int64 [N·K], the slot token·K + choice, and the token, of every row that is sent, by expert.
    sent, received: rows by process.
    expert: int64 [n], the expert of every row received, numbered from 0. rows: how many each expert has.
    """

    slots: Tensor
    tokens: Tensor
    sent: list[int]
    received: list[int]
    expert: Tensor
    rows: tuple[int, ...]
    group: dist.ProcessGroup

    def dispatch(self, rows: Tensor) -> Tensor:
        """The rows of all processes that are for this one, in the order of their senders."""
        return _all_to_all(rows, self.sent, self.received, self.group)

    def collect(self, rows: Tensor) -> Tensor:
        return _all_to_all(rows, self.received, self.sent, self.group)


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


class ExpertExchange:
    """An Exchange of models/experts/block.py.

    group: its process i owns experts i·E/P up to (i + 1)·E/P; experts: E.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        if experts % group.size():
            raise ValueError(f"{experts} experts can't be distributed evenly over {group.size()} processes")
        self.group, self.experts = group, experts

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, compute: LocalExperts) -> Tensor:
        """x [N, H], chosen int64 [N, K] of all experts, weights float32 [N, K]: [N, H] in the dtype of x.

        N may differ between the processes and may be 0. Every process must call it, and have gradients flow back or
        not, as the others do.
        """
        routes, choices = kept(lambda: self._routes(chosen)), chosen.shape[1]
        arrived = _Send.apply(x, choices, routes)
        arrived_weights = _Send.apply(weights.reshape(-1, 1), 1, routes)
        return _Return.apply(compute(arrived, routes.expert[:, None], arrived_weights, routes.rows), choices, routes)

    def _routes(self, chosen: Tensor) -> _Routes:
        processes, flat = self.group.size(), chosen.flatten()
        slots = torch.argsort(flat, stable=True)
        tokens = slots // chosen.shape[1]
        mine = count_choices(flat, self.experts)
        theirs = torch.empty_like(mine)  # by sender and local expert
        dist.all_to_all_single(theirs, mine, group=self.group)
        counts = self.on_host(torch.stack((mine, theirs)).view(2, processes, -1), len(flat))
        sent, received = ([sum(of_process) for of_process in side] for side in counts)
        rows = tuple(sum(of_expert) for of_expert in zip(*counts[1], strict=True))
        expert = torch.arange(len(rows), device=chosen.device).repeat(processes)
        expert = expert.repeat_interleave(theirs, output_size=sum(received))
        return _Routes(slots, tokens, sent, received, expert, rows, self.group)

    def on_host(self, counts: Tensor, choices: int) -> list[list[list[int]]]:
        """int64 [2, P, E/P], rows sent by owner and received by sender: the one wait for the device. choices: N·K."""
        numbers: list[list[list[int]]] = counts.tolist()
        return numbers


# Two autograd functions, each the other's transpose. Nothing after the experts is saved for the backward pass: under
# activation checkpointing a layer's recomputation still ends at the experts, with their input that has travelled once
# more, before they are multiplied (models/experts/block.py). Routes are those of the first computation both times
# (`kept`), 16 bytes a row sent and 8 a row received, and no part of what is saved.


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, choices: int, routes: _Routes) -> Tensor:
        """x [N, H], K = `choices` rows of each token, or x [N·K, H], a row of each slot, for `choices` 1: [n, H]."""
        ctx.choices, ctx.routes = choices, routes
        return routes.dispatch(x.index_select(0, routes.slots if choices == 1 else routes.tokens))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _by_token(ctx.routes.collect(grads[0]), ctx.routes.slots, ctx.choices), None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, choices: int, routes: _Routes) -> Tensor:
        """y [n, H]: [N, H], each token the sum of its K rows."""
        ctx.choices, ctx.routes = choices, routes
        return _by_token(routes.collect(y), routes.slots, choices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.routes.dispatch(grads[0].index_select(0, ctx.routes.tokens)), None, None


def _by_token(rows: Tensor, slots: Tensor, choices: int) -> Tensor:
    """rows [N·K, H] in the order of `slots`: their sums by token [N, H], in float32, in the order of the choices."""
    by_slot = torch.empty_like(rows).index_copy_(0, slots, rows)
    if choices == 1:
        return by_slot
    if not uses(combine_slots, rows.device):
        return combine(by_slot, None, choices, rows.dtype)
    out = rows.new_empty(len(rows) // choices, rows.shape[1])
    combine_slots(by_slot, None, [], out=out)
    return out
