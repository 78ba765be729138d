"""`python -m train` in a forked process, under conditions that only a process of its own can have."""

from __future__ import annotations

import os
import sys

from quant.common.terminal import flush_streams
from train.__main__ import main


def without_a_reader(arguments: list[str]) -> int:
    """Its output goes into a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(writing, stream.fileno())
    code = main(arguments)
    flush_streams()
    return code
