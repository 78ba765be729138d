"""The gated feed-forward layer (SwiGLU: Shazeer 2020, arXiv:2002.05202), dense or shared by all tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.linear import Linear
from quant.storage import StorageSpec


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) for x [N, H]."""

    def __init__(
        self, hidden: int, width: int, *, spec: StorageSpec, dtype: torch.dtype, device: torch.device | str, name: str
    ) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int, part: str) -> Linear:
            return Linear(inputs, outputs, spec=spec, dtype=dtype, device=device, name=f"{name}.{part}")

        self.gate_proj = linear(hidden, width, "gate_proj")
        self.up_proj = linear(hidden, width, "up_proj")
        self.down_proj = linear(width, hidden, "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
