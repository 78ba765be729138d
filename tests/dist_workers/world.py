"""What the processes of tests/parallel/test_world.py do."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from parallel.mesh import Meshes, make_meshes, mesh_sizes
from parallel.parts import Part, bounds
from parallel.world import World, collectives_within, lost_contact


def together(world: World) -> dict[str, Any]:
    """Sums, maxima, the rows and columns of the meshes, and parts of even and uneven tensors."""
    mine = torch.tensor([1.0, -float(world.rank)])
    total, most = world.sum(mine.clone()), world.max(mine.clone())
    replicate, expert = (2, 2) if world.size == 4 else (1, 1)
    grid = make_meshes(mesh_sizes(world, expert=expert, replicate=replicate), torch.device("cpu"))
    # One copy of the model is cut over all processes here; with replicas over half of them.
    plain = make_meshes(mesh_sizes(world), torch.device("cpu"))
    return {
        "sum": total.tolist(),
        "max": most.tolist(),
        "grid": [grid.dense.get_local_rank("replicate"), grid.part, grid.owner],
        "groups": [grid.parts_group.size(), grid.expert_group.size()],
        "shards": [list(grid.dense_shards().mesh_dim_names or ()), list(grid.expert_shards().mesh_dim_names or ())],
        "parts": [cut(plain, (8, 3), 0), cut(plain, (5, 2), 0), cut(plain, (3, 7), 1), cut(grid, (6, 2), 0)],
        "wrong": wrong_shape(plain),
    }


def cut(meshes: Meshes, shape: tuple[int, int], dim: int) -> list[Any]:
    """Where the part of this process lies, its shape, and whether all parts make up the whole again."""
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    start, stop = bounds(shape[dim], meshes.sizes.parts, meshes.part)
    part = Part(shape, dim, start, stop, meshes.dense, (Replicate(), Shard(dim)))
    local = part.of(whole).contiguous()
    wrapped = part.wrap(local)
    assert wrapped.to_local().data_ptr() == local.data_ptr()  # not copied
    assert part.local_shape == tuple(local.shape)
    return [start, stop, list(local.shape), torch.equal(part.gather(local), whole)]


def wrong_shape(meshes: Meshes) -> str:
    part = Part((4, 2), 0, 0, 2, meshes.dense, (Replicate(), Shard(0)))
    try:
        part.wrap(torch.zeros(3, 2))
    except ValueError as error:
        return str(error)
    return "accepted"


def waits(world: World) -> list[Any]:
    """What is told of a long wait; then one that is longer than the limit, before and after it is limited."""
    told: list[str] = []
    late = world.rank == 1
    assert dist.group.WORLD is not None
    store = dist.group.WORLD.get_group_store()

    def note(text: str) -> None:
        told.append(text)
        store.set(f"told by {world.rank}", text)

    if late:
        store.wait(["told by 0"])
    world.wait(note, "read the rows", log_every=0.1)
    group = dist.new_group()
    with collectives_within(0.1, [group]):
        found = True if late else fails(group)
    time.sleep(0.5 * late)
    return [told[:1] if world.first else [], found, world.sum(torch.ones(1)).item()]


def fails(group: dist.ProcessGroup) -> bool:
    """Whether this process finds out that it is alone in a collective."""
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        return lost_contact(error)
    return False


def one_fails(world: World) -> None:
    """The last one raises; the others wait for it."""
    if world.rank == world.size - 1:
        raise RuntimeError("this one was meant to fail")
    world.wait()


def never_ends(world: World) -> None:
    time.sleep(600)
