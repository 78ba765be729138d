"""What a command prints, and how it ends: text that any terminal can show, errors, readers that have gone away.

Commands print through this file, since what they print has names, keys and texts of other people's files in it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

from quant.common.errors import NibbleError
from quant.common.interrupts import INTERRUPTED, end_on_interrupt
from quant.common.words import printable

LONGEST = 2000  # characters of a line


def legible(text: str) -> str:
    """Text as it is shown and logged: control characters escaped, lines cut in the middle to LONGEST characters."""
    return "\n".join(printable(line, LONGEST) for line in text.split("\n"))


def say(text: str, stream: TextIO) -> None:
    """Print a message. One that can no longer be written is dropped; no run ends because of it."""
    write(legible(text), stream)


def write(text: str, stream: TextIO, end: str = "\n") -> None:
    """Print a line as it is, for what other programs read (JSON, YAML), and flush. Dropped as by `say`."""
    try:
        print(text, file=stream, end=end, flush=True)
    except OSError:
        silence(stream)


def show_text(text: str, stream: TextIO) -> None:
    """A piece of a model's answer, without a line's end. A terminal gets no control characters but tab and the joiners
    of scripts and emoji, and nothing is cut; a file or pipe gets the text as it is.
    """
    if stream.isatty():
        parts = re.split("([\t\u200c\u200d])", text)
        text = "".join(part if index % 2 else printable(part) for index, part in enumerate(parts))
    write(text, stream, end="")


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


def error_text(error: NibbleError) -> str:
    """`error: …`, its further lines indented under the first."""
    indent = " " * len("error: ")
    first, *rest = str(error).splitlines() or [""]
    return "\n".join([f"error: {first}", *(indent + line.removeprefix(indent) for line in rest)])


def print_error(error: NibbleError) -> None:
    say(error_text(error), sys.stderr)


def exit_code(body: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of body(), or of the NibbleError or Ctrl-C that ended it, which is printed."""
    try:
        return body()
    except NibbleError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        say(interrupted, sys.stderr)
        return INTERRUPTED


def refuse_empty(arguments: argparse.Namespace, *but: str) -> None:
    """Raises NibbleError for an argument that is "" (as of a shell's unset variable): as a path it would mean the
    current folder. but: those that may be empty.
    """
    for name, value in vars(arguments).items():
        if value == "" and name not in but:
            raise NibbleError(f"{name.replace('_', '-')} is given as an empty text. Give a name, or leave it out.")


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), sys.stderr)


def run_command(main: Callable[[], int]) -> int:
    """main() as a process of its own: for streams of any encoding, whose readers may go away."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("nibble").addHandler(_Warnings(logging.WARNING))
    try:
        return main()
    finally:
        flush_streams()  # argparse, too, prints and leaves: --help | head
        end_on_interrupt()
