"""Choosing experts: the sigmoid router with a correction bias and expert groups (DeepSeek-V3, arXiv:2412.19437 §2.1.2).

Shapes: N tokens, E experts, K chosen per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.storage import StorageSpec

from .linear import Linear


@dataclass(frozen=True)
class RoutingRule:
    """How scores become a choice of K experts and their weights."""

    chosen: int
    groups: int = 1
    chosen_groups: int = 1
    normalise: bool = True
    scale: float = 1.0


class SigmoidRouter(Linear):
    """Scores every expert with a sigmoid, in float32 whatever the model's dtype.

    `e_score_correction_bias` float32 [E] balances the experts' load: it takes part in choosing and never in the
    weights, has no gradient, and is never cast.
    """

    e_score_correction_bias: Tensor

    def __init__(self, hidden: int, experts: int, rule: RoutingRule, *, device: torch.device | str, name: str) -> None:
        super().__init__(hidden, experts, spec=StorageSpec("none"), dtype=torch.float32, device=device, name=name)
        self.rule = rule
        self.e_score_correction_bias = nn.Buffer(torch.zeros(experts, dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidRouter:
        """`to`, `bfloat16` … of a model end here: they may move the router but not round it."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x [N, H]: the chosen experts int64 [N, K] and their weights float32 [N, K], differentiable in x."""
        rule = self.rule
        scores = super().forward(x.to(torch.float32)).sigmoid()
        with torch.no_grad():
            choice = scores + self.e_score_correction_bias
            if rule.groups > 1:
                # A group is as good as its two best experts; the experts of the other groups are out of the choice.
                grouped = choice.unflatten(-1, (rule.groups, -1))
                best = grouped.topk(2, dim=-1).values.sum(-1).topk(rule.chosen_groups, dim=-1).indices
                closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
                choice = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
            chosen = choice.topk(rule.chosen, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if rule.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * rule.scale
