"""The forms in which hub files hold the same tensors.

transformers has the same layers at `model.layers` in a text model and at `model.language_model.layers` in the
vision-language model around it, and writes either prefix beside either config.json. Routed experts are in files as one
fused stack or as matrices per expert. All of these are read, and an export writes the form that its source has.

PEFT gives an adapter to the class that has its names; in the other it computes without, after a warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Spelling = Literal["text", "vision-language"]
SPELLINGS: tuple[Spelling, ...] = get_args(Spelling)
# How the names of what both models have begin.
PREFIXES: dict[Spelling, str] = {"text": "model", "vision-language": "model.language_model"}
# What stands before these, in a name or, with its dot escaped, in a regular expression that fits names. A name that is
# an ending may lack the leading `model.`.
_SEPARATOR = r"(?=(\\?\.)(?:layers|embed_tokens|norm)\b)"
_PATTERNS: dict[Spelling, re.Pattern[str]] = {
    "text": re.compile(rf"(?<!\w)model{_SEPARATOR}"),
    "vision-language": re.compile(rf"(?<!\w)(?:model\\?\.)?language_model{_SEPARATOR}"),
}


def spelling_of(name: str) -> Spelling | None:
    """The spelling of a full name of something in the decoder; None for any other name, which both spell alike."""
    return next((spelling for spelling in SPELLINGS if _PATTERNS[spelling].search(name)), None)


def spellings(names: Iterable[str]) -> set[Spelling]:
    return {spelling for name in names if (spelling := spelling_of(name)) is not None}


def respell(name: str, to: Spelling) -> str:
    """A name, or a regular expression that fits names, in the spelling `to`."""
    found = spelling_of(name)
    if found is None or found == to:
        return name
    return _PATTERNS[found].sub(lambda match: PREFIXES[to].replace(".", match[1]), name)


@dataclass(frozen=True)
class Layout:
    """wrapped: keys begin with `model.language_model.`, not `model.`. fused: experts are fused stacks."""

    wrapped: bool
    fused: bool

    @property
    def spelling(self) -> Spelling:
        return "vision-language" if self.wrapped else "text"
