"""Processes that fail, die or stop beside others, as tests/test_watch.py wants them.

All scenes run at the same time, since they mostly wait, and torch is imported once: their processes are forked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel import lifesigns
from parallel.watch import Watch, watched
from parallel.world import launched_world, process_group
from quant.common.errors import NibbleError
from tests.processes import free_port, rank_environment
from train.__main__ import describe

DEADLINE = 60.0  # seconds


def steps(watch: Watch, count: int = 10**9, before: Callable[[int], None] = lambda step: None) -> None:
    """A run that does nothing but wait for the others at every step."""
    with process_group(watch.world, torch.device("cpu"), watch.store), watch.errors():
        for step in range(count):
            before(step)
            assert watch.world.sum(torch.ones(1)).item() == watch.world.size
            time.sleep(0.02)


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def at(step: int, action: Callable[[], None]) -> Callable[[int], None]:
    return lambda now: action() if now == step else None


def fail(text: str = "data.train: row 7 is broken.\nMend it.") -> None:
    raise NibbleError(text)


def killed_in_a_step(watch: Watch) -> int:
    watch.hint = lambda: "The last checkpoint is step-3."
    steps(watch, before=at(5, die) if watch.world.rank == 2 else lambda step: None)
    return 0


def killed_while_others_sleep(watch: Watch) -> int:
    time.sleep(1)
    if watch.world.rank == 1:
        die()
    time.sleep(DEADLINE)
    return 0


def stopped(watch: Watch) -> int:
    watch.lost_after = 3.0
    steps(watch, before=at(5, lambda: die(signal.SIGSTOP)) if watch.world.rank == 1 else lambda step: None)
    return 0


def store_stopped(watch: Watch) -> int:
    watch.lost_after = 3.0
    steps(watch, before=at(5, lambda: die(signal.SIGSTOP)) if watch.world.rank == 0 else lambda step: None)
    return 0


def store_killed(watch: Watch) -> int:
    steps(watch, before=at(5, die) if watch.world.rank == 0 else lambda step: None)
    return 0


def store_killed_while_others_sleep(watch: Watch) -> int:
    time.sleep(1)
    if watch.world.rank == 0:
        die()
    time.sleep(DEADLINE)
    return 0


def launcher_killed(watch: Watch) -> int:
    steps(watch)
    return 0


def failed_in_a_step(watch: Watch) -> int:
    steps(watch, before=at(5, fail) if watch.world.rank == 2 else lambda step: None)
    return 0


def failed_while_others_sleep(watch: Watch) -> int:
    time.sleep(1)
    if watch.world.rank == 1:
        fail()
    time.sleep(DEADLINE)
    return 0


def first_failed(watch: Watch) -> int:
    steps(watch, before=at(5, fail) if watch.world.rank == 0 else lambda step: None)
    return 0


def failed_everywhere(watch: Watch) -> int:
    time.sleep(0.3 * (2 - watch.world.rank))  # rank 0 is the last to find out
    fail()
    return 0


def failed_before_the_group(watch: Watch) -> int:
    if watch.world.rank == 1:
        fail("device 'cuda:1' is not here.")
    steps(watch)
    return 0


def unforeseen(watch: Watch) -> int:
    def divide() -> None:
        _ = 1 // 0

    steps(watch, before=at(5, divide) if watch.world.rank == 1 else lambda step: None)
    return 0


def interrupted(watch: Watch) -> int:
    def interrupt() -> None:
        raise KeyboardInterrupt

    steps(watch, before=at(5, interrupt) if watch.world.rank == 1 else lambda step: None)
    return 0


def terminated(watch: Watch) -> int:
    """As torchrun does it: one dies, and the launcher terminates the rest at once."""
    time.sleep(1)
    if watch.world.rank == 1:
        die()
    die(signal.SIGTERM)
    time.sleep(DEADLINE)
    return 0


def terminated_by_hand(watch: Watch) -> int:
    time.sleep(1)
    if watch.world.rank == 1:
        die(signal.SIGTERM)
    time.sleep(DEADLINE)
    return 0


def ended_at_different_times(watch: Watch) -> int:
    watch.lost_after = 1.5
    steps(watch, 3)
    time.sleep((0, 3, 1)[watch.world.rank])
    return 0


def failed_at_the_end(watch: Watch) -> int:
    steps(watch, 3)
    if watch.world.rank == 1:
        time.sleep(2)
        fail()
    return 0


def killed_at_the_end(watch: Watch) -> int:
    steps(watch, 3)
    if watch.world.rank == 1:
        time.sleep(2)
        die()
    return 0


def killed_elsewhere(watch: Watch) -> int:
    watch.lost_after = 3.0
    return killed_in_a_step(watch)


def failed_elsewhere(watch: Watch) -> int:
    return failed_in_a_step(watch)


def started_before(watch: Watch) -> int:
    steps(watch, before=at(3, die))
    return 0


def started_again(watch: Watch) -> int:
    """Where the store holds what an earlier start left in it."""
    if watch.world.rank == 1:
        time.sleep(0.5)  # the others would find the old addresses first
    steps(watch, 5)
    return 0


SCENES = {
    scene.__name__: (scene, size)
    for scene, size in [
        (killed_in_a_step, 4),
        (killed_while_others_sleep, 3),
        (stopped, 3),
        (store_stopped, 3),
        (store_killed, 3),
        (store_killed_while_others_sleep, 3),
        (launcher_killed, 3),
        (failed_in_a_step, 4),
        (failed_while_others_sleep, 3),
        (first_failed, 2),
        (failed_everywhere, 3),
        (failed_before_the_group, 3),
        (unforeseen, 2),
        (interrupted, 2),
        (terminated, 3),
        (terminated_by_hand, 2),
        (ended_at_different_times, 3),
        (failed_at_the_end, 3),
        (killed_at_the_end, 3),
        (killed_elsewhere, 3),
        (failed_elsewhere, 3),
        (started_again, 3),
    ]
}


def process(name: str, size: int, rank: int, port: int, folder: Path) -> int:
    """What a process of a scene does; its exit code."""
    os.environ.update(rank_environment(rank, size, port))
    if name.endswith("_elsewhere") and rank == size - 1:
        here = lifesigns.whereabouts
        lifesigns._place = lambda: "another machine"
        elsewhere = dataclasses.replace(here(), host="node-b")
        from parallel import watch as module

        module.whereabouts = lambda: elsewhere
    log = folder / f"{name}-{rank}.log"
    if name == "unforeseen":
        log.touch()

    if name == "started_again":
        alike = lambda: watched(launched_world(), started_before, describe, lambda text: None)  # noqa: E731
        os.waitpid(forked(alike, folder / f"{name}-{rank}.before"), 0)

    def body(watch: Watch) -> int:
        def write(text: str) -> None:
            log.write_text(text)

        watch.log = write
        return SCENES[name][0](watch)

    said = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    return watched(launched_world(), body, lambda error: describe(error, log), said)


def forked(work: Callable[[], int], output: Path) -> int:
    """Number of a new process that does `work` and says it to a file."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        streams = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(streams, 1)
        os.dup2(streams, 2)
        code = work()
    except BaseException:  # noqa: BLE001  it goes no further than this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def store_server(port: int, size: int) -> int:
    """The store as torchrun keeps it: outside the processes that use it."""
    store = dist.TCPStore("127.0.0.1", port, size, True, wait_for_workers=False, multi_tenant=True)
    assert store.port == port
    time.sleep(DEADLINE)
    return 0


