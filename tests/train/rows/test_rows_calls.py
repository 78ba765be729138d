"""Tool calls and tools: the same from every file, whatever a table filled in or a data set left out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.text_helpers import TEMPLATES, write_lines
from train.data.chat import ChatTemplate
from train.rows.bad_rows import BadRow
from train.rows.files import read_rows
from train.rows.parse import Chat, parse_row


def parse(row: dict[str, Any], **fields: str) -> Chat:
    chat = parse_row(row, "messages", fields)
    assert isinstance(chat, Chat)
    return chat


def chats(path: Path) -> list[Chat]:
    return [parse(row.values or {}) for row in read_rows(path, form="messages", key="data.train")]


def spoken(*calls: Any, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [*calls]}]
    return {"messages": messages, **more}


def calls_of(chat: Chat) -> list[Any]:
    calls = chat.messages[-1]["tool_calls"]
    assert isinstance(calls, list)
    return calls


# Rows whose calls and tools have different keys, nested ones and lists among them.
CALLS = [
    {"name": "weather", "arguments": {"city": "Paris"}},
    {"name": "add", "arguments": {"numbers": [1, 2], "options": {"round": True}}},
    {"name": "add", "arguments": {"numbers": [], "options": {"digits": 3, "ways": [{"up": 1}, {"down": 2}]}}},
]
ROWS = [
    {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": f"go {number}"},
            {"role": "assistant", "content": "so", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "done", "name": call["name"]},
            {"role": "assistant", "content": "ok", "reasoning_content": "hm"},
        ],
        "tools": [
            {"type": "function", "function": {"name": call["name"], "parameters": {next(iter(call["arguments"])): {}}}}
        ]
        if number
        else [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}],
    }
    for number, call in enumerate(CALLS)
]
for row in ROWS[1:]:
    row["tools"][0]["function"]["parameters"]["numbers"] = {"items": {"type": "number"}, "type": "array"}


def test_the_same_rows_from_parquet_arrow_s_lines_and_the_lines_themselves(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(copy.deepcopy(ROWS))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    filled = table.to_pylist()
    assert filled[0]["messages"][2]["tool_calls"][0]["function"]["arguments"] == {
        "city": "Paris", "numbers": None, "options": None,
    }, "Arrow fills in"  # fmt: skip
    written = write_lines(tmp_path / "arrow.jsonl", *filled)
    original = chats(write_lines(tmp_path / "rows.jsonl", *ROWS))
    assert chats(tmp_path / "rows.parquet") == chats(written) == original
    for chat, row in zip(original, ROWS, strict=True):
        assert chat.messages == row["messages"]
        assert chat.tools == row["tools"]
    # As text too, in what a template makes of them.
    template = ChatTemplate(TEMPLATES["qwen"])
    for one, other in zip(chats(written), original, strict=True):
        assert "null" not in template.render(one.messages, one.tools)
        assert sorted(template.render(one.messages, one.tools)) == sorted(template.render(other.messages, other.tools))


def test_a_map_of_arguments_is_an_object(tmp_path: Path) -> None:
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    call = pyarrow.struct({"name": pyarrow.string(), "arguments": kind})
    message = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string(), "tool_calls": pyarrow.list_(call)})
    row = spoken({"name": "f", "arguments": [("city", "Paris"), ("unit", None)]}, {"name": "g", "arguments": []})
    table = pyarrow.table({"messages": pyarrow.array([row["messages"]], pyarrow.list_(message))})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (chat,) = chats(tmp_path / "rows.parquet")
    assert calls_of(chat) == [{"name": "f", "arguments": {"city": "Paris"}}, {"name": "g", "arguments": {}}]


def test_null_in_json_text_is_content() -> None:
    text = '{"city": "Paris", "unit": null, "of": [null, {"x": null}]}'
    call = calls_of(parse(spoken({"function": {"name": "f", "arguments": text}})))[0]
    assert call["function"]["arguments"] == json.loads(text)
    call = calls_of(parse(spoken({"name": "f", "arguments": json.loads(text)})))[0]
    assert call["arguments"] == {"city": "Paris", "of": [None, {}]}
    tool = '{"name": "f", "parameters": {"x": {"default": null}}}'
    assert parse(spoken({"name": "f"}, tools=[tool])).tools == [json.loads(tool)]
    assert parse(spoken({"name": "f"}, tools=[json.loads(tool)])).tools == [{"name": "f", "parameters": {"x": {}}}]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SPELT = {
    "objects": [TOOL],
    "text of all": json.dumps([TOOL]),
    "texts": [json.dumps(TOOL)],
    "function as text": [{**TOOL, "function": json.dumps(TOOL["function"])}],
    "parameters as text": [
        {"type": "function", "function": {"name": "f", "parameters": '{"type": "object", "properties": {}}'}}
    ],
}


@pytest.mark.parametrize("name", SPELT)
def test_tools_as_json_text_are_not_encoded_twice(name: str) -> None:
    chat = parse(spoken({"name": "f"}, tools=SPELT[name]))
    assert chat.tools == [TOOL]
    assert json.dumps(TOOL) in ChatTemplate(TEMPLATES["glm"]).render(chat.messages, chat.tools)


def test_tools_that_are_none_or_wrong() -> None:
    for none in (None, "", "  ", [], "[]", "null"):
        assert parse(spoken({"name": "f"}, tools=none)).tools is None
    for tools, expected in (
        (["f"], "tools[0] is text, but not valid JSON: Expecting value at column 1"),
        (["3"], "tools[0] is a number, expected an object"),
        ([7], "tools[0] is a number, expected an object"),
        ('{"a": 1, "a": 2}', "tools is text, but not valid JSON: the key 'a' stands twice in one object"),
        ({"name": "f"}, "tools is an object, expected a list"),
        (
            [{"name": "f", "parameters": '{"a": NaN}'}],
            "tools[0].parameters is text, but not valid JSON: NaN is not JSON",
        ),
        ([{"name": "f", "least": float("inf")}], "tools has the number inf, which is not JSON"),
    ):
        with pytest.raises(BadRow) as caught:
            parse(spoken({"name": "f"}, tools=tools))
        assert str(caught.value) == expected


ABSENT = object()
NOTHING = [ABSENT, None, "", " \n", "null", "{}", {}]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("arguments", NOTHING, ids=["absent", "null", "empty", "space", "null text", "{} text", "{}"])
def test_a_call_without_parameters(arguments: Any, wrapped: bool, tmp_path: Path) -> None:
    call = {"name": "now"} if arguments is ABSENT else {"name": "now", "arguments": arguments}
    row = spoken({"type": "function", "function": call} if wrapped else call)
    template = ChatTemplate(TEMPLATES["glm"])
    found = chats(write_lines(tmp_path / "rows.jsonl", row))
    if arguments != {}:  # of which parquet has no column
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
        found += chats(tmp_path / "rows.parquet")
        # Beside a call that has some, in the same column.
        if not isinstance(arguments, str):
            other = {"name": "at", "arguments": {"zone": "UTC"}}
            rows = [row, spoken({"type": "function", "function": other} if wrapped else other)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
            found += chats(tmp_path / "rows.parquet")[:1]
    for chat in found:
        inner = calls_of(chat)[0]["function"] if wrapped else calls_of(chat)[0]
        assert inner == {"name": "now", "arguments": {}}
        assert template.render(chat.messages).endswith("<tool_call>now</tool_call>")


def test_calls_as_json_text() -> None:
    call = {"name": "f", "arguments": {"x": None}}
    for calls in (json.dumps([call]), [json.dumps(call)]):
        row = spoken()
        row["messages"][1]["tool_calls"] = calls
        assert calls_of(parse(row)) == [call]


def test_calls_that_can_t_be_read() -> None:
    for call, expected in (
        ({"name": "f", "arguments": '{"x": NaN}'}, ".arguments is text, but not valid JSON: NaN is not JSON"),
        (
            {"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}},
            ".function.arguments is text, but not valid JSON: the key 'x' stands twice in one object",
        ),
        ({"name": "f", "arguments": '{"x": 1'}, ".arguments is text, but not valid JSON: Expecting ',' delimiter at "
         "column 8"),
        ({"name": "f", "arguments": '{"x": ' + "[" * 500 + "]" * 500 + "}"},
         ".arguments is text, but not valid JSON: nested more than 100 deep"),
        ({"name": "f", "parameters": {"x": 1}}, " has parameters, expected arguments"),
        (7, " is a number, expected an object"),
        ("f()", " is text, but not valid JSON: Expecting value at column 1"),
    ):  # fmt: skip
        with pytest.raises(BadRow) as caught:
            parse(spoken(call))
        assert str(caught.value) == f"messages[1].tool_calls[0]{expected}"
    row = spoken({"name": "f", "arguments": {"x": float("nan")}})
    with pytest.raises(BadRow, match=r"^messages\[1\]\.tool_calls has the number nan, which is not JSON$"):
        parse(row)
