"""Which part of a whole tensor a process holds, and the way from one to the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class Cut:
    """Indices start .. stop along dimension `dim` of a whole tensor of `shape`."""

    shape: tuple[int, ...]
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Part(Cut):
    """The cut of a tensor that this process holds.

    mesh, placements: the same for torch's DTensor, over all processes; where a tensor is replicated, every process of
    a dimension of the mesh holds the same.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """This process's part of `whole`, a view."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def wrap(self, local: Tensor) -> DTensor:
        """The whole tensor as a DTensor, of which `local` (of local_shape, not copied) is this process's part."""
        if tuple(local.shape) != self.local_shape:
            raise ValueError(f"a part of {self.local_shape} is held, not {tuple(local.shape)}")
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        shape = torch.Size(self.shape)
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def gather(self, local: Tensor) -> Tensor:
        """The whole tensor, on every process. All of them must call it."""
        return self.wrap(local).full_tensor()


def bounds(size: int, parts: int, index: int) -> tuple[int, int]:
    """Where part `index` of `parts` of a dimension begins and ends: as torch.chunk cuts, the last ones may be short."""
    width = -(-size // parts)
    return min(index * width, size), min((index + 1) * width, size)
