"""JSON from files that others wrote: checked as a whole when it is read, and value by value when it is used.

Python's reader takes more than JSON is: NaN, keys that stand twice (of which it keeps the last), numbers that become
infinite, half of a surrogate pair, which is no character and can't be written, nesting up to the interpreter's
recursion limit. Here each of these is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from quant.common.errors import NibbleError
from quant.common.words import shown

MAX_BYTES = 64 * 2**20  # of a file that is read whole; the index of the largest published checkpoint has 8 MiB
MAX_VALUES = 2**22  # in one text: a value may take a hundred times the memory of its text
MAX_DEPTH = 100  # of objects and lists within each other
LARGEST = 2**24  # an integer, unless its reader says otherwise: no matrix has as many rows

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_T = TypeVar("_T")


class JsonError(ValueError):
    """Why a text isn't usable JSON, in a few words."""


def parse_json(text: str | bytes, most: int = MAX_VALUES) -> Any:
    """The value of a JSON text; bytes are UTF-8, with or without a byte-order mark. Raises JsonError.

    most: values that it may hold (commas and brackets are counted, inside strings too).
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if len(text) > most and text.count(",") + text.count("[") + text.count("{") > most:
            raise JsonError(f"more than {most:,} values")
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg} at line {error.lineno} column {error.colno}") from error
    except RecursionError as error:
        raise JsonError(f"nested more than {MAX_DEPTH} deep") from error
    except JsonError:
        raise
    except ValueError as error:  # an integer with thousands of digits
        raise JsonError(str(error).partition(";")[0]) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise JsonError(f"nested more than {MAX_DEPTH} deep")
    if _SURROGATE.search(text) and not _is_text(value):
        raise JsonError("half of a surrogate pair (\\ud800 to \\udfff) is no character")
    return value


def _is_text(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path, kind: type[_T], what: str = "") -> _T:
    """The value in a file, which must be a `kind` (dict or list). Raises NibbleError naming the file.

    what: what to do about a file that can't be used, for the message's second line.
    """
    advice = f"\n{what}" if what else ""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise NibbleError(f"{path} has {size:,} bytes, more than any such file needs ({MAX_BYTES:,}).{advice}")
        data = path.read_bytes()
    except OSError as error:
        raise NibbleError(f"{path} can't be read: {error.strerror}.{advice}") from error
    try:
        value = parse_json(data)
    except JsonError as error:
        raise NibbleError(f"{path} is not valid JSON: {error}.{advice}") from error
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        raise NibbleError(f"{path} holds {kind_of(value)}, expected {wanted}.{advice}")
    return value


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words: "null", "text", "a number" …"""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return "a number"
    return "a list" if isinstance(value, list | tuple) else "an object"


# --- values by type: of `key` in an object, or `default` where it is absent. `where` names the file in messages.


def integer(
    config: Mapping[str, Any], key: str, default: int, where: str, *, least: int = 1, most: int = LARGEST
) -> int:
    """An integer from `least` to `most`."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise NibbleError(f"{where}: {key} must be {wanted}, got {shown(value)}.")
    if value > most:
        raise NibbleError(f"{where}: {key} is {shown(value)}; more than {most:,} can't be computed with.")
    return value


def optional_integer(
    config: Mapping[str, Any], key: str, default: int, where: str, *, most: int = LARGEST
) -> int | None:
    """Like :func:`integer`, where an explicit null means that the part doesn't exist."""
    return None if key in config and config[key] is None else integer(config, key, default, where, most=most)


def number(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """A positive, finite number."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e30:
        raise NibbleError(f"{where}: {key} must be a positive number, got {shown(value)}.")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    """True or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise NibbleError(f"{where}: {key} must be true or false, got {shown(value)}.")
    return value


def text(config: Mapping[str, Any], key: str, default: str, where: str) -> str:
    """Text that isn't empty (unless the default is)."""
    value = config.get(key, default)
    if not isinstance(value, str) or not (value or not default):
        raise NibbleError(f"{where}: {key} must be text, got {shown(value)}.")
    return value


def texts(config: Mapping[str, Any], key: str, where: str) -> list[str]:
    """A list of texts; absent or null, an empty one."""
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise NibbleError(f"{where}: {key} must be a list of texts, got {shown(value)}.")
    return value


def mapping(config: Mapping[str, Any], key: str, where: str, *, null: bool = True) -> dict[str, Any]:
    """An object; an empty one where it is absent, or null, as transformers' configs leave things out.

    null: whether null may stand for it; in files of this project it is damage.
    """
    value = config.get(key)
    if value is None and (null or key not in config):
        return {}
    if not isinstance(value, dict):
        raise NibbleError(f"{where}: {key} must be an object, got {shown(value)}.")
    return value


# --- the reader's parts


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"the key {shown(twice)} stands twice in one object")
    return found


def _constant(name: str) -> Any:
    raise JsonError(f"{name} is not JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JsonError(f"{shown(digits)} is too large a number")
    return value


def _deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    if levels == 0:
        return True
    return any(_deeper(inner, levels - 1) for inner in (value.values() if isinstance(value, dict) else value))


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
