"""Regular expressions out of files that others wrote."""

from __future__ import annotations

import regex

from quant.common.errors import NibbleError
from quant.common.words import shown

_LONGEST = 10_000  # characters
_SECONDS = 2


class Pattern:
    """A regular expression out of a file, matched within a time limit: some take longer than the universe is old.

    It fits whole names, or, with `ending`, the ends of names that begin after a dot.
    """

    def __init__(self, text: str, place: str, *, ending: bool = False) -> None:
        self.place = f"{place} has {shown(text)}"
        if len(text) > _LONGEST:
            raise NibbleError(
                f"{self.place}, a regular expression of {len(text):,} characters; it may have {_LONGEST:,}."
            )
        try:
            self._compiled = regex.compile(rf"(.*\.)?({text})" if ending else text)
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise NibbleError(f"{self.place}, which is no regular expression: {error}.") from error

    def fits(self, name: str) -> bool:
        try:
            return self._compiled.fullmatch(name, timeout=_SECONDS) is not None
        except TimeoutError as error:
            raise NibbleError(
                f"{self.place}, a regular expression that takes more than {_SECONDS} s to match {name}.\n"
                "Replace it with names."
            ) from error
