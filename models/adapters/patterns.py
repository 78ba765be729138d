"""Regular expressions out of files that others wrote."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import regex

from quant.common.errors import NibbleError
from quant.common.words import shown

_LONGEST = 10_000  # characters
_SECONDS = 2  # of processor time, for one match
_ALL_SECONDS = 10  # for all that is done with the patterns of a file


@dataclass
class Budget:
    """The processor time, in seconds, that is left for the patterns of one file: many that end may take as long as one
    that doesn't.
    """

    left: float = field(default_factory=lambda: _ALL_SECONDS)


class Pattern:
    """A regular expression out of a file, matched within a time limit: some take longer than the universe is old.

    It fits whole names, or, with `ending`, the ends of names that begin after a dot.
    """

    def __init__(self, text: str, place: str, budget: Budget, *, ending: bool = False) -> None:
        self.place, self._budget = f"{place} has {shown(text)}", budget
        if len(text) > _LONGEST:
            raise NibbleError(
                f"{self.place}, a regular expression of {len(text):,} characters; it may have {_LONGEST:,}."
            )
        begun = self._begin()
        try:
            self._compiled = regex.compile(rf"(.*\.)?({text})" if ending else text)
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise NibbleError(f"{self.place}, which is no regular expression: {error}.") from error
        budget.left -= time.process_time() - begun

    def fits(self, name: str) -> bool:
        begun = self._begin()
        try:
            return self._compiled.fullmatch(name, timeout=min(_SECONDS, self._budget.left)) is not None
        except TimeoutError as error:
            raise self._slow() from error
        finally:
            self._budget.left -= time.process_time() - begun

    def _begin(self) -> float:
        """The processor time now. Raises NibbleError where none is left."""
        if self._budget.left <= 0:
            raise self._slow()
        return time.process_time()

    def _slow(self) -> NibbleError:
        return NibbleError(
            f"{self.place}, a regular expression that takes more than {_SECONDS} s to match a name, or "
            f"{_ALL_SECONDS} s with all others of the file.\nReplace them with names."
        )
