"""The two spellings of a decoder layer's name: in a text model, and in the vision-language model around it.

transformers has the same layers at `model.layers` in one class and at `model.language_model.layers` in the other. PEFT
gives an adapter to the class that has its names; in the other it computes without, after a warning of missing keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, get_args

from models.checkpoint.keymap import KeyMap

Spelling = Literal["text", "vision-language"]
SPELLINGS: tuple[Spelling, ...] = get_args(Spelling)
# What stands before `.layers`, in a name or, with its dot escaped, in a regular expression that fits names. A name that
# is an ending may lack the leading `model.`.
_SEPARATOR = r"(?=(\\?\.)layers\b)"
_PATTERNS: dict[Spelling, re.Pattern[str]] = {
    "text": re.compile(rf"(?<!\w)model{_SEPARATOR}"),
    "vision-language": re.compile(rf"(?<!\w)(?:model\\?\.)?language_model{_SEPARATOR}"),
}
_MODELS: dict[Spelling, str] = {"text": "model", "vision-language": "model.language_model"}


def spelling_of(name: str) -> Spelling | None:
    """The spelling of a full name of something in a layer; None for any other name, which both spell alike."""
    return next((spelling for spelling in SPELLINGS if _PATTERNS[spelling].search(name)), None)


def spellings(names: Iterable[str]) -> set[Spelling]:
    return {spelling for name in names if (spelling := spelling_of(name)) is not None}


def respell(name: str, to: Spelling) -> str:
    """A name, or a regular expression that fits names, in the spelling `to`."""
    found = spelling_of(name)
    if found is None or found == to:
        return name
    return _PATTERNS[found].sub(lambda match: _MODELS[to].replace(".", match[1]), name)


def respelled(key_map: KeyMap, to: Spelling) -> KeyMap:
    """A key map with the hub's keys in the spelling `to`."""
    return replace(key_map, keys=tuple(replace(key, hub=respell(key.hub, to)) for key in key_map.keys))
