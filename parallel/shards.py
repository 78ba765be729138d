"""What a process holds of a model: all of it, or parts that FSDP2 gathers when they are needed.

FSDP2 and DTensor are imported only where a model is cut: they take a second, and a run of one process has no use for
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.decoder import CausalLM
from parallel.mesh import Meshes
from parallel.parts import Part

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class Shards:
    """What this process holds of a model. With no meshes it holds everything, and every method does next to nothing.

    parts: by parameter name; a parameter that isn't in it is whole.
    """

    def __init__(self, model: CausalLM, meshes: Meshes | None = None, parts: dict[str, Part] | None = None) -> None:
        self.model, self.meshes, self.parts = model, meshes, parts or {}
        self._local: dict[str, nn.Parameter] | None = None
        self._names: dict[int, str] = {}  # of the model's tensors, which live as long as the model, by their id

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by name, in the model's order: of each tensor what this process holds, an ordinary tensor.

        Optimiser and clipping work on these, so that neither needs to know of other processes. They share their memory
        with the model's. Ask for them when the model's tensors are in place (parallel/load.py).
        """
        if self._local is None:
            self.reshard()
            self._local = {
                name: nn.Parameter(local_tensor(parameter)) if is_cut(parameter) else parameter
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }
        return list(self._local.items())

    @property
    def replicated(self) -> frozenset[str]:
        """The trained tensors that every process has whole although the model is cut."""
        return frozenset(name for name, _ in self.parameters if self.meshes is not None and name not in self.parts)

    def before_pass(self, last: bool) -> None:
        """Before each backward pass of a step. The copies of a model are summed with each other after the last one."""
        if self.meshes is not None and self.meshes.sizes.replicate > 1:
            cast("FSDPModule", self.model).set_requires_all_reduce(last)

    def take_gradients(self) -> None:
        """After the last backward pass of a step: the gradients of `parameters`, summed over all processes."""
        if self.meshes is None:
            return
        model = dict(self.model.named_parameters())
        whole: list[Tensor] = []
        for name, local in self.parameters:
            parameter = model[name]
            if parameter is local:
                if local.grad is not None:
                    whole.append(local.grad)
                continue
            gradient, parameter.grad = parameter.grad, None
            local.grad = None if gradient is None else local_tensor(gradient)
        if whole:
            # One message for all of them. Each process has the sum over its own rows.
            flat = torch.cat([gradient.flatten() for gradient in whole])
            dist.all_reduce(flat)
            for gradient, summed in zip(whole, flat.split([g.numel() for g in whole]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def sum_of_parts(self, values: Tensor) -> Tensor:
        """The sum of `values` over the processes that hold one copy of the model together, in place."""
        if self.meshes is not None:
            dist.all_reduce(values, group=self.meshes.parts_group)
        return values

    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Copy this process's part of `whole` into a parameter of the model."""
        with torch.no_grad():
            part = self._part_of(parameter)
            local_tensor(parameter).copy_(whole if part is None else part.of(whole))

    def whole(self, parameter: Tensor) -> Tensor:
        """A parameter of the model as one tensor, on every process: to be called on all of them, for each in turn."""
        part = self._part_of(parameter)
        return parameter.detach() if part is None else part.gather(local_tensor(parameter))

    def reshard(self) -> None:
        """Free what is gathered, so that the model's parameters are this process's parts."""
        if self.meshes is None:
            return
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _part_of(self, parameter: Tensor) -> Part | None:
        if not is_cut(parameter):
            return None
        if id(parameter) not in self._names:
            self._names = {id(other): name for name, other in self.model.named_parameters()}
        return self.parts[self._names[id(parameter)]]


def is_cut(tensor: Tensor) -> bool:
    """Whether a tensor of the model is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "to_local")


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor of the model, sharing its memory."""
    detached = tensor.detach()
    return cast("DTensor", detached).to_local() if is_cut(detached) else detached
