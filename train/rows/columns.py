"""Which columns of the rows are used, and what is in the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from quant.common.errors import NibbleError
from quant.common.words import printable
from train.config.fields import columns
from train.config.sections import Format
from train.rows.parse import columns_read, messages_in, missing

_LISTED = 12  # columns in a message


class Columns:
    """Counts, over all rows read, where columns that no field reads hold text, a list or an object.

    filled: rows in which such a column isn't empty, by column; a reader that leaves columns of its file out adds to it.
    binary: columns left out that hold bytes (images), which aren't counted.
    """

    def __init__(self, form: Format, fields: Mapping[str, str]):
        self.form, self.fields = form, fields
        self.filled: Counter[str] = Counter()
        self.binary: set[str] = set()
        self.seen: dict[str, None] = {}
        self._joined = {name: columns(value) for name, value in fields.items() if columns(value) != (value,)}
        self._unused = lru_cache(maxsize=64)(self._unused_of)

    def add(self, values: dict[str, Any]) -> None:
        for name in self._unused(tuple(values)):
            value = values[name]
            if value and isinstance(value, str | list | dict):
                self.filled[name] += 1
        if self.form == "prompt_completion" and isinstance(
            messages_in(values.get(self.fields.get("prompt", "prompt"))), str
        ):
            tools = self.fields.get("tools", "tools")  # which only a prompt of messages takes
            self.filled[tools] += bool(values.get(tools))

    def _unused_of(self, names: tuple[str, ...]) -> list[str]:
        self.seen.update(dict.fromkeys(names))
        used = columns_read(self.form, self.fields, names)
        return [name for name in names if name not in used]

    def require_joined(self, key: str, file: str) -> None:
        """Raises NibbleError for a column that data.fields joins and that no row has."""
        for name, wanted in self._joined.items():
            for column in wanted:
                if column not in self.seen and self.seen:
                    raise NibbleError(f"data.fields.{name}: {key}: {file}: {missing(column, self.seen, 'its rows')}")

    def unused_text(self, rows: int) -> str:
        """The columns left out and in how many of so many rows they hold something; "" when there is none."""
        found = [
            f"{printable(name, 60)} ({count:,} of {rows:,} rows)" for name, count in self.filled.most_common() if count
        ]
        found += [f"{printable(name, 60)} (binary)" for name in sorted(self.binary)]
        if not found:
            return ""
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        return f"columns with content that are not used: {', '.join(found[:_LISTED])}{more}.{self._advice()}"

    def _advice(self) -> str:
        names = {name for name, count in self.filled.items() if count}
        if self.form == "messages":
            return " (data.fields: {system: system} puts it first.)" if "system" in names else ""
        first = "text" if self.form == "text" else "prompt"
        own = self.fields.get(first, first)
        other = next((name for name in ("input", "context", "system") if name in names), None)
        if other is None or own in self._joined or first in self._joined:
            return ""
        joined = f"{{{other}}}\\n\\n{{{own}}}" if other == "system" else f"{{{own}}}\\n\\n{{{other}}}"
        return f' (data.fields joins columns: {first}: "{joined}".)'
