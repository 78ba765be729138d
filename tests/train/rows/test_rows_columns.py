"""Columns of the rows: joined by data.fields, and told where nothing reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from quant.common.errors import NibbleError
from tests.text_helpers import TEMPLATES, save_checkpoint_texts, say, write_lines
from train.config.load import parse_config
from train.data.chat import ChatTemplate
from train.data.examples import build_examples
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.rows.bad_rows import BadRow
from train.rows.parse import Chat, Completion, Text, parse_row

ALPACA = [
    {"instruction": f"do {i}", "input": "" if i % 3 else f"this {i}", "output": f"done {i}", "id": i} for i in range(10)
]
PLAIN = {"prompt": "instruction", "completion": "output"}
JOINED = {**PLAIN, "prompt": "{instruction}\n\n{input}"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_checkpoint_texts(tmp_path_factory.mktemp("model"), "qwen"))


def told(tokenizer: Tokenizer, *files: Path, form: Any = "prompt_completion", fields: dict[str, str]) -> list[str]:
    lines: list[str] = []
    template = ChatTemplate(TEMPLATES["qwen"])
    build_examples(
        files, form=form, tokenizer=tokenizer, template=template, sequence_length=99, fields=fields, warn=lines.append
    )
    return lines


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        return write_lines(path, *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_that_are_not_used_are_told_once(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{kind}", ALPACA)
    assert told(tokenizer, path, fields=PLAIN) == [
        "data.train: columns with content that are not used: input (4 of 10 rows). (data.fields joins columns: prompt: "
        '"{instruction}\\n\\n{input}".)'
    ]
    assert told(tokenizer, path, fields=JOINED) == []
    rows = [{"messages": say("q", "a"), "system": "Be brief." if i < 3 else None, "n": 1.5} for i in range(7)]
    rows[0].update(tags=None, meta=None)  # pyarrow takes the columns of the first row
    rows += [{"messages": say("q", "a"), "tags": ["x"], "meta": {"a": 1}}, {"messages": say("q", "a"), "tags": []}]
    path = write(tmp_path / f"chats.{kind}", rows)
    lines = told(tokenizer, path, form="messages", fields={})
    assert len(lines) == 1
    assert "system (3 of 9 rows), " in lines[0]
    assert "tags (1 of 9 rows)" in lines[0]
    assert "meta (1 of 9 rows)" in lines[0]
    assert lines[0].endswith(". (data.fields: {system: system} puts it first.)")
    assert "system" not in "".join(told(tokenizer, path, form="messages", fields={"system": "system"}))


def test_columns_of_several_files_are_counted_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", ALPACA), write(tmp_path / "b.parquet", ALPACA * 2)]
    (line,) = told(tokenizer, *files, fields=PLAIN)
    assert "input (12 of 30 rows)" in line
    images = [{"text": "a", "image": {"bytes": b"\x00", "path": "x.png"}, "raw": b"1"}]
    (line,) = told(tokenizer, write(tmp_path / "c.parquet", images), form="text", fields={})
    assert line == "data.train: columns with content that are not used: image (binary), raw (binary)."


def test_parquet_columns_of_every_kind_of_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    columns = {
        "text": pyarrow.array(["a", "b", "c"]),
        "large": pyarrow.array(["x", "", None], pyarrow.large_string()),
        "coded": pyarrow.array(["x", "x", ""]).dictionary_encode(),
        "listed": pyarrow.array([[1], [], None], pyarrow.large_list(pyarrow.int64())),
        "fixed": pyarrow.array([[1, 2], None, None], pyarrow.list_(pyarrow.int64(), 2)),
        "mapped": pyarrow.array([[("a", 1)], None, None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "number": pyarrow.array([1, 2, 3]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    (line,) = told(tokenizer, tmp_path / "rows.parquet", form="text", fields={})
    for name, count in (("large", 1), ("coded", 2), ("listed", 1), ("fixed", 1), ("mapped", 1)):
        assert f"{name} ({count} of 3 rows)" in line
    assert "number" not in line


def test_names_of_columns_reach_no_terminal_raw(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"text": "a", "\x1b[31mred": "b", "x" * 500: "c"})
    (line,) = told(tokenizer, path, form="text", fields={})
    assert line.isprintable()
    assert "\\x1b[31mred (1 of 1 rows)" in line
    assert len(line) < 300


def test_joined_columns() -> None:
    row = {"a": "A", "b": "B", "none": None, "number": 3, "list": ["x"], "yes": True, "blank": " "}

    def text(template: str) -> str:
        parsed = parse_row(row, "text", {"text": template})
        assert isinstance(parsed, Text)
        return parsed.text

    assert text("{a}\n\n{b}") == "A\n\nB"
    assert text("{{{a}}} {b}}}{{") == "{A} B}{"
    assert text("{a}{a}, {none}{absent}: {number}") == "AA, : 3"
    for template, expected in (
        ("Q: {none} {blank}", "none and blank are empty"),
        ("Q: {absent}", "absent is empty"),
        ("{a}{list}", "list is a list, expected text"),
        ("{a}{yes}", "yes is true, expected text"),
    ):
        with pytest.raises(BadRow) as caught:
            text(template)
        assert str(caught.value) == expected
    both = parse_row(ALPACA[0], "prompt_completion", JOINED)
    assert both == Completion("do 0\n\nthis 0", "done 0")
    assert parse_row(ALPACA[1], "prompt_completion", JOINED) == Completion("do 1", "done 1")
    assert text("{none}\n\n{a} {absent}\n{b}\n") == "A\nB\n", "white space beside an empty column goes with it"
    assert text("{none}\nQ: {a}\n{none}.") == "\nQ: A."


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_joined_column_that_no_row_has(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{kind}", ALPACA)
    with pytest.raises(NibbleError) as caught:
        told(tokenizer, path, fields={**PLAIN, "prompt": "{instruction} {inptu}"})
    assert str(caught.value) == (
        f"data.fields.prompt: data.train: {path}: no field 'inptu' (did you mean 'input'?); its rows have instruction, "
        "input, output, id (data.fields maps names)"
    )


def test_a_column_for_the_system_s_message() -> None:
    row = {"messages": say("q", "a"), "system": "Be brief.", "persona": "Ann"}
    chat = parse_row(row, "messages", {"system": "system"})
    assert chat == Chat([{"role": "system", "content": "Be brief."}, *say("q", "a")], [False, False, True])
    chat = parse_row(row, "messages", {"system": "You are {persona}. {system}"})
    assert isinstance(chat, Chat)
    assert chat.messages[0] == {"role": "system", "content": "You are Ann. Be brief."}
    for empty in ({"system": None}, {"system": ""}, {}):
        row = {"messages": say("q", "a"), **empty}
        assert parse_row(row, "messages", {"system": "system"}) == Chat(say("q", "a"), [False, True])
    row = {"messages": [{"role": "system", "content": "x"}, *say("q", "a")], "system": "y"}
    with pytest.raises(
        BadRow, match=r"^messages begins with a system message, and data\.fields\.system gives one too$"
    ):
        parse_row(row, "messages", {"system": "system"})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            "format: text, fields: {text: '{a} {b'}",
            "data.fields.text: '{' at character 5 has no partner (a brace itself: {{).",
        ),
        (
            "format: text, fields: {text: '{a} {}'}",
            "data.fields.text: '{' at character 5 has no partner (a brace itself: {{).",
        ),
        (
            "fields: {messages: '{a}{b}'}",
            "data.fields.messages is no text that could join columns; name one column. (Columns are joined for "
            "system.)",
        ),
        (
            "format: prompt_completion, fields: {prompt: '{a}', completion: '{a}'}",
            "data.fields: two fields are read from the same name; give each its own.",
        ),
    ],
)
def test_wrong_joins_are_errors_of_their_key(data: str, expected: str) -> None:
    with pytest.raises(NibbleError) as caught:
        parse_config(f"model: {{path: x}}\ndata: {{train: x, {data}}}\noutput: {{dir: x}}\n", (), "my.yaml")
    assert str(caught.value) == f"my.yaml:2: {expected}"
