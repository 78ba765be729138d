"""The key-value store by which the processes of a run find each other, fresh at every start.

torchrun keeps one store for as long as it lives: processes that it starts again after a failure meet what the dead ones
wrote, and would take their addresses for those of the living. So rank 0 makes up a new prefix for all keys at every
start and hands it to the others. It can't be derived from the environment: torchrun's TORCHELASTIC_RESTART_COUNT counts
what one machine has seen, and the machines' counts may differ.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from parallel.world import World
from quant.common.errors import NibbleError

_PATIENCE = timedelta(minutes=10)  # machines don't start at the same time
_POLL = 0.05  # seconds


def launch_store(world: World, patience: timedelta = _PATIENCE) -> dist.Store:
    """The store that all processes of `world` share, empty. All of them must call it; it waits for all.

    Raises NibbleError naming those that didn't come.
    """
    if world.size == 1:
        return dist.HashStore()  # type: ignore[no-untyped-call, unused-ignore]
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        shared = next(iter(dist.rendezvous("env://", timeout=patience)))[0]
        prefix = _hand_out(shared, world.size, patience) if world.first else _receive(shared, world.rank, patience)
    except (dist.DistError, TimeoutError) as error:
        raise NibbleError(
            f"the {world.size} processes did not all meet at {address} within {patience}: {_first_line(error)}\n"
            "Check that all of them were started, and that MASTER_ADDR and MASTER_PORT are the same and within reach."
        ) from error
    return dist.PrefixStore(prefix, shared)


def _hand_out(shared: dist.Store, size: int, patience: timedelta) -> str:
    """Rank 0: give every other process the prefix.

    A request that is found may be that of a dead process. It does no harm to answer it, since the answer is addressed
    to that request alone; the process that lives writes another, and is waited for.
    """
    prefix, answered = f"nibble/{uuid.uuid4().hex}", dict.fromkeys(range(1, size), b"")
    missing, deadline = set(answered), time.monotonic() + patience.total_seconds()
    while missing:
        for rank in sorted(missing):
            if shared.check([f"nibble/ask/{rank}"]) and (ask := shared.get(f"nibble/ask/{rank}")) != answered[rank]:
                shared.set(f"nibble/answer/{ask.decode()}", prefix)
                answered[rank] = ask
        missing = {rank for rank in missing if not shared.check([f"{prefix}/here/{rank}"])}
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, sorted(missing)[:8])) + (", …" if len(missing) > 8 else "")
            raise TimeoutError(f"rank {ranks} did not come.")
        if missing:
            time.sleep(_POLL)
    return prefix


def _receive(shared: dist.Store, rank: int, patience: timedelta) -> str:
    ask = uuid.uuid4().hex
    shared.set(f"nibble/ask/{rank}", ask)
    shared.wait([f"nibble/answer/{ask}"], patience)
    prefix = shared.get(f"nibble/answer/{ask}").decode()
    shared.set(f"{prefix}/here/{rank}", "")
    return prefix


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
