"""Stopping on SIGINT, SIGTERM and SIGHUP at the end of a step rather than in the middle of one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class StopOnSignal:
    """While this context is open, SIGINT, SIGTERM or SIGHUP (the terminal was closed) sets `requested`; in a single
    process a second SIGINT raises KeyboardInterrupt at once. A SIGHUP that is ignored, as under nohup, stays ignored.

    quiet: print nothing; of several processes, all of which a launcher signals, one prints. launched: as one of
    several, which all finish the same step; a second SIGINT then changes nothing, whether it comes from the terminal
    or, as SIGTERM, from torchrun. The handlers that were there before are put back on leaving. Outside the main thread
    Python allows no handlers: there the context does nothing and `requested` stays False.
    """

    def __init__(self, quiet: bool = False, launched: bool = False) -> None:
        self.quiet, self.launched, self.requested = quiet, launched, False
        self.name = ""  # of the first signal, e.g. "SIGTERM"
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self.name = signal.Signals(number).name
            if self.quiet:
                return
            # Not print(): the signal may have come in the middle of one, and Python's streams are not re-entrant.
            again = "" if self.launched else " Ctrl-C again stops at once, unsaved."
            _write(f"\n{self.name}: finishing this step, then saving.{again}\n")
        elif number == signal.SIGINT and not self.launched:
            raise KeyboardInterrupt


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed; the flag is what matters
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
