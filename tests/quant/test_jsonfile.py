"""The one reader of JSON: what it refuses that Python's takes, and values by type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant.common import jsonfile
from quant.common.errors import NibbleError
from quant.common.jsonfile import (
    MAX_DEPTH,
    JsonError,
    flag,
    integer,
    mapping,
    number,
    optional_integer,
    parse_json,
    read_json,
    text,
    texts,
)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", "Expecting value at line 1 column 1"),
        ('{"a": 1,\n "b" 2}', "Expecting ':' delimiter at line 2 column 6"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1e400", "'1e400' is too large a number"),
        ("9" * 5000, "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice in one object"),
        ('{"\\u001b[31m": 1, "\\u001b[31m": 2}', "the key '\\x1b[31m' stands twice in one object"),
        (nested(MAX_DEPTH + 1), "nested more than 100 deep"),
        (nested(100_000), "nested more than 100 deep"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        ('["a", {"\\uD800": 1}]', "half of a surrogate pair (\\ud800 to \\udfff) is no character"),
        ('"\ud83d"', "half of a surrogate pair (\\ud800 to \\udfff) is no character"),
    ],
)
def test_what_is_refused(source: str | bytes, expected: str) -> None:
    with pytest.raises(JsonError) as error:
        parse_json(source)
    assert str(error.value) == expected


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "ü"], "b": {}}, [[1]] * 200, 10**29, "x" * 100_000])
def test_what_is_taken_is_what_python_reads(value: Any) -> None:
    source = json.dumps(value, ensure_ascii=False)
    assert parse_json(source) == parse_json(source.encode()) == parse_json(b"\xef\xbb\xbf" + source.encode()) == value
    assert parse_json('"\\ud83d\\ude00 \\\\ud800"') == "😀 \\ud800"
    assert parse_json(nested(MAX_DEPTH)) == json.loads(nested(MAX_DEPTH))


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"

    def told(kind: type = dict) -> str:
        with pytest.raises(NibbleError) as error:
            read_json(path, kind, "Fetch it again.")
        return str(error.value)

    assert told() == f"{path} can't be read: No such file or directory.\nFetch it again."
    path.write_text("[]")
    assert told() == f"{path} holds a list, expected an object.\nFetch it again."
    assert read_json(path, list) == []
    path.write_text("{,}")
    assert told().startswith(f"{path} is not valid JSON: Expecting property name")
    monkeypatch.setattr(jsonfile, "MAX_BYTES", 2)
    assert told() == f"{path} has 3 bytes, more than any such file needs (2).\nFetch it again."


@pytest.mark.parametrize("value", [True, "3", 1.0, None, [3], -1, 0])
def test_integers(value: Any) -> None:
    with pytest.raises(NibbleError) as error:
        integer({"n": value}, "n", 1, "file")
    assert str(error.value) == f"file: n must be a positive integer, got {value!r}."


def test_values_by_type() -> None:
    values: dict[str, Any] = {"n": 3, "x": 0.5, "on": True, "word": "a", "list": ["a"], "table": {}, "null": None}
    assert (integer(values, "n", 1, "f"), integer(values, "absent", 7, "f")) == (3, 7)
    assert (optional_integer(values, "null", 1, "f"), optional_integer(values, "absent", 7, "f")) == (None, 7)
    assert (number(values, "x", 1, "f"), number(values, "n", 1, "f")) == (0.5, 3.0)
    assert (flag(values, "on", False, "f"), text(values, "word", "", "f")) == (True, "a")
    assert (texts(values, "list", "f"), texts(values, "null", "f"), mapping(values, "table", "f")) == (["a"], [], {})
    wrong = [
        (
            lambda: integer({"n": 10**9}, "n", 1, "f"),
            "f: n is 1000000000; more than 16,777,216 can't",
        ),
        (lambda: number({"x": 10**400}, "x", 1, "f"), "f: x must be a positive number, got 1000"),
        (lambda: number({"x": False}, "x", 1, "f"), "f: x must be a positive number, got False."),
        (lambda: flag({"on": 1}, "on", True, "f"), "f: on must be true or false, got 1."),
        (lambda: text({"w": ["a"]}, "w", "", "f"), "f: w must be text, got ['a']."),
        (lambda: texts({"l": "ab"}, "l", "f"), "f: l must be a list of texts, got 'ab'."),
        (lambda: texts({"l": [1]}, "l", "f"), "f: l must be a list of texts, got [1]."),
        (lambda: mapping({"t": []}, "t", "f"), "f: t must be an object, got []."),
    ]
    for call, expected in wrong:
        with pytest.raises(NibbleError) as error:
            call()
        assert str(error.value).startswith(expected) and len(str(error.value)) < 200


def test_more_values_than_memory_has_room_for() -> None:
    assert parse_json("[[], [], 1]", most=5) == [[], [], 1]
    with pytest.raises(JsonError, match="more than 4 values"):
        parse_json("[[], [], 1]", most=4)
