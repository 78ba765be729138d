"""The config's JSON schema in words: the key list of `--help` and the "wanted …" of an error."""

from __future__ import annotations

import difflib
import json
import math
import textwrap
from collections.abc import Iterable
from typing import Any

from quant.common.words import printable
from train.config.foreign import hint

Schema = dict[str, Any]


def sections(schema: Schema) -> dict[str, Schema]:
    """Schema of each section (model, adapter, …) by name, references resolved."""
    found = {}
    for name, entry in schema["properties"].items():
        reference = entry["$ref"].removeprefix("#/$defs/")
        found[name] = schema["$defs"][reference]
    return found


def keys(schema: Schema) -> dict[str, Schema]:
    """Schema of every key by its dotted name ("train.max_steps"), in the order of the config."""
    return {
        f"{name}.{key}": entry
        for name, section in sections(schema).items()
        for key, entry in section["properties"].items()
    }


def required_keys(schema: Schema) -> list[str]:
    return [f"{name}.{key}" for name, section in sections(schema).items() for key in section.get("required", ())]


def takes_mapping(entry: Schema) -> bool:
    return any(choice.get("type") == "object" for choice in entry.get("anyOf", [entry]))


def wanted(entry: Schema, depth: int = 0, value: Any = None) -> str:
    """The values that a key takes, in words; `depth` > 0 asks for what stands inside a mapping or list of it.

    value: what was given. An upper bound that only catches typing mistakes is shown where it was exceeded.
    """
    if "x-wanted" in entry:
        return str(entry["x-wanted"])
    choices = entry.get("anyOf", [entry])
    if depth:
        inner = [
            choice.get("additionalProperties", choice.get("items", choice.get("prefixItems", [{}])[0]))
            for choice in choices
            if choice.get("type") in ("object", "array")
        ]
        return ", or ".join(wanted(choice, depth - 1, value) for choice in inner if isinstance(choice, dict))
    return ", or ".join(_wanted_one(choice, value) for choice in choices)


def _wanted_one(entry: Schema, value: Any = None) -> str:
    if "enum" in entry:
        return "one of " + ", ".join(map(str, entry["enum"]))
    kind = entry.get("type")
    if kind in ("integer", "number"):
        limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
        passed = isinstance(value, int | float) and value > entry.get("maximum", math.inf)
        shown = [name for name in limits if name in entry and (name != "maximum" or passed or entry[name] <= 1)]
        bounds = " and ".join(f"{limits[name]} {json.dumps(entry[name])}" for name in shown)
        return ("an integer" if kind == "integer" else "a number") + (f" {bounds}" if bounds else "")
    if kind == "array":
        if "prefixItems" in entry:
            items = entry["prefixItems"]
            return f"a list of {len(items)}, each {_wanted_one(items[0])}"
        return ("a non-empty list, " if entry.get("minItems") else "a list, ") + f"each {_wanted_one(entry['items'])}"
    if kind == "object":
        return f"a mapping of name to {_wanted_one(entry['additionalProperties'])}"
    if kind == "string":
        return "non-empty text" if entry.get("minLength") else "text"
    return {"boolean": "true or false", "null": "null"}.get(str(kind), "a value")


def got(value: Any) -> str:
    """A value as an error shows it, with its kind where the looks deceive."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text '{printable(value, 200)}'"
    if isinstance(value, (dict, list)):
        shown = json.dumps(value, ensure_ascii=False)
        kind = "the mapping" if isinstance(value, dict) else "the list"
        return f"{kind} {shown if len(shown) <= 60 else shown[:57] + '...'}"
    return printable(repr(value), 60)


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The closest of `choices`, None when nothing is close."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggest_key(name: str, schema: Schema) -> str:
    """The second half of an "unknown key" error: the nearest valid key, or the list of those there are."""
    foreign = hint(name.rpartition(".")[2])
    if foreign is not None:
        return foreign
    names = sections(schema)
    by_leaf: dict[str, list[str]] = {}
    for key in keys(schema):
        by_leaf.setdefault(key.split(".", 1)[1], []).append(key)
    section, _, leaf = name.partition(".")
    if not leaf:
        # `modle:` is a misspelt section; `lerning_rate:` at the top level belongs into one.
        close = nearest(name, by_leaf)
        match = nearest(name, names) or (close and by_leaf[close][0])
        return f"Did you mean '{match}'?" if match else f"The sections are {', '.join(names)}."
    siblings = list(names[section]["properties"]) if section in names else []
    # A key of the same section goes before the same name in another one.
    close = nearest(leaf, siblings)
    if close:
        return f"Did you mean '{section}.{close}'?"
    close = nearest(leaf, by_leaf)
    if close:
        return f"Did you mean '{by_leaf[close][0]}'?"
    return f"The keys of {section} are {', '.join(siblings)}." if siblings else f"The sections are {', '.join(names)}."


def help_text(schema: Schema, width: int = 100) -> str:
    """Every key with its default, the values it takes and its description, grouped by section."""
    lines = []
    for name, section in sections(schema).items():
        lines += [f"{name}: {section['description']}", ""]
        for key, entry in section["properties"].items():
            default = "required" if "default" not in entry else f"default {_inline(entry['default'])}"
            head = f"  {name}.{key}  ({default}; {wanted(entry)})"
            lines += textwrap.wrap(head, width, subsequent_indent="      ", break_on_hyphens=False)
            indent = "      "
            lines += textwrap.wrap(
                entry["description"], width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _inline(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return json.dumps(value)
