"""The processes of a run: which of them this is, and what they find out together.

torchrun (or Slurm, see docs/distributed.md) starts one process per device and tells each its rank. A process alone is a
world of one: everything here is then free, and no process group is needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from quant.common.errors import NibbleError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How long a collective may wait for a process that is alive but busy: reading its rows, or its part of a checkpoint.
# Dead processes are found much sooner (parallel/watch.py).
_PATIENCE = timedelta(minutes=60)


@dataclass(frozen=True)
class World:
    """rank: this process among `size`, 0 is the one that reports and writes. local_rank: among those of its machine.
    machines: on how many the processes are, as far as the launcher has said.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    machines: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors of this shape, in place; returns it. Waits for all."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of all processes' values, element by element, in place; returns it. Waits for all."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def wait(self) -> None:
        """Until every process is here."""
        self.sum(torch.zeros(1))


ALONE = World()


def launched_world() -> World:
    """This process among those that its launcher started, by the environment variables that torchrun sets.

    Raises NibbleError where some of them are set and others, or sensible values, are missing.
    """
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise NibbleError(
            f"WORLD_SIZE is set, so this is one of several processes, but {', '.join(missing)} is not.\n"
            "Start them with torchrun --nproc-per-node N -m train …, which sets them all, or unset WORLD_SIZE."
        )
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in _VARIABLES[:3])
        machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))  # of torchrun: how many agents there are
    except ValueError as error:
        raise NibbleError(f"RANK, WORLD_SIZE, LOCAL_RANK and GROUP_WORLD_SIZE must be numbers ({error}).") from error
    if not 0 <= rank < size:
        raise NibbleError(f"RANK is {rank}, WORLD_SIZE {size}: ranks are 0 to WORLD_SIZE - 1.")
    return World(rank, size, local_rank, machines)


@contextlib.contextmanager
def process_group(world: World, device: torch.device, store: dist.Store) -> Iterator[None]:
    """While this is open the processes of `world` can exchange tensors: on CUDA by NCCL, on the host by gloo.

    store: by which they find each other (parallel/store.py).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
