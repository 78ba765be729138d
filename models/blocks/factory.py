"""How the tensors of a model are made, handed down from a model to its layers and their parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from quant.kinds import STORAGES
from quant.storage import Storage, StorageSpec


@dataclass(frozen=True)
class Factory:
    """Makes empty tensors.

    spec: how frozen matrices are stored. dtype: of everything that isn't quantised. device: may be "meta".
    """

    spec: StorageSpec
    dtype: torch.dtype
    device: torch.device | str

    @property
    def dense(self) -> Factory:
        """For matrices that are never quantised."""
        return replace(self, spec=StorageSpec("none"))

    @property
    def float32(self) -> Factory:
        """For what is neither quantised nor rounded, whatever the model's dtype."""
        return replace(self.dense, dtype=torch.float32)

    def storage(self, *shape: int) -> Storage:
        """A weight [out, in] or [E, out, in]. CausalLM, which knows its name, checks whether `spec` can keep it."""
        return STORAGES[self.spec.kind](self.spec, shape, self.dtype, self.device)

    def empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))

    def full(self, value: float, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, value, dtype=self.dtype, device=self.device))
