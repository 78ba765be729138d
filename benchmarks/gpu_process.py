"""The processes of `benchmarks.gpu`: what they print as they print it, how they end, and how long they may take."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_cases import OUT_OF_MEMORY, Case, Request

ROOT = Path(__file__).resolve().parent.parent
# What can't be built and warmed up in this time isn't started.
LEAST_SECONDS = 10.0


@dataclass
class Outcome:
    """A case's result, or why there is none. group: the name of its group."""

    group: str
    case: Case
    peer: bool
    result: dict[str, Any] | None
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.group}: {self.case.name}"


def deadlines(seconds: float, shares: Sequence[float]) -> Iterator[float]:
    """When, by time.monotonic, each of several things has to end, one after the other in `seconds` from now on: what
    one leaves of its share is there for those after it.
    """
    began, passed = time.monotonic(), 0.0
    for share in shares:
        passed += share
        yield began + seconds * passed / sum(shares)


def lines_of(
    command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """Run a command: ("line", text) for each line of its standard output as it comes, and last ("end", reason).

    reason is "" for a clean end, otherwise what happened; the command is killed after `limit` seconds, with
    what it has started (models/use_kernels.py tries kernels in a process).
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    out: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    assert process.stdout is not None and process.stderr is not None

    def read(stream: Any) -> None:
        for line in stream:
            out.put(line.rstrip("\n"))
        out.put(None)

    threads = [
        threading.Thread(target=read, args=(process.stdout,), daemon=True),
        threading.Thread(target=lambda stream: said.extend(stream), args=(process.stderr,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit
    try:
        while True:
            try:
                line = out.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                yield "end", f"stopped after {limit:.0f} s"
                return
            if line is None:
                break
            yield "line", line
        code = process.wait()
        threads[1].join(timeout=60)
        yield "end", "" if code == 0 else _reason(code, said)
    finally:
        if process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()


def _reason(code: int, said: Sequence[str]) -> str:
    """The last line of a traceback, or the exit code."""
    text = "".join(said)
    if "OutOfMemoryError" in text or "out of memory" in text:
        return OUT_OF_MEMORY
    lines = [line.strip() for line in said if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("File", "raise"))]
    return (errors or lines or [f"exit code {code}"])[-1][:160]


def run_cases(
    command: Sequence[str], request: Request, deadline: float, environment: Mapping[str, str] | None = None
) -> list[Outcome]:
    """The cases of the request's group by a process that `command` and the request start; by another one for those
    left if it dies of one case.
    """
    group = request.group
    left, found = list(group.cases), []

    def ended(result: dict[str, Any] | None, reason: str) -> None:
        found.append(Outcome(group.name, left.pop(0), group.peer, result, reason))

    while left:
        limit = deadline - time.monotonic()
        if limit < LEAST_SECONDS:
            ended(None, "not run: its share of the time was over")
            continue
        built = False
        given = replace(request, group=replace(group, cases=tuple(left))).dumps()
        for kind, text in lines_of([*command, given], limit, environment):
            if kind == "line" and text.startswith("{"):
                answer = json.loads(text)
                if "built" in answer:
                    built = True
                elif left:
                    ended(answer["result"], answer["reason"])
            elif kind == "end" and left:
                text = text or "the process ended without a result"
                ended(None, text)
                while left and not built:
                    ended(None, text)
    return found
