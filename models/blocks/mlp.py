"""The gated feed-forward layer (SwiGLU: Shazeer 2020, arXiv:2002.05202), dense or shared by all tokens."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.blocks.linear import Linear, together
from models.kernels.gates import gated, usable


class FeedForward(nn.Module):
    """The half of a layer that follows attention: of x [N, H], given `uses` times, [N, H], with `plus` [N, H] added.

    Whoever gives x as often as it is used gets the gradients of its uses apart, to sum them together.
    """

    uses: ClassVar[int] = 1


class SwiGLU(FeedForward):
    """down(silu(gate(x)) · up(x)) for x [N, H]. group: of its weights, "dense_mlp" or "shared_experts"."""

    def __init__(self, hidden: int, width: int, group: Group, factory: Factory) -> None:
        super().__init__()
        self.group = group
        self.gate_proj = Linear(hidden, width, factory)
        self.up_proj = Linear(hidden, width, factory)
        self.down_proj = Linear(width, hidden, factory)

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        gate, up = together(x, self.gate_proj, self.up_proj)
        out: Tensor = self.down_proj(times_silu(up, gate))
        return out if plus is None else plus + out


def times_silu(x: Tensor, gate: Tensor) -> Tensor:
    """silu(gate) · x."""
    return gated(gate, x, silu=True) if usable(x.device) else F.silu(gate) * x


def times_sigmoid(x: Tensor, gate: Tensor) -> Tensor:
    """sigmoid(gate) · x, of a gate for each value or, [N, 1], for each row."""
    return gated(gate, x, silu=False) if usable(x.device) else x * gate.sigmoid()
