"""Rows that can't be used: why, counted, reported and listed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from quant.common.errors import NibbleError
from quant.common.words import printable

_LONGEST = 600  # characters of a message


class BadRow(Exception):
    """Why a row can't be used. reason: a short key to count by; the text names the field."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class SkippedRow:
    file: str
    line: int
    reason: str
    detail: str


class RowLog:
    """Collects the problems of rows, and reports them.

    on_bad_row: "skip" records a bad row; "error" raises NibbleError at the first one.
    warn: receives one line per problem: the first three of each kind, then the 10th, 100th, 1000th …; `skipped`
        has them all.
    """

    def __init__(self, on_bad_row: Literal["skip", "error"], warn: Callable[[str], None] | None = None):
        self.on_bad_row = on_bad_row
        self.skipped: list[SkippedRow] = []
        self.counts: Counter[str] = Counter()
        self.warn = warn

    def bad(self, file: str, line: int, problem: BadRow) -> None:
        detail = printable(str(problem), _LONGEST)
        place = printable(f"{file}:{line}: {detail}")
        if self.on_bad_row == "error":
            raise NibbleError(f"{place} (data.on_bad_row: error).\nFix the row, or set data.on_bad_row: skip.")
        self.skipped.append(SkippedRow(file, line, problem.reason, detail))
        self.note(problem.reason, f"{place}; row skipped (data.on_bad_row: skip)")

    def note(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        count = self.counts[kind]
        if self.warn is not None and (count <= 3 or str(count).strip("0") == "1"):
            self.warn(f"{text}. {count:,} such {'row' if count == 1 else 'rows'} so far.")


def write_skipped_rows(path: str | Path, skipped: Sequence[SkippedRow]) -> None:
    """One JSON object per line: file, line, reason, detail."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for row in skipped:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
