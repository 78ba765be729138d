"""How the tensors of a model are made, handed down from a model to its layers and their parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from quant.kinds import new_storage
from quant.storage import Storage, StorageSpec


@dataclass(frozen=True)
class Factory:
    """Makes empty tensors.

    spec: how frozen matrices are stored. dtype: of everything that isn't quantised. device: may be "meta".
    name: the dotted name of the module that is being made, for messages.
    """

    spec: StorageSpec
    dtype: torch.dtype
    device: torch.device | str
    name: str = ""

    def at(self, part: str) -> Factory:
        """That of a part of this module."""
        return replace(self, name=f"{self.name}.{part}" if self.name else part)

    @property
    def dense(self) -> Factory:
        """For matrices that are never quantised."""
        return replace(self, spec=StorageSpec("none"))

    @property
    def float32(self) -> Factory:
        """For what is neither quantised nor rounded, whatever the model's dtype."""
        return replace(self.dense, dtype=torch.float32)

    def storage(self, *shape: int) -> Storage:
        """The module's weight [out, in] or [E, out, in]. Raises NibbleError where `spec` can't keep that shape."""
        return new_storage(self.spec, shape, self.dtype, self.device, f"{self.name}.weight")

    def empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))

    def full(self, value: float, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, value, dtype=self.dtype, device=self.device))
