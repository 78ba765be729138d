"""How every command of benchmarks ends: exit code 2 with a message for bad input, 130 for Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from quant.common.errors import NibbleError


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None
) -> int:
    """Parses `argv` (None: the process's arguments) and returns what `run` returns, an exit code."""
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except NibbleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
