"""Runs and conversions whose processes end by SIGKILL in the middle of their work.

`python -m tests.dist_workers.killed` is `python -m train` with kills in the middle of steps: KILLS="1:6,0:10" in the
environment are the rank and the step of each, and KILLS_DONE the folder that remembers which of them have happened.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import train.loop
import train.state.checkpoint
from models.checkpoint.conversion import convert
from quant.storage import StorageSpec
from train.__main__ import main

clip_gradients = train.loop.clip_gradients


def clip_or_die(parameters: Any, max_norm: float | None, step: int, **more: Any) -> float:
    here, done = f"{os.environ['RANK']}:{step}", Path(os.environ["KILLS_DONE"])
    if here in os.environ["KILLS"].split(",") and not (done / here).exists():
        (done / here).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return clip_gradients(parameters, max_norm, step, **more)


def while_it_saves(checkpoint: str, arguments: list[str]) -> int:
    """Dies when the weights of that checkpoint are written, before its state is."""
    write = train.state.checkpoint.write_atomically

    def write_or_die(path: Path, data: bytes) -> None:
        if checkpoint in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    train.state.checkpoint.write_atomically = write_or_die
    return main(arguments)


def while_it_converts(source: str, target: str, calls: int) -> int:
    """Dies when it tells its progress for the calls-th time."""
    told = itertools.count(1)

    def progress(done: int, total: int, what: str) -> None:
        if next(told) == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    convert(source, target, StorageSpec("nf4", True), progress=progress)
    return 0


if __name__ == "__main__":
    train.loop.clip_gradients = clip_or_die
    sys.exit(main())
