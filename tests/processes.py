"""Several processes of one world on this machine, for tests: torchrun's environment without its agent.

A test names a function of a module in tests/dist_workers/; every process imports it, calls it as function(world, *args)
with a gloo process group open, and its return value comes back as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_TAIL = 3000  # characters of what a process said that a failure shows
_GRACE = 3.0  # seconds that the others have once one process has failed: time to say what they saw


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set for the process of this rank, all of them on this machine."""
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


def run_processes(
    size: int, target: str, *args: Any, timeout: float = 120, env: dict[str, str] | None = None
) -> list[Any]:
    """Runs "package.module:function" in `size` processes of one world; what each returned, by rank.

    args and results are JSON. Raises AssertionError with the end of what every process said where one of them fails or
    is not done within `timeout` seconds; all are gone by then.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            variables = {**os.environ, "OMP_NUM_THREADS": "1", **rank_environment(rank, size, port), **(env or {})}
            command = [sys.executable, "-m", "tests.processes", target, json.dumps(args), f"{folder}/{rank}.json"]
            with Path(folder, f"{rank}.err").open("wb") as errors:
                started = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=errors, stderr=errors)
            processes.append(started)
        try:
            codes = _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(code != 0 for code in codes):
            parts = [f"{target} in {size} processes:"]
            for rank, code in enumerate(codes):
                said = Path(folder, f"{rank}.err").read_text(encoding="utf-8", errors="replace")[-_TAIL:]
                parts.append(f"--- rank {rank} {'was stopped' if code is None else f'ended with {code}'}:\n{said}")
            raise AssertionError("\n".join(parts))
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    """The exit codes; None for a process that still runs at the deadline, which a failure of another brings near."""
    while True:
        codes = [process.poll() for process in processes]
        now = time.monotonic()
        if None not in codes or now > deadline:
            return codes
        if any(codes):
            deadline = min(deadline, now + _GRACE)
        time.sleep(0.02)


def main(target: str, args: str, result: str) -> None:
    """One process of run_processes."""
    import torch
    import torch.distributed as dist

    from parallel.world import launched_world, process_group

    module, _, function = target.partition(":")
    world = launched_world()
    store = next(iter(dist.rendezvous("env://")))[0]
    with process_group(world, torch.device("cpu"), store):
        value = getattr(importlib.import_module(module), function)(world, *json.loads(args))
        world.wait()  # nobody's sockets close while another still computes
    Path(result).write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
