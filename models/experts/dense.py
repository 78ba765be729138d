"""Dense weights of a few experts at a time, which bounds the working memory whatever the number of experts.

Shapes: E experts, c of them dense at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.blocks.linear import ExpertWeights

# On an accelerator so many experts are dense at a time as fit in here. By bytes, since an expert of GLM-5 is twelve
# times one of Qwen3.5, and every chunk launches the same kernels: of few small experts they would end before the host
# has launched the next.
DENSE_BYTES_AT_A_TIME = 512 * 2**20


def as_fit(experts: int, values: int, dtype: torch.dtype) -> int:
    """How many of `experts` with `values` each are dense in `dtype` at a time: alike in all chunks but the last."""
    most = max(1, DENSE_BYTES_AT_A_TIME // (values * dtype.itemsize))
    return math.ceil(experts / math.ceil(experts / most))


class Scratch:
    """Dense weights of one chunk of experts, in a buffer that the next chunk overwrites."""

    def __init__(self, projection: ExpertWeights, experts: int, dtype: torch.dtype) -> None:
        """experts: of a chunk, at most."""
        self.storage = projection.weight
        self.dtype = dtype
        # Weights that are dense already are used in place.
        self.in_place = self.storage.kind == "none" and self.storage.dtype == dtype
        size = 0 if self.in_place else experts
        self.buffer = torch.empty(size, *self.storage.shape[1:], dtype=dtype, device=self.storage.device)

    def __call__(self, experts: slice) -> Tensor:
        if self.in_place:
            return self.storage.dense(experts)
        return self.storage.dense(experts, out=self.buffer[: experts.stop - experts.start])

    def chunks(self) -> list[slice]:
        """Of all experts, as many at a time as the buffer holds."""
        experts = self.storage.shape[0]
        size = experts if self.in_place else len(self.buffer)
        return [slice(first, min(first + size, experts)) for first in range(0, experts, size)]
