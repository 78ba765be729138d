"""The processes of a run in rows and columns: who holds which part of what.

world = replicate × expert × shard. Each process computes other rows of the data. What it holds of the weights:

    replicate   copies: as many groups hold the whole model (HSDP); gradients are summed over them
    expert      the experts are distributed: a process owns the same range of them in every layer, and tokens travel
    shard       what is owned is cut once more, and gathered layer by layer when it is needed (FSDP)

Everything but the experts is cut over expert × shard together, so that a process holds 1 / (expert × shard) of every
weight either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from parallel.world import World
from quant.common.errors import NibbleError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class MeshSizes:
    replicate: int = 1
    expert: int = 1
    shard: int = 1

    @property
    def parts(self) -> int:
        """In how many parts a weight is cut."""
        return self.expert * self.shard


def mesh_sizes(world: World, shard: int | None = None, expert: int = 1, replicate: int = 1) -> MeshSizes:
    """The sizes that config section `parallel` asks for; shard None is what is left of the world.

    Raises NibbleError where they don't make up the world.
    """
    asked = f"parallel.expert {expert} × parallel.replicate {replicate}"
    if shard is None:
        if world.size % (expert * replicate):
            raise NibbleError(
                f"{asked}: {world.size} processes can't be divided by {expert * replicate}.\n"
                f"Start a multiple of {expert * replicate} processes, or lower parallel.expert or parallel.replicate."
            )
        shard = world.size // (expert * replicate)
    if (wanted := replicate * expert * shard) != world.size:
        started = "1 process was" if world.size == 1 else f"{world.size} processes were"
        raise NibbleError(
            f"parallel.shard {shard} × {asked} is {wanted}, but {started} started.\n"
            f"Start {wanted} (torchrun --nproc-per-node {wanted} -m train … on one machine), or leave parallel.shard"
            " out: it is then what the others leave."
        )
    return MeshSizes(replicate, expert, shard)


@dataclass(frozen=True)
class Meshes:
    """The same processes as two meshes, rank order row by row.

    dense: [replicate, parts], for everything but the experts. experts: [replicate, expert, shard].
    """

    sizes: MeshSizes
    dense: DeviceMesh
    experts: DeviceMesh

    @property
    def part(self) -> int:
        """The number of this process among those that hold one copy of the model together."""
        return self.dense.get_local_rank("part")

    @property
    def owner(self) -> int:
        """Which of the `expert` ranges of experts this process owns."""
        return self.experts.get_local_rank("expert")

    @property
    def parts_group(self) -> dist.ProcessGroup:
        """The processes that hold one copy of the model together."""
        return self.dense.get_group("part")

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """The processes between which tokens travel to their experts."""
        return self.experts.get_group("expert")

    @property
    def groups(self) -> set[dist.ProcessGroup]:
        """All groups of processes that this one belongs to."""
        return {*self.dense.get_all_groups(), *self.experts.get_all_groups()}

    def dense_shards(self) -> DeviceMesh:
        """What fully_shard takes for everything but the experts: [part], or [replicate, part] (HSDP)."""
        return self.dense["part"] if self.sizes.replicate == 1 else self.dense

    def expert_shards(self) -> DeviceMesh:
        """The same for the experts that this process and its column own: [shard] or [replicate, shard]."""
        return self.experts["shard"] if self.sizes.replicate == 1 else self.experts["replicate", "shard"]


def make_meshes(sizes: MeshSizes, device: torch.device) -> Meshes:
    """Needs a process group of sizes.replicate × sizes.parts processes. All of them must call it."""
    from torch.distributed.device_mesh import init_device_mesh

    dense = init_device_mesh(device.type, (sizes.replicate, sizes.parts), mesh_dim_names=("replicate", "part"))
    shape = (sizes.replicate, sizes.expert, sizes.shard)
    experts = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "expert", "shard"))
    return Meshes(sizes, dense, experts)
