"""Several processes of one world on this machine, for tests: torchrun's environment without its agent.

A test names a function of a module in tests/dist_workers/; every process imports it, calls it as function(world, *args)
with a gloo process group open, and its return value comes back as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

ROOT = Path(__file__).resolve().parent.parent
_TAIL = 3000  # characters of what a process said that a failure shows
_GRACE = 3.0  # seconds that the others have once one process has failed: time to say what they saw
# Seconds that anything a test starts may take: what hangs is to end one day, and a busy machine is no failure.
LIMIT = 900.0


def free_port() -> int:
    """A port of the loopback address that nobody listens on now, nor is given to by chance before it is used: it lies
    below those that the system hands out (from 32768 on Linux, from 49152 elsewhere).
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set for the process of this rank, all of them on this machine."""
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


def run_processes(
    size: int, target: str, *args: Any, timeout: float = LIMIT, env: dict[str, str] | None = None
) -> list[Any]:
    """Runs "package.module:function" in `size` processes of one world; what each returned, by rank.

    args and results are JSON. With `env` the processes are started afresh, with these variables; without, they are
    forked from one that has imported everything already, which saves each of them seven seconds. Raises AssertionError
    with the end of what every process said where one of them fails or is not done within `timeout` seconds; all are
    gone by then.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [rank_environment(rank, size, port) for rank in range(size)]
        calls = [Call(target, json.dumps(args), f"{folder}/{rank}") for rank in range(size)]
        processes: Sequence[Process]
        if env is None:
            processes = [_nursery().start(call, variables) for call, variables in zip(calls, ranks, strict=True)]
        else:
            processes = [call.start({**variables, **env}) for call, variables in zip(calls, ranks, strict=True)]
        try:
            codes = _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(code != 0 for code in codes):
            parts = [f"{target} in {size} processes:"]
            for rank, code in enumerate(codes):
                path = Path(folder, f"{rank}.err")  # one that was stopped soon may not have made it yet
                said = path.read_text(encoding="utf-8", errors="replace")[-_TAIL:] if path.exists() else ""
                parts.append(f"--- rank {rank} {'was stopped' if code is None else f'ended with {code}'}:\n{said}")
            raise AssertionError("\n".join(parts))
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


class Process(Protocol):
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> Any: ...


def _wait(processes: Sequence[Process], deadline: float) -> list[int | None]:
    """The exit codes; None for a process that still runs at the deadline, which a failure of another brings near."""
    while True:
        codes = [process.poll() for process in processes]
        now = time.monotonic()
        if None not in codes or now > deadline:
            return codes
        if any(codes):
            deadline = min(deadline, now + _GRACE)
        time.sleep(0.02)


@dataclass(frozen=True)
class Call:
    """What one process is to do. path: of its result (.json) and of what it says (.err)."""

    target: str
    args: str
    path: str

    def start(self, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        """In a process of its own."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        command = [sys.executable, "-m", "tests.processes", self.target, self.args, f"{self.path}.json"]
        with Path(f"{self.path}.err").open("wb") as errors:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=errors, stderr=errors)


class Forked:
    """A process that the nursery has forked; it writes the exit code to a file when it has ended."""

    def __init__(self, pid: int, code: Path) -> None:
        self.pid, self._code = pid, code

    def poll(self) -> int | None:
        text = self._code.read_text() if self._code.exists() else ""
        return int(text) if text else None

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.005)
        return code


class Nursery:
    """A process with torch and all of nibble in memory, and one thread, that forks others."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.processes", "nursery"], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        )  # fmt: skip

    def start(self, call: Call, variables: dict[str, str]) -> Forked:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({**asdict(call), "variables": variables}), file=self._process.stdin, flush=True)
        return Forked(int(self._process.stdout.readline()), Path(f"{call.path}.code"))


@functools.cache
def _nursery() -> Nursery:
    """One for all tests of this process; it ends with it, when its standard input is closed."""
    return Nursery()


def nursery() -> None:
    """The work of a Nursery: a line of JSON for each process to fork, answered by its pid."""
    for module in ("torch.distributed.fsdp", "torch.distributed.checkpoint", "bitsandbytes", "train.run"):
        importlib.import_module(module)
    children: dict[int, Path] = {}
    requests = os.fdopen(0, "rb", buffering=0)
    while True:
        if select.select([requests], [], [], 0.01)[0]:
            line = requests.readline()
            if not line:
                return
            call = json.loads(line)
            child = os.fork()
            if child == 0:
                _work(call)
            children[child] = Path(f"{call['path']}.code")
            print(child, flush=True)
        for child in list(children):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code, path = os.waitstatus_to_exitcode(status), children.pop(child)
                if path.parent.exists():
                    path.with_suffix(".partial").write_text(str(code))
                    path.with_suffix(".partial").rename(path)


def _work(call: dict[str, Any]) -> NoReturn:
    """What a forked process does."""
    code = 1
    try:
        errors = os.open(f"{call['path']}.err", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(errors, stream)
        os.close(0)
        os.environ.update(call["variables"])
        main(call["target"], call["args"], f"{call['path']}.json")
        code = 0
    except BaseException:  # noqa: BLE001  the process ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(target: str, args: str, result: str) -> None:
    """One process of run_processes."""
    import torch

    from parallel.world import launched_world, process_group

    module, _, function = target.partition(":")
    world = launched_world()
    with process_group(world, torch.device("cpu")):
        value = getattr(importlib.import_module(module), function)(world, *json.loads(args))
        world.wait()  # nobody's sockets close while another still computes
    Path(result).write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    nursery() if sys.argv[1:] == ["nursery"] else main(*sys.argv[1:])
