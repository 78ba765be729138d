"""Sigmoid-routed experts plus shared ones, which see every token: the feed-forward half of GLM's and Trinity's layers.

Shapes: N tokens, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from torch import Tensor

from models.blocks.factory import Factory
from models.blocks.mlp import FeedForward, SwiGLU
from models.blocks.router import RoutingRule, SigmoidRouter
from models.experts.block import Experts


class SharedExpertsMoE(FeedForward):
    """E routed experts of width I, and shared ones that are one MLP of width `shared_width`."""

    uses = 3

    def __init__(
        self,
        experts: int,
        hidden: int,
        width: int,
        shared_width: int,
        rule: RoutingRule,
        factory: Factory,
    ) -> None:
        super().__init__()
        self.gate = SigmoidRouter(hidden, experts, rule, factory)
        self.shared_experts = SwiGLU(hidden, shared_width, "shared_experts", factory)
        self.experts = Experts(experts, hidden, width, factory)

    def forward(self, x: Tensor, *same: Tensor, plus: Tensor | None = None) -> Tensor:
        """x [N, H]: [N, H]. same: x again, for shared and routed experts. plus: added to it."""
        for_shared, for_experts = same or (x, x)
        chosen, weights = self.gate(x)
        shared = self.shared_experts(for_shared)
        # The routed experts come last: a recomputed layer then stops before them (models/experts/block.py).
        return self.experts(for_experts, chosen, weights, shared, plus)
