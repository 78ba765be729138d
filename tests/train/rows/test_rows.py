"""Rows checked one by one, and what is said about bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant.common.errors import NibbleError
from tests.text_helpers import say
from train.rows.bad_rows import BadRow, RowLog, SkippedRow, write_skipped_rows
from train.rows.parse import Chat, Completion, Text, parse_row

GSM8K = {"prompt": "question", "completion": "answer"}


def parse(form: Any, row: dict[str, Any], **fields: str) -> Any:
    return parse_row(row, form, fields)


def problem(row: Any, form: Any = "messages", **fields: str) -> tuple[str, str]:
    with pytest.raises(BadRow) as caught:
        parse(form, row, **fields)
    return caught.value.reason, str(caught.value)


def test_the_three_formats() -> None:
    assert parse("text", {"text": "hello", "id": 3}) == Text("hello")
    assert parse("prompt_completion", {"question": "2+2?", "answer": "4"}, **GSM8K) == Completion("2+2?", "4")
    messages = say("hi", "hello")
    assert parse("messages", {"messages": messages}) == Chat(messages, [False, True], None)


def test_messages_under_other_names() -> None:
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello", "score": 3}]}
    chat = parse("messages", row, messages="conversations", role="from", content="value")
    assert chat.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "score": 3},
    ]
    assert chat.trained == [False, True]
    row["conversations"][1]["value"] = None
    fields = {"messages": "conversations", "role": "from", "content": "value"}
    assert problem(row, **fields) == ("null", "conversations[1].value is null")


def test_turns_that_are_not_to_be_learnt() -> None:
    messages = say("q", "a", "q", "a", "q", "a", "q", "a")
    messages[1]["train"] = False
    messages[3]["weight"] = 0
    messages[5]["weight"] = 1.0
    messages[7]["train"] = None
    chat = parse("messages", {"messages": messages})
    assert [i for i, wanted in enumerate(chat.trained) if wanted] == [5, 7]
    assert all(set(message) == {"role", "content"} for message in chat.messages)


def test_parts_of_text_are_joined_and_tool_calls_read() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, {"name": "g", "arguments": "no json"}]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "tool_calls": [{"name": "g", "arguments": {"y": 2}}]},
    ]
    chat = parse("messages", {"messages": messages, "tools": '[{"name": "f"}]'})
    assert chat.messages[0]["content"] == "ab"
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": [1]}
    assert chat.messages[1]["tool_calls"][1]["arguments"] == "no json"
    assert "content" not in chat.messages[1]
    assert chat.messages[2] == {"role": "tool", "content": "", "tool_call_id": "1"}
    assert chat.tools == [{"name": "f"}]
    assert parse("messages", {"messages": say("q", "a"), "tools": []}).tools is None


def message_problem(**changes: Any) -> tuple[str, str]:
    messages = say("q", "a", "again")
    for key, value in changes.items():
        messages[2][key] = value
    return problem({"messages": messages})


def test_bad_messages() -> None:
    assert message_problem(content=None) == ("null", "messages[2].content is null")
    assert message_problem(content=" \n") == ("empty", "messages[2].content is empty")
    assert message_problem(content=5) == ("wrong_type", "messages[2].content is a number, expected text")
    assert message_problem(content={"a": 1}) == ("wrong_type", "messages[2].content is an object, expected text")
    assert message_problem(content=[]) == ("empty", "messages[2].content is empty")
    assert message_problem(content=[{"type": "image_url"}]) == (
        "unsupported_part",
        "messages[2].content[0] is of type 'image_url'; only parts of type 'text' can be trained on",
    )
    assert message_problem(content=["bare"])[1].startswith("messages[2].content[0] is text; only parts of type 'text'")
    assert message_problem(content=[{"type": "text"}]) == ("null", "messages[2].content[0].text is null, expected text")
    assert message_problem(role="asistant") == (
        "unknown_role",
        "messages[2].role is 'asistant' (did you mean 'assistant'?); known roles are system, developer, user, "
        "assistant, tool, function",
    )
    assert message_problem(role=None) == ("null", "messages[2].role is null")
    assert message_problem(train="no") == ("wrong_type", "messages[2].train is text, expected true or false")
    assert message_problem(weight=0.5) == ("wrong_type", "messages[2].weight is 0.5, expected 0 or 1")
    assert message_problem(tool_calls="f()") == (
        "malformed_json",
        "messages[2].tool_calls is text, but not valid JSON: Expecting value at column 1",
    )
    assert message_problem(tool_calls={"name": "f"}) == (
        "wrong_type",
        "messages[2].tool_calls is an object, expected a list of objects",
    )
    assert problem({"messages": [*say("q", "a"), "text"]}) == ("wrong_type", "messages[2] is text, expected an object")
    assert problem({"messages": [None]}) == ("null", "messages[0] is null, expected an object")
    assert problem({"messages": [{"role": "user", "contents": "q"}]}) == (
        "missing_field",
        "messages[0]: no field 'content' (did you mean 'contents'?); the message has role, contents (data.fields maps "
        "names)",
    )


def test_bad_rows_of_messages() -> None:
    assert problem({"messages": None}) == ("null", "messages is null, expected a list of messages")
    assert problem({"messages": "hi"}) == ("wrong_type", "messages is text, expected a list of messages")
    assert problem({"messages": []}) == ("empty", "messages is empty")
    assert problem({"message": [], "id": 1}) == (
        "missing_field",
        "no field 'messages' (did you mean 'message'?); the row has message, id (data.fields maps names)",
    )
    assert problem({}) == ("missing_field", "no field 'messages'; the row has nothing (data.fields maps names)")
    assert problem({"messages": say("hi")}) == (
        "nothing_to_learn",
        "messages has no assistant message, so there is nothing to learn",
    )
    assert problem({"messages": say("hi", "a", train=False)}) == (
        "nothing_to_learn",
        "every assistant message of messages has train: false or weight: 0",
    )
    assert problem({"messages": say("q", "a"), "tools": {"name": "f"}}) == (
        "wrong_type",
        "tools is an object, expected a list",
    )
    assert problem({"messages": say("q", "a"), "tools": "f"})[1].startswith(
        "tools is text, but not valid JSON: Expecting"
    )


def test_bad_texts_and_completions() -> None:
    assert problem({"text": None}, "text") == ("null", "text is null")
    assert problem({"text": True}, "text") == ("wrong_type", "text is true, expected text")
    assert problem({"question": "q", "answer": ""}, "prompt_completion", **GSM8K) == ("empty", "answer is empty")
    many = {f"column{i}": 0 for i in range(20)}
    assert problem(many, "prompt_completion", **GSM8K) == (
        "missing_field",
        f"no field 'question'; the row has {', '.join(list(many)[:12])}, … (data.fields maps names)",
    )


def bad_row(log: RowLog, line: int, reason: str = "null") -> None:
    log.bad("data/train.jsonl", line, BadRow(reason, "messages[2].content is null"))


def test_bad_rows_are_told_counted_and_kept(tmp_path: Path) -> None:
    told: list[str] = []
    log = RowLog("skip", told.append)
    for line in range(1, 1235):
        bad_row(log, line)
    bad_row(log, 1235, "empty")
    assert told[2] == (
        "data/train.jsonl:3: messages[2].content is null; row skipped (data.on_bad_row: skip). 3 such rows so far."
    )
    assert [line.split(":")[1] for line in told] == ["1", "2", "3", "10", "100", "1000", "1235"]
    assert told[0].endswith("1 such row so far.")
    assert told[5].endswith("1,000 such rows so far.")
    assert log.counts == {"null": 1234, "empty": 1}
    write_skipped_rows(tmp_path / "skipped_rows.jsonl", log.skipped)
    lines = (tmp_path / "skipped_rows.jsonl").read_text().splitlines()
    assert len(lines) == 1235
    assert SkippedRow(**json.loads(lines[380])) == SkippedRow(
        "data/train.jsonl", 381, "null", "messages[2].content is null"
    )


def test_bad_rows_can_be_fatal() -> None:
    with pytest.raises(NibbleError) as caught:
        bad_row(RowLog("error"), 381)
    assert str(caught.value) == (
        "data/train.jsonl:381: messages[2].content is null (data.on_bad_row: error).\n"
        "Fix the row, or set data.on_bad_row: skip."
    )
