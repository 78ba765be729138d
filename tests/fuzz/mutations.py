"""Inputs that are nearly right: JSON values and bytes, changed in a few places."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# What readers trip over: wrong types, numbers at and beyond limits, names with control characters, depth.
VALUES = st.sampled_from(
    [
        None, True, False, -1, 0, 1, 2, 3, 7, 64, 10**6, 2**31, 2**63, 10**29, 0.5, -0.0, 1e30, 1e308, 1e-320,
        "", " ", "x", "nf4", "-1", "1e400", "\x1b[2J\x1b[31m", "\x00", "\u202e", "a" * 300, "a" * 3000,
        "../../etc/passwd", "\ud800", "~nosuchuser/x",
        "(((((", "{{ x }}", [], [[]], [None], [1, "a"], {}, {"a": {}}, {"": 0}, nested(50), nested(300),
    ]
)  # fmt: skip


@st.composite
def json_near(draw: st.DrawFn, base: Any) -> Any:
    """A copy of `base` with one to three of its values replaced, removed, doubled or put elsewhere."""
    value = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = _place(draw, value)
        if holder is None:
            return draw(VALUES)
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "copy"]))
        if action == "replace":
            holder[key] = copy.deepcopy(draw(VALUES))
        elif action == "remove":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[
                draw(st.sampled_from(["", "x", "\x1b[2J", "\0", "\ud800", "a" * 300, f"{key}x", str(key).upper()]))
            ] = holder.pop(key)
        else:
            other, where = _place(draw, value)
            if other is not None:
                other[where] = copy.deepcopy(holder[key])
    return value


def _place(draw: st.DrawFn, value: Any) -> tuple[Any, Any]:
    """Some object or list inside `value`, and a key or index of it."""
    holder, key = None, None
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        holder, key = value, draw(st.sampled_from(keys))
        value = value[key]
        if draw(st.booleans()):
            break
    return holder, key


@st.composite
def bytes_near(draw: st.DrawFn, base: bytes) -> bytes:
    """`base` cut short, with some of its bytes changed, or with others put in."""
    data = bytearray(base)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        action = draw(st.sampled_from(["flip", "cut", "insert", "drop", "repeat"]))
        if action == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del data[place:]
        elif action == "insert":
            data[place:place] = draw(st.sampled_from([b"\xff\xfe", b"\x00", b"[" * 200, b'{"a":', b"NaN", b'"', b"\n"]))
        elif action == "drop":
            del data[place : place + draw(st.integers(1, 9))]
        else:
            data[place:place] = data[place : place + 20]
    return bytes(data)


@st.composite
def text_of(draw: st.DrawFn, base: Any) -> bytes:
    """The JSON text of something near `base`, sometimes damaged as a text too."""
    data = json.dumps(draw(json_near(base))).encode()
    return draw(bytes_near(data)) if draw(st.integers(0, 3)) == 0 else data
