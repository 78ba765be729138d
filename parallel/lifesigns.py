"""Which of the other processes are still there: by their signs of life in the store, and by what the system knows.

Silence is measured by the clock of the one who listens, in what it has seen itself: machines' clocks differ, and a
process that was stopped for a while must not take its own absence for that of the others.
"""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from parallel.world import World

FINISHED = b"finished"  # the last sign of life
_WATCHED = 64  # how many others a process watches: the work must not grow with the square of the world
_ABSENT = 2.0  # seconds; signs of life are read much more often
_ENDED = ("Z", "X")  # states of proc(5): ended, only not collected by its parent


@dataclass(frozen=True)
class Whereabouts:
    """host: the machine's name, for people. place: equal for two processes that see each other's numbers, which those
    in containers of one machine may not. started: tells a process from a later one that got its number.
    """

    host: str
    place: str
    pid: int
    started: str

    @property
    def here(self) -> bool:
        """Whether this process can look at that one itself."""
        return bool(self.started) and self.place == _place()

    def ended(self) -> bool:
        """True when it certainly runs no more. Only for one that is `here`."""
        return _started(self.pid) not in (self.started, None)


def whereabouts() -> Whereabouts:
    """Those of this process."""
    return Whereabouts(platform.node() or "?", _place(), os.getpid(), _started(os.getpid()) or "")


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""  # not Linux


def _started(pid: int) -> str | None:
    """When a process started, in the system's clock ticks; "" where none of that number runs, None if unknown."""
    try:
        # The second field is the program's name in brackets, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    except OSError:
        return None
    return "" if fields[0] in _ENDED else fields[19]


class Others:
    """What a process knows of the rest of its world from the store and, on its own machine, from the system.

    listen is called by one thread, everything else by others.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._everyone = [rank for rank in range(world.size) if rank != world.rank]
        self._watched = [(world.rank + i) % world.size for i in range(1, min(world.size, _WATCHED + 1))]
        self.known: dict[int, Whereabouts] = {}
        self.finished: set[int] = set()
        self._beats: dict[int, bytes] = {}
        self._silent = dict.fromkeys(self._watched, 0.0)  # seconds
        self._listened = time.monotonic()
        self._rounds = 0
        self._ended_at: dict[int, int] = {}  # the round in which a process was first seen to have ended

    def meet(self, store: dist.Store, me: Whereabouts) -> None:
        """Say where this process is, and wait until those that it watches have said the same."""
        store.set(f"alive/{self._world.rank}", "0")
        store.set(f"who/{self._world.rank}", json.dumps(asdict(me)))
        store.wait([f"who/{rank}" for rank in self._watched])
        self.listen(store, everyone=False)

    def listen(self, store: dist.Store, everyone: bool) -> None:
        """Read the signs of life of those that are watched, or of all."""
        for rank in self._everyone if everyone else self._watched:
            if rank not in self.known and store.check([f"who/{rank}"]):
                self.known[rank] = Whereabouts(**json.loads(store.get(f"who/{rank}")))
        now = time.monotonic()
        # What lies between two rounds beyond the usual is this process's own absence, or the store's.
        passed, self._listened = min(now - self._listened, _ABSENT), now
        ranks = list(self.known)
        beats = dict(zip(ranks, store.multi_get([f"alive/{rank}" for rank in ranks]), strict=True)) if ranks else {}
        for rank, silent in self._silent.items():
            same = beats.get(rank) == self._beats.get(rank)
            self._silent[rank] = silent + passed if same else 0.0
        self._beats = beats
        self.finished |= {rank for rank, beat in beats.items() if beat == FINISHED}
        self._rounds += 1

    def all_finished(self) -> bool:
        return len(self.finished) == len(self._everyone)

    def first_here(self, without: int | None = None) -> bool:
        """Whether this process has the lowest rank of those on its machine; `without`: one that doesn't count."""
        here = [rank for rank, there in list(self.known.items()) if there.here and rank != without]
        return self._world.rank < min(here, default=self._world.size)

    def lost(self, lost_after: float, answered: bool) -> tuple[int, str] | None:
        """The rank of a process that is gone without having finished, and what is known of that.

        answered: the store does. Then the last thing that a process wrote before it ended gets the time to be read.
        """
        for rank in self._watched:
            if rank in self.finished:
                continue
            there = self.known.get(rank)
            if there is not None and there.here and there.ended():
                if not answered or self._rounds >= self._ended_at.setdefault(rank, self._rounds) + 2:
                    return rank, "its process ended without a word, as when it is killed or out of memory."
            elif self._silent[rank] > lost_after:
                return rank, f"no sign of life for {self._silent[rank]:.0f} s."
        return None
