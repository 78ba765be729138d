"""YAML in and out: plain values that remember the line they came from, and `--set` overrides laid over them.

PyYAML parses and quotes. Done here is what it would do worse for a user, and ruamel.yaml in its place too:
- Places. ruamel.yaml stops at the first duplicate key and doesn't report where the key was before.
- Scalars, which follow the YAML 1.2 core schema. PyYAML reads `2e-4` as text, `no` as false, `010` as 8 and `1:30` as
  90 (YAML 1.1); ruamel.yaml reads `1_000` as a number and `2024-01-01` as a date.
- Writing, for readers of YAML 1.1 and 1.2 alike. Both turn U+0085 into a space; PyYAML writes the text `2e-4`, and
  ruamel.yaml the text `no` and the number `1e-08`, such that the other version reads something else.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from quant.common.errors import NibbleError

KeyPath = tuple[str | int, ...]

# A config has some hundred values, in four levels. Aliases of aliases make millions of values out of a few lines.
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**20, 10_000, 20

_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_HEX_OR_OCTAL = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TEXT_TAG = "tag:yaml.org,2002:str"
_UNTAGGED = (_TEXT_TAG, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass(frozen=True, order=True)
class Place:
    """Where a value was written; orders the way a reader would look: the file by line, then each --set."""

    source: int  # 0 the file, 1 the command line
    index: int  # line in the file (0: the file as a whole) or number of the --set
    text: str  # "configs/my.yaml:14" or "--set train.max_steps=3"


@dataclass(frozen=True, order=True)
class Problem:
    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place.text}: {self.text}"


@dataclass
class Document:
    """Plain values (dict, list, str, int, float, bool, None) and the place of every key and list item among them."""

    name: str
    values: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    values_read: int = 0

    def place(self, path: KeyPath) -> Place:
        """Place of `path`, or of the nearest thing around it that was written somewhere."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place(0, 0, self.name)

    def override(self, path: KeyPath, value: Any, place: Place) -> None:
        """Put `value` at `path`; it replaces everything there. The parents must be mappings or absent."""
        target = self.values
        for part in path[:-1]:
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        target[path[-1]] = value
        for old in [known for known in self.places if known[: len(path)] == path]:
            del self.places[old]
        self.places[path] = place


def dotted(path: KeyPath) -> str:
    """('messages', 2, 'content') -> 'messages[2].content'."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def plain_scalar(text: str) -> str | int | float | bool | None:
    """Value of an unquoted scalar under the YAML 1.2 core schema."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    # Python neither reads nor writes integers of thousands of digits; as a float they are infinite, which the schema
    # reports.
    if _INT.fullmatch(text) and len(text) < 1000:
        return int(text)
    if _HEX_OR_OCTAL.fullmatch(text):
        return int(text, 0) if len(text) < 1000 else math.inf
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def read_text(text: str, name: str) -> Document:
    """Read YAML text; `name` stands for it in messages ("configs/my.yaml").

    Duplicate keys and the like are left in `problems`; what can't be read at all raises NibbleError.
    """
    document = Document(name)
    if len(text) > MAX_BYTES:
        raise NibbleError(f"{name}: not a config: it has more than {MAX_BYTES:,} characters")
    try:
        # BaseLoader resolves no scalar, so that every one arrives as it was written, with its mark.
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        if node is not None:
            document.values = _construct(node, (), document, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = "; ".join(part for part in (error.context, error.problem) if part)
        raise NibbleError(f"{where}: not valid YAML: {reason}") from error
    except yaml.YAMLError as error:
        raise NibbleError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
    except (RecursionError, _TooDeep) as error:
        raise NibbleError(f"{name}: not a config: lists or mappings are nested more than {MAX_DEPTH} deep") from error
    return document


class _TooDeep(Exception):
    pass


def _construct(node: yaml.Node, path: KeyPath, document: Document, above: tuple[int, ...]) -> Any:
    def place(part: yaml.Node) -> Place:
        line = part.start_mark.line + 1
        return Place(0, line, f"{document.name}:{line}")

    document.values_read += 1
    if document.values_read > MAX_VALUES:
        raise NibbleError(f"{document.name}: not a config: more than {MAX_VALUES:,} values, with those of aliases")
    if id(node) in above:
        raise NibbleError(f"{place(node).text}: the YAML alias in '{dotted(path)}' contains itself")
    if node.tag not in _UNTAGGED:
        document.problems.append(Problem(place(node), f"'{dotted(path)}' has a YAML tag; plain values only"))
    if len(above) >= MAX_DEPTH:
        raise _TooDeep
    above = (*above, id(node))
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                document.problems.append(Problem(here, "a key must be a name, not a list or a mapping"))
                continue
            inner = (*path, key_node.value)
            if key_node.value in mapping:
                first = document.places[inner].index
                document.problems.append(Problem(here, f"duplicate key '{dotted(inner)}' (first on line {first})"))
                continue
            document.places[inner] = here
            mapping[key_node.value] = _construct(value_node, inner, document, above)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            document.places[*path, index] = place(item)
            items.append(_construct(item, (*path, index), document, above))
        return items
    try:
        node.value.encode()
    except UnicodeEncodeError:
        document.problems.append(Problem(place(node), f"'{dotted(path)}' is not valid Unicode: {node.value!r}"))
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return plain_scalar(node.value) if plain else node.value


def write_text(values: dict[str, dict[str, Any]]) -> str:
    """YAML of a two-level mapping, one key a line; `read_text` gives the same values back."""
    lines = []
    for name, section in values.items():
        lines += [f"{name}:", *(f"  {key}: {_on_one_line(value)}" for key, value in section.items())]
    return "\n".join(lines) + "\n"


def _on_one_line(value: Any) -> str:
    listed = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf)
    return str(listed).removeprefix("[").removesuffix("]\n")


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than the text."""

    def represent_data(self, data: Any) -> yaml.Node:
        # PyYAML quotes what 1.1 would misread. Quoted here is what only 1.2 reads otherwise ("2e-4"), and what breaks
        # lines: for PyYAML, U+0085 is a letter when it writes and a line break when it reads.
        if isinstance(data, str) and not (plain_scalar(data) == data and data.isprintable()):
            return self.represent_scalar(_TEXT_TAG, data, style='"')
        return super().represent_data(data)
