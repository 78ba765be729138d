"""Several processes of one world on this machine, for tests: torchrun's environment without its agent.

A test names a function of a module in tests/dist_workers/; every process imports it, calls it as function(world, *args)
with a gloo process group open, and its return value comes back as JSON. run_commands calls functions that stand for
commands instead: they open no group, and return an exit code.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

ROOT = Path(__file__).resolve().parent.parent
_TAIL = 3000  # characters of what a process said that a failure shows
_GRACE = 3.0  # seconds that the others have once one process has failed: time to say what they saw
# Seconds that anything a test starts may take: what hangs is to end one day, and a busy machine is no failure.
LIMIT = 900.0
# What a run imports where it needs it.
PRELOADED = (
    "torch.distributed.fsdp", "torch.distributed.checkpoint", "bitsandbytes", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "parallel.checkpoint", "parallel.fsdp", "rich.progress", "tokenizers",
    "train.launched", "train.run",
)  # fmt: skip


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
    with tempfile.TemporaryDirectory() as folder:
        calls = [Call(target, json.dumps(args), f"{folder}/{rank}") for rank in range(size)]
        processes: Sequence[Process]
        if env is None:
            processes = forked_calls(calls)
        else:
            processes = [call.start({**variables, **env}) for call, variables in zip(calls, _ranks(size), strict=True)]
        codes = _ended(processes, timeout, _GRACE)
        if any(code != 0 for code in codes):
            parts = [f"{target} in {size} processes:"]
            for rank, code in enumerate(codes):
                said = "".join(_text(f"{folder}/{rank}.{stream}") for stream in ("out", "err"))[-_TAIL:]
                parts.append(f"--- rank {rank} {'was stopped' if code is None else f'ended with {code}'}:\n{said}")
            raise AssertionError("\n".join(parts))
        return [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def run_commands(
    size: int, target: str, *args: Any, grace: float = 0.0, env: dict[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Calls "package.module:function"(*args), which returns an exit code, in `size` forked processes, as a launcher
    starts a command; of each, by rank, its exit code, standard output and standard error.

    args: JSON. Once one has failed the others are ended `grace` seconds later, as torchrun ends them. env: further
    environment variables. One process alone has no launcher's variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        calls = [Call(target, json.dumps(args), f"{folder}/{rank}", command=True) for rank in range(size)]
        codes = _ended(forked_calls(calls, env or {}), LIMIT, grace)
        done = []
        for rank, code in enumerate(codes):
            out, err = (_text(f"{folder}/{rank}.{stream}") for stream in ("out", "err"))
            done.append(subprocess.CompletedProcess(target, -signal.SIGKILL if code is None else code, out, err))
        return done


def _ranks(size: int) -> list[dict[str, str]]:
    port = free_port()
    return [rank_environment(rank, size, port) for rank in range(size)]


def forked_calls(calls: Sequence[Call], env: dict[str, str] | None = None) -> list[Forked]:
    ranks = [{}] if len(calls) == 1 else _ranks(len(calls))
    return [_nursery().start(call, {**variables, **(env or {})}) for call, variables in zip(calls, ranks, strict=True)]


def _ended(processes: Sequence[Process], timeout: float, grace: float) -> list[int | None]:
    """The exit codes of processes that are all gone by then."""
    try:
        return _wait(processes, time.monotonic() + timeout, grace)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _text(path: str) -> str:
    """What a process wrote; one that was stopped soon may not have made the file yet."""
    return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else ""


class Process(Protocol):
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> Any: ...


def _wait(processes: Sequence[Process], deadline: float, grace: float) -> list[int | None]:
    """The exit codes; None for a process that still runs at the deadline, which a failure of another brings near."""
    while True:
        codes = [process.poll() for process in processes]
        now = time.monotonic()
        if None not in codes or now > deadline:
            return codes
        if any(codes):
            deadline = min(deadline, now + grace)
        time.sleep(0.02)


@dataclass(frozen=True)
class Call:
    """What one process is to do. path: of its result (.json) and of what it says (.out, .err). command: the target
    returns an exit code, and opens the process group itself if it needs one.
    """

    target: str
    args: str
    path: str
    command: bool = False

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
    for module in PRELOADED:
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
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{call['path']}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.close(0)
        os.environ.update(call["variables"])
        # Ctrl-C and a closed terminal do here what they usually do. In the background of a script they are ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if call["command"]:
            code = _function(call["target"])(*json.loads(call["args"]))
        else:
            main(call["target"], call["args"], f"{call['path']}.json")
            code = 0
    except BaseException:  # noqa: BLE001  the process ends here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _function(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def main(target: str, args: str, result: str) -> None:
    """One process of run_processes."""
    import torch

    from parallel.world import launched_world, process_group

    world = launched_world()
    with process_group(world, torch.device("cpu")):
        value = _function(target)(world, *json.loads(args))
        world.wait()  # nobody's sockets close while another still computes
    Path(result).write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    nursery() if sys.argv[1:] == ["nursery"] else main(*sys.argv[1:])
