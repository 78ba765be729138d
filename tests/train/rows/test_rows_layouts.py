"""Layouts of rows that public data sets have, and what is said about a row under the wrong format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from quant.common.errors import NibbleError
from tests.text_helpers import TEMPLATES, byte_level_tokenizer, save_checkpoint_texts, say, write_lines
from train.data.chat import ChatTemplate
from train.data.examples import build_examples
from train.data.template_files import load_chat_template
from train.data.tokenizer import load_tokenizer
from train.rows.bad_rows import BadRow
from train.rows.files import read_rows
from train.rows.parse import Chat, Completion, parse_row


def parse(row: Any, form: Any = "messages", **fields: str) -> Chat:
    chat = parse_row(row, form, fields)
    assert isinstance(chat, Chat)
    return chat


def problem(row: Any, form: Any = "messages", **fields: str) -> str:
    with pytest.raises(BadRow) as caught:
        parse_row(row, form, fields)
    return str(caught.value)


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("content", ["", " \n", []])
@pytest.mark.parametrize("name", ["glm", "qwen", "marked", "plain"])
def test_an_empty_instruction_is_rendered_as_transformers_does(role: str, content: Any, name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    chat = parse({"messages": [{"role": role, "content": content}, *say("q", "a")]})
    text = "" if content == [] else content
    assert chat.messages[0] == {"role": role, "content": text}
    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer())
    messages = [{"role": role, "content": text}, *say("q", "a")]
    expected = reference.apply_chat_template(messages, tokenize=False, chat_template=TEMPLATES[name])
    assert ChatTemplate(TEMPLATES[name]).render(chat.messages) == expected
    assert problem({"messages": [{"role": role, "content": None}, *say("q", "a")]}) == "messages[0].content is null"
    assert problem({"messages": [{"role": "user", "content": text}, *say("q", "a")]}) == "messages[0].content is empty"


def test_prompt_and_completion_of_messages() -> None:
    prompt, completion = say("q", "a", "Q"), [{"role": "assistant", "content": "A"}, *say("and", "B")]
    chat = parse({"prompt": prompt, "completion": completion}, "prompt_completion")
    assert chat.messages == prompt + completion
    assert chat.trained == [False, False, False, True, False, True], "of the prompt nothing is learnt"
    tool = {"type": "function", "function": {"name": "f"}}
    assert parse({"prompt": prompt, "completion": "A", "tools": [tool]}, "prompt_completion") == Chat(
        [*prompt, {"role": "assistant", "content": "A"}], [False, False, False, True], [tool]
    )
    assert parse(
        {"p": "q", "c": [{"from": "gpt", "value": "a"}]}, "prompt_completion", prompt="p", completion="c"
    ) == Chat(say("q", "a"), [False, True])
    row: dict[str, Any] = {"prompt": prompt, "completion": say("no answer")}
    assert problem(row, "prompt_completion") == "completion has no assistant message, so there is nothing to learn"
    row = {"prompt": [], "completion": "a"}
    assert problem(row, "prompt_completion") == "prompt is empty"
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": ""}]}
    assert problem(row, "prompt_completion") == "completion[0].content is empty"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_row({"prompt": parts, "completion": "c"}, "prompt_completion") == Completion("ab", "c")


def test_what_is_learnt_of_a_completion_of_messages(tmp_path: Path) -> None:
    folder = save_checkpoint_texts(tmp_path / "model", "qwen")
    tokenizer = load_tokenizer(folder)
    row = {"prompt": say("q", "a", "Q"), "completion": [{"role": "assistant", "content": "A"}]}
    settings: dict[str, Any] = {"form": "prompt_completion", "tokenizer": tokenizer, "sequence_length": 999}
    path = write_lines(tmp_path / "rows.jsonl", row)
    examples, _ = build_examples(path, template=load_chat_template(folder, tokenizer.special_tokens), **settings)
    tokens, mask = examples[0]
    assert tokenizer.decode(tokens[mask]) == "A<|im_end|>"
    assert np.flatnonzero(mask).tolist() == list(range(mask.argmax(), mask.argmax() + mask.sum())), "in one piece"
    with pytest.raises(NibbleError, match=r":1: messages need a chat template, which the checkpoint doesn't have$"):
        build_examples(path, template=None, **settings)


def test_messages_as_json_text(tmp_path: Path) -> None:
    text = json.dumps(say("q", "a"))
    assert parse({"messages": text}) == parse({"messages": [json.dumps(one) for one in say("q", "a")]})
    assert parse({"messages": text}) == parse({"conversations": text}) == Chat(say("q", "a"), [False, True])
    assert problem({"messages": "[1"}) == ("messages is text, but not valid JSON: Expecting ',' delimiter at column 3")
    assert problem({"messages": "[1]"}) == "messages[0] is a number, expected an object"
    assert problem({"messages": "hi"}) == "messages is text, expected a list of messages"
    path = tmp_path / "rows.csv"
    path.write_text('messages,n\n"' + text.replace('"', '""') + '",1\n')
    (row,) = read_rows(path, form="messages", key="data.train")
    assert parse(row.values) == Chat(say("q", "a"), [False, True])


SHAREGPT = {
    "conversations": [
        {"from": "system", "value": ""},
        {"from": "human", "value": "go"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": ""},
        {
            "from": "function_call",
            "value": '[{"name": "f", "arguments": ""}, {"name": "g", "arguments": "{\\"y\\": null}"}]',
        },
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "done"},
    ],
    "tools": '[{"name": "f"}]',
}
AS_MESSAGES = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "go"},
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    },
    {"role": "tool", "content": ""},
    {
        "role": "assistant",
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {}}},
            {"type": "function", "function": {"name": "g", "arguments": {"y": None}}},
        ],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "done"},
]


def test_sharegpt_is_found_by_itself(tmp_path: Path) -> None:
    expected = Chat(AS_MESSAGES, [False, False, True, False, True, False, True], [{"name": "f"}])
    assert parse(SHAREGPT) == expected
    assert parse(SHAREGPT, messages="conversations", role="from", content="value") == expected
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([SHAREGPT]), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet", form="messages", key="data.train")
    assert parse(row.values) == expected
    # As transformers renders the messages that it means.
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer())
    for name in ("glm", "qwen"):
        ours = ChatTemplate(TEMPLATES[name]).render(parse(SHAREGPT).messages)
        assert ours == reference.apply_chat_template(AS_MESSAGES, tokenize=False, chat_template=TEMPLATES[name])

    both = {**SHAREGPT, "messages": say("q", "a")}
    assert parse(both).messages == say("q", "a"), "the format's own name goes first"
    assert parse({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}).messages == say(
        "q", "a"
    )
    assert problem(SHAREGPT, role="speaker").startswith(
        "conversations[0]: no field 'speaker'; the message has from, value"
    )
    assert problem(SHAREGPT, messages="chats").startswith("no field 'chats'; the row has conversations, tools")


def test_function_calls_that_can_t_be_read() -> None:
    for value, expected in (
        ("f(1)", " is text, but not valid JSON: Expecting value at column 1"),
        ("", " is text, but not valid JSON: Expecting value at column 1"),
        (None, "[0] is null, expected an object"),
        ("[3]", "[0] is a number, expected an object"),
    ):
        row = {"conversations": [{"from": "human", "value": "go"}, {"from": "function_call", "value": value}]}
        assert problem(row) == f"conversations[1].value{expected}"


FITTING = [
    (
        "messages",
        {"question": "q", "answer": "a"},
        "no field 'messages'; the row has question, answer. Set data.format: prompt_completion and data.fields: "
        "{prompt: question, completion: answer}",
    ),
    (
        "messages",
        {"instruction": "q", "input": "", "output": "a"},
        "no field 'messages'; the row has instruction, input, output. Set data.format: prompt_completion and "
        'data.fields: {prompt: "{instruction}\\n\\n{input}", completion: output}',
    ),
    (
        "prompt_completion",
        {"question": "q", "response": "a"},
        "no field 'prompt'; the row has question, response. Set data.fields: {prompt: question, completion: response}",
    ),
    ("messages", {"prompt": "q", "completion": "a"}, "no field 'messages'; the row has prompt, completion. Set "
     "data.format: prompt_completion"),
    ("messages", {"text": "t", "id": 1}, "no field 'messages'; the row has text, id. Set data.format: text"),
    ("text", {"messages": say("q", "a")}, "no field 'text'; the row has messages. Set data.format: messages"),
    ("prompt_completion", SHAREGPT, "no field 'prompt'; the row has conversations, tools. Set data.format: messages"),
    ("prompt_completion", {"prompt": "q", "chosen": "a", "rejected": "b"}, "no field 'completion'; the row has prompt, "
     "chosen, rejected. Set data.fields: {prompt: prompt, completion: chosen}"),
    ("messages", {"data": [{"messages": say("q", "a")}]}, "no field 'messages'; the row has data. Rows stand on a line "
     "each, or in one array"),
    ("messages", {"body": "t"}, "no field 'messages'; the row has body (data.fields maps names)"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "row", "expected"), FITTING)
def test_rows_of_another_format_name_the_keys_to_set(
    form: str, row: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert problem(row, form) == expected
    if "data.format: messages" in expected or "on a line each" in expected or "maps names" in expected or "text" in row:
        return
    # And with these keys the row is read.
    keys = expected.partition("data.fields: {")[2].removesuffix("}")
    fields = {}
    for name, column in (entry.split(": ", 1) for entry in keys.split(", ") if entry):
        fields[name] = json.loads(column) if column.startswith('"') else column
    assert parse_row(row, "prompt_completion", fields) == Completion("q", "a")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with pytest.raises(NibbleError) as caught:
        next(read_rows(tmp_path / "rows.parquet", form=form, key="data.train"))  # type: ignore[arg-type]
    text = expected.replace("the row has", "the file has")
    assert str(caught.value) == f"data.train: {tmp_path / 'rows.parquet'}: {text}"


def test_values_out_of_rows_reach_no_terminal_raw() -> None:
    evil = "\x1b[2J" + "x" * 1000
    for row, form in (
        ({evil: "a"}, "text"),
        ({"messages": [{"role": evil, "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": evil}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "q", "weight": evil}]}, "messages"),
        ({"messages": [{evil: "user", "content": "q"}]}, "messages"),
    ):
        said = problem(row, form)
        assert said.isprintable()
        assert len(said) < 400


def test_a_prompt_and_completion_that_are_json_of_messages() -> None:
    """As tables keep them: learnt as messages, and not as text with brackets."""
    prompt, completion = say("q"), [{"role": "assistant", "content": "a"}]
    row = {"prompt": json.dumps(prompt), "completion": json.dumps(completion)}
    assert parse_row(row, "prompt_completion") == parse_row(
        {"prompt": prompt, "completion": completion}, "prompt_completion"
    )
    for text in ("[1] is the first source", '["a", "b"]', "[]", '[{"name": "f"}]'):
        assert parse_row({"prompt": text, "completion": "a"}, "prompt_completion") == Completion(text, "a")
    assert problem({"prompt": prompt[0], "completion": "a"}, "prompt_completion") == (
        "prompt is an object, expected text or a list of messages"
    )
