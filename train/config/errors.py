"""Validation errors as lines a user can act on: place, key, what was found, what would be right."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from quant.common.errors import FLOAT16
from train.config.schema import Schema, got, keys, nearest, required_keys, sections, suggest_key, wanted
from train.config.sections import WeightedFile
from train.config.yaml_text import Document, KeyPath, Place, Problem, dotted

LOOKED_AT = 200  # of pydantic's errors: a file that is no config can have thousands
SHOWN = 20  # problems in a message

_HINTS: dict[tuple[KeyPath, Any], str] = {
    (("model", "dtype"), "float16"): FLOAT16,
}


def problems_of(error: ValidationError, document: Document, schema: Schema) -> list[Problem]:
    """One Problem for each mistake that `error` reports (a union reports one for each of its branches)."""
    found: list[Problem] = []
    wrong: list[KeyPath] = []
    for item in error.errors(include_url=False, include_input=False)[:LOOKED_AT]:
        location = item["loc"]
        if item["type"] == "combination":
            found += [_combination(keys_, text, document) for keys_, text in item["ctx"]["found"]]
        elif item["type"] == "extra_forbidden" and len(location) <= 2:
            name = dotted(location)
            text = f"unknown key '{name}'. {suggest_key(name, schema)}"
            if len(location) == 1 and name in keys(schema):
                section, _, key = name.partition(".")
                text = f"'{name}' is written with a dot in --set only; here it is {section}: {{{key}: …}}"
            found.append(Problem(document.place(location), text))
        elif item["type"] == "missing" and (missing := _missing(location, schema)):
            found += [Problem(Place(0, 0, document.name), text) for text in missing]
        else:
            wrong.append(_path_in_values(location, document.values))
    # Of one key's errors the innermost is most exact: {experts: x} has a wrong value inside, not "is not an integer".
    for path in dict.fromkeys(wrong):
        if not any(other[: len(path)] == path and len(other) > len(path) for other in wrong):
            found.append(Problem(document.place(path), _wrong_value(path, document, schema)))
    return found


def _missing(location: KeyPath, schema: Schema) -> list[str]:
    """A line for the missing key, or for each key that a missing section must have."""
    where = dotted(location)
    entries = keys(schema)
    return [
        f"missing key '{name}' ({entries[name]['description'].split('. ')[0].removesuffix('.')})"
        for name in required_keys(schema)
        if name == where or name.startswith(f"{where}.")
    ]


def _combination(names: tuple[str, ...], text: str, document: Document) -> Problem:
    # Point at the first of the keys that was written (a default stands on no line), be it as a part of a mapping that
    # was written whole; a --set goes before the file, since it is what turned a working file into this.
    paths: list[KeyPath] = [tuple(name.split(".", 2)) for name in names]
    written = [document.place(path) for path in paths if {path, path[:2]} & document.places.keys()]
    written = written or [document.place(paths[0])]
    return Problem(max(written, key=lambda place: place.source), text)


def _path_in_values(location: tuple[int | str, ...], values: Any) -> KeyPath:
    """`location` without the names of union branches, which pydantic mixes in ('adapter', 'rank', 'int')."""
    path: list[int | str] = []
    for part in location:
        inside = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if inside or (isinstance(values, dict) and part in values):
            values = values[part]
            path.append(part)
    return tuple(path)


def _wrong_value(path: KeyPath, document: Document, schema: Schema) -> str:
    value = document.values
    for part in path:
        value = value[part]
    if len(path) < 2:
        names = ", ".join(sections(schema)[str(path[0])]["properties"])
        return f"{dotted(path)}: got {got(value)}, wanted a mapping of its keys ({names})"
    if isinstance(value, str) and (path, value) in _HINTS:
        return f"{dotted(path)}: {_HINTS[path, value]}"
    if path[:2] in (("data", "train"), ("data", "eval")) and len(path) == 4:  # an entry of a list of files
        fields = WeightedFile.model_json_schema()["properties"]
        if path[3] not in fields:
            return f"unknown key '{dotted(path)}'. Its keys are {', '.join(fields)}"
        return f"{dotted(path)}: got {got(value)}, wanted {wanted(fields[path[3]], 0, value)}"
    entry = keys(schema)[dotted(path[:2])]
    text = f"{dotted(path)}: got {got(value)}, wanted {wanted(entry, len(path) - 2, value)}"
    near = nearest(value, map(str, entry.get("enum", ()))) if isinstance(value, str) else None
    return text + (f". Did you mean '{near}'?" if near else "")
