"""Numbers and lists as a person reads them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

# Categories of characters that a terminal acts on or hides: control, format (bidirectional overrides among them),
# surrogates, unassigned and private ones, separators of lines.
_HIDDEN = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


def some(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many more."""
    first = ", ".join(names[:limit])
    return f"{first} and {len(names) - limit} more" if len(names) > limit else first


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of cells, the first being the header, as text in columns; those in `right` are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        ]
        lines.append(("  " + "   ".join(cells)).rstrip())
    return "\n".join(lines)


def counted(number: float, noun: str) -> str:
    """ "1 step", "1,214 steps", "0.5 epochs" """
    text = f"{number:,}" if isinstance(number, int) else f"{number:,.3g}"
    return f"{text} {noun}" if text == "1" else f"{text} {noun}s"


def format_bytes(count: int, digits: int = 2) -> str:
    """Binary units with so many digits after the point: "15.28 GiB", "3.40 MiB", "512 B"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} B"


def format_seconds(seconds: float) -> str:
    """A length of time as a person would say it: "45 s", "23 min", "2 h 05 min", "3 d 4 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def printable(text: str, limit: int | None = None) -> str:
    """Text that a terminal shows as it is: control characters escaped, cut in the middle to `limit` characters.

    Lines stay lines. For names, keys and messages out of files that others wrote.
    """
    escaped = "".join(
        char if char == "\n" or unicodedata.category(char) not in _HIDDEN else ascii(char)[1:-1] for char in text
    )
    if limit is None or len(escaped) <= limit:
        return escaped
    half = (limit - 1) // 2
    return f"{escaped[:half]}…{escaped[len(escaped) - half :]}"


def shown(value: object, limit: int = 80) -> str:
    """A value out of somebody's file as a message quotes it: repr, printable, not longer than `limit`."""
    return printable(repr(value), limit).replace("\n", "\\n")
