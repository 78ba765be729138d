"""Ctrl-C while a command starts. Commands import this first, and it nothing that takes time."""

import os
import signal

INTERRUPTED = 130  # the exit code


def end_on_interrupt() -> None:
    """Ctrl-C ends the process at once, without a traceback: while there is nothing to be put in order, as in imports,
    which may not pass an exception on. A SIGINT that is ignored, as under nohup, stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: object) -> None:
    try:
        os.write(2, b"interrupted\n")
    finally:
        os._exit(INTERRUPTED)