def main(folder: Path) -> dict[str, Any]:
    started: dict[int, tuple[str, int]] = {}
    ports, servers, begun = {}, {}, {}
    for name, (_, size) in SCENES.items():
        ports[name] = free_port()
        if name in ("launcher_killed", "started_again"):
            servers[name] = forked(
                lambda name=name, size=size: store_server(ports[name], size), folder / f"{name}.store"
            )
    time.sleep(0.5)
    for name, (_, size) in SCENES.items():
        if name in servers:
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        for rank in range(size):
            work = lambda name=name, size=size, rank=rank: process(name, size, rank, ports[name], folder)  # noqa: E731
            started[forked(work, folder / f"{name}-{rank}.out")] = (name, rank)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        begun[name] = time.monotonic()
    results: dict[str, Any] = {
        name: {"codes": [None] * size, "pids": [0] * size, "seconds": 0.0} for name, (_, size) in SCENES.items()
    }
    for pid, (name, rank) in started.items():
        results[name]["pids"][rank] = pid
    left, deadline, launcher = dict(started), time.monotonic() + DEADLINE - 5, time.monotonic() + 5
    while left and time.monotonic() < deadline:
        if "launcher_killed" in servers and time.monotonic() > launcher:
            os.kill(servers.pop("launcher_killed"), signal.SIGKILL)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in left:
            name, rank = left.pop(pid)
            results[name]["codes"][rank] = os.waitstatus_to_exitcode(status)
            results[name]["seconds"] = time.monotonic() - begun[name]
        # Nobody ends one that was stopped, but torchrun.
        for other, (name, _) in list(left.items()):
            if name.endswith("stopped") and sum(of == name for of, _ in left.values()) == 1:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01 if pid == 0 else 0)
    for pid in (*left, *servers.values()):
        os.kill(pid, signal.SIGKILL)
    for name, (_, size) in SCENES.items():
        results[name]["said"] = [(folder / f"{name}-{rank}.out").read_text(errors="replace") for rank in range(size)]
        logs = [folder / f"{name}-{rank}.log" for rank in range(size)]
        results[name]["logs"] = [log.read_text() if log.exists() else "" for log in logs]
    return results


if __name__ == "__main__":
    where = Path(sys.argv[1])
    (where / "results.json").write_text(json.dumps(main(where)))
