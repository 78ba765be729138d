"""Choosing the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0

    def choose(self, logits: Tensor, seen: Sequence[Tensor], generator: torch.Generator | None) -> Tensor:
        return logits.argmax(-1)


GREEDY = Sampling()
