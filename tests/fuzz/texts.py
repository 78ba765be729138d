"""Targets of text: rows, tokenizers, chat templates, YAML."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from tests.fuzz.mutations import bytes_near, json_near, text_of
from tests.text_helpers import TEMPLATES, save_checkpoint_texts
from train.config.load import parse_config
from train.config.sections import Format
from train.data.chat import RenderError
from train.data.template_files import load_chat_template
from train.data.tokenizer import load_tokenizer
from train.rows.bad_rows import BadRow
from train.rows.files import read_rows
from train.rows.parse import parse_row

Readable = Callable[[], AbstractContextManager[None]]

_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, null]}'}}
_ROWS: dict[Format, Any] = {
    "messages": {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [_CALL]},
            {"role": "tool", "content": "t"},
            {"role": "assistant", "content": "a", "train": True, "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    },
    "prompt_completion": {"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]},
    "text": {"text": "t", "other": [1]},
}
_SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f"}'}]}


@st.composite
def _row_files(draw: st.DrawFn) -> tuple[Format, str, bytes]:
    """A format, a file's name, and its bytes."""
    form: Format = draw(st.sampled_from(list(_ROWS)))
    base = _SHAREGPT if form == "messages" and draw(st.booleans()) else _ROWS[form]
    lines = [draw(text_of(base)) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.integers(0, 4)) == 0:
        return form, "rows.json", b"[" + b",".join(lines) + b"]"
    if draw(st.integers(0, 6)) == 0:
        return form, "rows.csv", draw(bytes_near(b"prompt,completion,text\na,b,c\n"))
    if draw(st.integers(0, 4)) == 0:
        return (
            form,
            "rows.parquet",
            _parquet_bomb() if draw(st.integers(0, 30)) == 17 else draw(bytes_near(_parquet(form))),
        )
    if draw(st.integers(0, 4)) == 0:
        data = gzip.compress(b"\n".join(lines), 1)
        if draw(st.integers(0, 30)) == 17:
            data = b"".join(gzip.compress(text, 1) for text in _BOMBS[draw(st.integers(0, len(_BOMBS) - 1))])
        return form, draw(st.sampled_from(["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz"])), draw(bytes_near(data))
    return form, "rows.jsonl", b"\n".join(lines)


# Beginnings and many times the rest of a row, an element and a cell of 256 MiB.
_LONG = [b"x" * (8 << 20)] * 32
_BOMBS = ([b'{"text": "', *_LONG], [b'[{"text": "', *_LONG], [b'text\n"', *_LONG])


@functools.cache
def _parquet(form: Format) -> bytes:
    row = dict(_ROWS[form])
    if form == "messages":  # a column has one type: no message whose content is a list
        row["messages"] = [message for message in row["messages"] if not isinstance(message["content"], list)]
    return _parquet_of(pyarrow.Table.from_pylist([row] * 3))


@functools.cache
def _parquet_bomb() -> bytes:
    """500 bytes of 256 rows of 4 MiB."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256, pyarrow.int32()), ["x" * (4 << 20)])
    return _parquet_of(pyarrow.table({"text": text}))


def _parquet_of(table: pyarrow.Table) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd", store_schema=False)
    return buffer.getvalue()


def _open_rows(folder: Path, readable: Readable, drawn: tuple[Format, str, bytes]) -> None:
    form, name, data = drawn
    (folder / name).write_bytes(data)
    with readable():
        for row in read_rows(folder / name, form=form, key="data.train"):
            if row.problem is not None:
                assert str(row.problem) and len(str(row.problem)) < 2000
                continue
            with contextlib.suppress(BadRow):
                parse_row(row.values or {}, form)


@functools.cache
def _texts(folder: Path) -> Path:
    return save_checkpoint_texts(folder / "texts", "qwen")


def _open_tokenizer(folder: Path, readable: Readable, drawn: tuple[str, bytes]) -> None:
    name, data = drawn
    changed = folder / "changed-tokenizer"
    changed.mkdir(exist_ok=True)
    for file in _texts(folder).iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / name).write_bytes(data)
    with readable():
        tokenizer = load_tokenizer(changed)
        tokenizer.decode(tokenizer.encode("a <|im_end|> ü b"))


def _open_template(folder: Path, readable: Readable, data: bytes) -> None:
    changed = folder / "changed-template"
    changed.mkdir(exist_ok=True)
    (changed / "chat_template.jinja").write_bytes(data)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with readable():
        template = load_chat_template(changed, {"eos_token": "<e>"})
        assert template is not None
        for answer in template.renderings_of([(messages, [False, True], None)]):
            assert isinstance(answer, RenderError) or all(one.spans for one in answer)


def _open_yaml(readable: Readable, data: bytes) -> None:
    with readable():
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return
        parse_config(text, name="my.yaml")


_HARMFUL = st.sampled_from(
    [
        b"{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        b"{{ '{:>9000000000}'.format('x') }}",
        b"{{ 'ab' * 7000000000 }}",
        b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        b"{% break %}",
        b"{{ ''.__class__.__mro__ }}",
        b"{{" + b"(" * 4000,
    ]
)  # fmt: skip


def text_inputs(
    folder: Path, readable: Readable
) -> Iterator[tuple[str, st.SearchStrategy[Any], Callable[[Any], None]]]:
    """Names, inputs, and what opens one, in `folder`."""
    yield "rows", _row_files(), functools.partial(_open_rows, folder, readable)
    texts = _texts(folder)
    files = []
    for path in sorted(texts.glob("*.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        near = json_near(value) if path.name != "tokenizer.json" else st.just(value)
        data = st.one_of(near.map(lambda value: json.dumps(value).encode()), bytes_near(path.read_bytes()))
        files.append(st.tuples(st.just(path.name), data))
    yield "tokenizers", st.one_of(files), functools.partial(_open_tokenizer, folder, readable)
    sources = [bytes_near(source.encode()) for source in TEMPLATES.values()]
    yield "templates", st.one_of(*sources, _HARMFUL), functools.partial(_open_template, folder, readable)
    config = (Path(__file__).parents[2] / "configs" / "glm47_qlora.yaml").read_bytes()
    yield "yaml", bytes_near(config), functools.partial(_open_yaml, readable)
