"""A progress bar for work that takes minutes."""

from __future__ import annotations

import sys

from quant.common.words import printable


class Bar:
    """On standard error where that is a terminal and `show` allows it, otherwise nothing. Used as a context manager."""

    def __init__(self, what: str, show: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[part]}", markup=False),
            console=Console(stderr=True),
            disable=not (show and sys.stderr.isatty()),
        )
        self._task = self._progress.add_task(printable(what, 80), part="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int, part: str = "") -> None:
        """done of total, in whatever unit; part: what is being worked on."""
        self._progress.update(self._task, completed=done, total=total, part=printable(part, 80))
