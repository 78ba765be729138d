"""Lines for the terminal, which may go away while a run goes on: `| head`, a dead `tee`, a closed window."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def say(text: str, stream: TextIO) -> None:
    """Print a line at once. Where nobody can read it any more, nothing happens: that is no reason to end a run."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Send what `stream` still holds, and all that is to come, nowhere; Python would stumble over it when it exits."""
    with contextlib.suppress(OSError, ValueError):  # not a file of the system's, or closed
        target = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, target)
        os.close(nowhere)


def flush_streams() -> None:
    """To be called last: what can't be written is dropped, without a complaint and without changing the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before Python started (>&-)
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)
