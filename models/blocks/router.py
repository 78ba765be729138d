"""Choosing experts: by sigmoid scores with a correction bias, or by softmax probabilities.

Shapes: N tokens, E experts, K chosen per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.blocks.linear import Linear, trained
from models.blocks.precision import KeptInFloat32
from models.kernels.router import choose, usable
from quant.common.errors import NibbleError
from quant.common.jsonfile import integer
from quant.storage import DenseStorage

# Takes the chosen experts int64 [N, K] and all scores float32 [N, E], differentiable.
Observer = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class RoutingRule:
    """How sigmoid scores become a choice of K experts and their weights."""

    chosen: int
    groups: int = 1
    chosen_groups: int = 1
    normalise: bool = True
    scale: float = 1.0


def expert_counts(
    config: dict[str, Any], experts: int, chosen: int, where: str, key: str = "num_experts"
) -> tuple[int, int]:
    """How many experts a layer has, by `key` of config.json, and how many of them a token chooses.

    experts, chosen: where the file leaves them out.
    """
    experts, chosen = integer(config, key, experts, where), integer(config, "num_experts_per_tok", chosen, where)
    if chosen > experts:
        raise NibbleError(
            f"{where}: num_experts_per_tok is {chosen}, but {key} is {experts}; choose at most that many."
        )
    return experts, chosen


class Router(KeptInFloat32, Linear):
    """A matrix [E, H] that scores every expert, in float32 whatever the model's dtype.

    A router's forward takes x [N, H] and returns the chosen experts int64 [N, K] and their weights float32 [N, K],
    differentiable in x. `observers` are called with every choice (models/blocks/usage.py). Which of several experts
    with equal scores are chosen depends on the device; a kernel takes the first.
    """

    group: ClassVar[Group] = "router"

    def __init__(self, hidden: int, experts: int, factory: Factory) -> None:
        super().__init__(hidden, experts, factory.float32)
        self.observers: list[Observer] = []

    def logits(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.float32))

    def fused(self, x: Tensor) -> DenseStorage | None:
        """The matrix, where one kernel computes all: not where somebody wants to see scores, or trains the router."""
        if self.observers or self.lora is not None or trained(self.weight) is not None or not usable(x.device):
            return None
        return self.weight if isinstance(self.weight, DenseStorage) else None

    def observe(self, chosen: Tensor, probabilities: Tensor) -> None:
        for observer in self.observers:
            observer(chosen, probabilities)


class SigmoidRouter(Router):
    """Scores with a sigmoid, a bias that balances, and groups of experts (DeepSeek-V3, arXiv:2412.19437 §2.1.2).

    `e_score_correction_bias` float32 [E] takes part in choosing and never in the weights, has no gradient, and is
    never cast.
    """

    e_score_correction_bias: Tensor

    def __init__(self, hidden: int, experts: int, rule: RoutingRule, factory: Factory) -> None:
        super().__init__(hidden, experts, factory)
        self.rule = rule
        self.e_score_correction_bias = nn.Buffer(torch.zeros(experts, dtype=torch.float32, device=factory.device))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rule, bias, matrix = self.rule, self.e_score_correction_bias, self.fused(x)
        if matrix is not None:
            return choose(
                x, matrix, bias, rule.chosen, groups=rule.groups, open_groups=rule.chosen_groups,
                normalise=rule.normalise, scale=rule.scale,
            )  # fmt: skip
        scores = self.logits(x).sigmoid()
        with torch.no_grad():
            choice = scores + bias
            if rule.groups > 1:
                # A group is as good as its two best experts; the experts of the other groups are out of the choice.
                grouped = choice.unflatten(-1, (rule.groups, -1))
                best = grouped.topk(2, dim=-1).values.sum(-1).topk(rule.chosen_groups, dim=-1).indices
                closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
                choice = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
            chosen = choice.topk(rule.chosen, dim=-1).indices
        self.observe(chosen, scores)
        weights = scores.gather(-1, chosen)
        if rule.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * rule.scale


class SoftmaxRouter(Router):
    """The K most probable experts, with their probabilities, which `normalise` scales to sum to one (Qwen3's)."""

    def __init__(self, hidden: int, experts: int, chosen: int, factory: Factory, *, normalise: bool = True) -> None:
        super().__init__(hidden, experts, factory)
        self.chosen, self.normalise = chosen, normalise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        matrix = self.fused(x)
        if matrix is not None:
            return choose(x, matrix, None, self.chosen, normalise=self.normalise)
        probabilities = self.logits(x).softmax(-1)
        weights, chosen = probabilities.topk(self.chosen, dim=-1)
        self.observe(chosen, probabilities)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights
