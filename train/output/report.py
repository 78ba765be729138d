"""What a run says: results on standard output, progress on standard error, all of it in the log file."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from quant.common.files import disk_error
from train.output.console import say, silence


def log_path(folder: Path, rank: int) -> Path:
    """Where a process of a run in `folder` keeps its log: the first has run.log, which tells of the run."""
    return folder / "run.log" if rank == 0 else folder / "ranks" / f"rank-{rank}.log"


class Report:
    """The voice of a run. As a context manager it also writes the traceback of an error that ends the run to the log,
    which is where a traceback belongs: the terminal gets the message alone.

    A terminal that has gone away and a full disk take its words, and nothing else: training goes on, and what matters
    (metrics, checkpoints) has errors of its own. quiet: all goes to the log alone; of several processes one speaks."""

    def __init__(self, log_path: Path, quiet: bool = False) -> None:
        self.quiet = quiet
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = log_path.open("a", encoding="utf-8")
        except OSError as error:
            raise disk_error(error, log_path) from error
        self.log(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} ---")
        self._live: Any = None  # rich.live.Live while a progress line is on the terminal
        # What the models have to say (which converted copy they read, …) belongs among the rest.
        self._logger, self._handler = logging.getLogger("nibble"), _Notes(self)

    def result(self, text: str = "") -> None:
        """Something that the user asked for: a table, the summary."""
        self._above_live()
        if not self.quiet:
            say(text, sys.stdout)
        self.log(text)

    def note(self, text: str) -> None:
        """Something that happened on the way."""
        self._above_live()
        if not self.quiet:
            say(text, sys.stderr)
        self.log(text)

    def progress(self, text: str, keep: bool) -> None:
        """The state of long work in one line. On a terminal the line is redrawn in place; elsewhere, and in the log, a
        line is written when `keep` says that this one is worth keeping."""
        if self.quiet:
            pass
        elif sys.stderr.isatty():
            try:
                self._redraw(text)
            except OSError:  # the terminal was closed
                self.end_progress()
                silence(sys.stderr)
        elif keep:
            say(text, sys.stderr)
        if keep:
            self.log(text)

    def end_progress(self) -> None:
        """Leave the last progress line where it is and go on below it."""
        if self._live is not None:
            live, self._live = self._live, None
            try:
                live.stop()
            except OSError:
                silence(sys.stderr)

    def log(self, text: str) -> None:
        """Something for the log alone. Any thread may call it, at any time."""
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed already
            self._log.write(text + "\n")
            self._log.flush()

    def __enter__(self) -> Report:
        self._logger.addHandler(self._handler)
        self._logger_level = self._logger.level
        self._logger.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_progress()
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._logger_level)
        if error is not None:
            self.log("".join(traceback.format_exception(error)).rstrip())
        with contextlib.suppress(OSError):  # of a full disk; it would hide the error that ended the run
            self._log.close()

    def _above_live(self) -> None:
        # A line printed now would be overdrawn by the next refresh; ending the display keeps both, in order.
        self.end_progress()

    def _redraw(self, text: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        line = Text(text)
        if self._live is None:
            # Without its refresh thread: the line changes when a step ends and at no other time.
            live = Live(line, console=Console(stderr=True), auto_refresh=False, redirect_stdout=False)
            live.start()
            self._live = live
        self._live.update(line, refresh=True)


class _Notes(logging.Handler):
    def __init__(self, report: Report) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.note(record.getMessage())
