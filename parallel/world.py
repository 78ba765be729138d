"""The processes of a run: which of them this is, and what they reduce and wait for together.

torchrun (or Slurm, see docs/distributed.md) starts one process per device and gives each its rank. A process alone is a
world of one: everything here is then free, and no process group is needed.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from quant.common.errors import NibbleError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_START = timedelta(minutes=10)  # machines don't start at the same time
_POLL = 0.02  # seconds
# Before and after the training a process may be busy for long: with a download, its rows, its part of a checkpoint.
NO_LIMIT = timedelta(days=365)
# In the messages of the errors that a process gets when another one has exited. Gloo's are plain RuntimeErrors.
_GLOO = ("gloo/", "pair closure")
_NCCL = (*_GLOO, "remote process", "timeout", "Timeout", "aborted", "Socket", "peer")


@dataclass(frozen=True)
class World:
    """rank: this process among `size`, 0 is the one that reports and writes. local_rank: among those of its machine.
    machines: on how many the processes are, 1 where the launcher doesn't set GROUP_WORLD_SIZE.
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

    def wait(self, log: Callable[[str], None] = lambda text: None, task: str = "", log_every: float = 60.0) -> None:
        """Wait until every process has called this. Every `log_every` seconds `log` gets a line naming the others'
        `task`."""
        if self.size == 1:
            return
        arrived = dist.all_reduce(torch.zeros(1), async_op=True)
        started = logged = time.monotonic()
        while not arrived.is_completed():
            time.sleep(_POLL)
            if time.monotonic() - logged > log_every:
                logged = time.monotonic()
                log(f"waiting for other processes to {task} ({(logged - started) / 60:.0f} min)")
        arrived.wait()


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


class ProcessLostError(NibbleError):
    """Another process has exited, hangs or is unreachable."""

    exit_code = 1


def lost_contact(error: BaseException) -> bool:
    """Whether a collective, or the store, failed because another process has exited or hangs."""
    if isinstance(error, dist.DistStoreError | dist.DistNetworkError):
        return True
    # NCCL's other errors (a GPU used twice, no memory) are this process's own.
    parts = _NCCL if isinstance(error, dist.DistBackendError) else _GLOO
    return isinstance(error, RuntimeError) and any(part in str(error) for part in parts)


@contextlib.contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """While this is open the processes of `world` can exchange tensors: on CUDA by NCCL, on the host by gloo.

    Raises NibbleError where they don't all meet. After an error the group is left as it is: taking it down could wait
    for processes that wait for this one.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = _store(world)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=NO_LIMIT)
    failed = True
    try:
        yield
        failed = False
    finally:
        if not failed or world.size == 1:
            dist.destroy_process_group()


@contextlib.contextmanager
def collectives_within(seconds: float, groups: Iterable[dist.ProcessGroup] = ()) -> Iterator[None]:
    """While this is open a collective of all processes, or of `groups`, fails when one is waited for any longer."""
    everyone = [group for group in (dist.group.WORLD, *groups) if group is not None]
    for group in everyone:
        group.set_timeout(min(timedelta(seconds=min(seconds, 1e9)), NO_LIMIT))
    try:
        yield
    finally:
        for group in everyone:
            group.set_timeout(NO_LIMIT)


def _store(world: World) -> dist.Store:
    """The store by which the processes find each other, empty at every start."""
    if world.size == 1:
        return dist.HashStore()  # type: ignore[no-untyped-call, unused-ignore]
    try:
        shared = next(iter(dist.rendezvous("env://", timeout=_START)))[0]
        return dist.PrefixStore(_common_prefix(shared, world), shared)
    except (dist.DistError, TimeoutError) as error:
        raise NibbleError(
            f"the {world.size} processes did not all meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"within {_START}: {str(error).strip().partition(chr(10))[0]}\n"
            "Check that all of them were started, and that MASTER_ADDR and MASTER_PORT are the same and within reach."
        ) from error


def _common_prefix(store: dist.Store, world: World) -> str:
    """A prefix for all keys of this start, chosen by rank 0 and sent to every other process at its request.

    torchrun keeps one store over its restarts (torch 2.13), and with it the addresses of processes that have exited.
    TORCHELASTIC_RESTART_COUNT can't be the prefix: it counts what one machine has seen, and the counts may differ. An
    old request does no harm: its answer has a key of its own, and rank 0 waits for the running process.
    """
    if not world.first:
        request = uuid.uuid4().hex
        store.set(f"nibble/request/{world.rank}", request)
        prefix = store.get(f"nibble/answer/{request}").decode()
        store.set(f"{prefix}/here/{world.rank}", "")
        return prefix
    prefix, deadline = f"nibble/{uuid.uuid4().hex}", time.monotonic() + _START.total_seconds()
    for rank in range(1, world.size):
        while not store.check([f"{prefix}/here/{rank}"]):
            if store.check([f"nibble/request/{rank}"]):
                store.set(f"nibble/answer/{store.get(f'nibble/request/{rank}').decode()}", prefix)
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} did not connect.")
            time.sleep(_POLL / 4)
    return prefix
