"""The messages of a run: results to standard output, progress to standard error, both to the log file."""

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
from quant.common.terminal import legible, say, silence


def log_path(folder: Path, rank: int) -> Path:
    """The log file of a process of the run in `folder`: run.log for the first one, ranks/rank-N.log for the others."""
    return folder / "run.log" if rank == 0 else folder / "ranks" / f"rank-{rank}.log"


class Report:
    """Writes a run's messages to the terminal and to its log file.

    As a context manager it also writes the traceback of an error that ends the run, to the log only.
    A closed terminal or a full disk loses messages but never ends a run: metrics and checkpoints raise errors of their
    own. quiet: write to the log only, as all processes but the first do.
    Raises NibbleError when the log file can't be opened.
    """

    def __init__(self, log_path: Path, quiet: bool = False) -> None:
        self.quiet = quiet
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = log_path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise disk_error(error, log_path) from error
        self.log(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} ---")
        self._live: Any = None  # rich.live.Live while a progress line is on the terminal
        # Messages of the packages below (which converted copy is read, …) go the same way as the run's own.
        self._logger, self._handler = logging.getLogger("nibble"), _NoteHandler(self)

    def result(self, text: str = "") -> None:
        """Output that the user asked for (a table, the summary): to standard output and the log."""
        self.end_progress()  # its next refresh would overwrite a line printed now
        if not self.quiet:
            say(text, sys.stdout)
        self.log(text)

    def note(self, text: str) -> None:
        """An event of the run: to standard error and the log."""
        self.end_progress()
        if not self.quiet:
            say(text, sys.stderr)
        self.log(text)

    def progress(self, text: str, keep: bool) -> None:
        """The state of long work in one line, redrawn in place on a terminal. Elsewhere and in the log only lines with
        `keep` are written."""
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
        """End the display of the progress line, which stays on the terminal."""
        if self._live is not None:
            live, self._live = self._live, None
            try:
                live.stop()
            except OSError:
                silence(sys.stderr)

    def log(self, text: str) -> None:
        """Write a line to the log only. May be called from any thread at any time."""
        with contextlib.suppress(OSError, ValueError):  # a full disk; closed already
            self._log.write(legible(text) + "\n")
            self._log.flush()

    def __enter__(self) -> Report:
        self._logger_before = self._logger.handlers, self._logger.level
        self._logger.handlers = [self._handler]
        self._logger.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_progress()
        self._logger.handlers, level = self._logger_before
        self._logger.setLevel(level)
        if error is not None:
            self.log("".join(traceback.format_exception(error)).rstrip())
        with contextlib.suppress(OSError):  # a full disk; raising it would hide the error that ended the run
            self._log.close()

    def _redraw(self, text: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        line = Text(legible(text))
        if self._live is None:
            # No refresh thread: the line changes only when a step ends.
            live = Live(line, console=Console(stderr=True), auto_refresh=False, redirect_stdout=False)
            live.start()
            self._live = live
        self._live.update(line, refresh=True)


class _NoteHandler(logging.Handler):
    def __init__(self, report: Report) -> None:
        super().__init__(logging.INFO)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.note(record.getMessage())
