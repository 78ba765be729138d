"""The values of `data.fields`: the name of a column, or a text that joins columns: "{instruction}\\n\\n{input}"."""

from __future__ import annotations

import re
from functools import lru_cache

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


@lru_cache(maxsize=256)
def joined(value: str) -> tuple[tuple[str, str], ...] | None:
    """(text, column that follows it, "" at the end) of a text with {column} in it, {{ and }} being braces.

    None for a plain name. ValueError says where a brace has no partner.
    """
    parts, text, last = [], "", 0
    problem = None
    for found in _TOKEN.finditer(value):
        text, last = text + value[last : found.start()], found.end()
        token, column = found.group(), found.group(1)
        if column is not None:
            parts.append((text, column))
            text = ""
        elif len(token) == 2:
            text += token[0]
        else:
            problem = (
                problem or f"'{token}' at character {found.start() + 1} has no partner (a brace itself: {token * 2})"
            )
    if not parts:
        return None
    if problem:
        raise ValueError(problem)
    return (*parts, (text + value[last:], ""))


def columns(value: str) -> tuple[str, ...]:
    """The columns that a value of `data.fields` reads, each once."""
    parts = joined(value)
    return (value,) if parts is None else tuple(dict.fromkeys(column for _, column in parts if column))
