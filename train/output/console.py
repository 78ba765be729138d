"""Writing to a terminal or pipe that may be closed during a run: `| head`, a dead `tee`, a closed window."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def say(text: str, stream: TextIO) -> None:
    """Print a line and flush. A line that can no longer be written is dropped; no run ends because of it."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Redirect `stream`, and what is still in its buffer, to /dev/null; Python's flush at exit would fail otherwise."""
    with contextlib.suppress(OSError, ValueError):  # has no file descriptor, or is closed
        target = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, target)
        os.close(null)


def flush_streams() -> None:
    """Flush both streams before exit; what can't be written is dropped, without a message or a change of exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before Python started (>&-)
        try:
            stream.flush()
        except (OSError, ValueError):
            silence(stream)
