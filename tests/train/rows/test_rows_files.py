"""Rows read from files of every kind: the same rows from each, and what is said where a file or one row is damaged."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from quant.common.errors import NibbleError
from tests.text_helpers import say
from train.config.load import check_files, parse_config
from train.rows.bad_rows import BadRow
from train.rows.files import Row, read_rows
from train.rows.parse import parse_row


def problem(values: Any) -> tuple[str, str]:
    with pytest.raises(BadRow) as caught:
        parse_row(values, "messages", {})
    return caught.value.reason, str(caught.value)


def parse(form: Any, values: dict[str, Any]) -> Any:
    return parse_row(values, form, {})


def error_of(file: Path, form: Any = "text") -> str:
    with pytest.raises(NibbleError) as caught:
        read(file, form)
    return str(caught.value)


def read(file: Path, form: Any = "text") -> list[Row]:
    return list(read_rows(file, form=form, key="data.train"))


def test_jsonl_with_bom_blank_lines_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\xe2\x80\xa8c"}\r\n{"text": "d"}')
    rows = read(path)
    assert [(row.line, row.values) for row in rows] == [
        (1, {"text": "a"}),
        (4, {"text": "b\u2028c"}),
        (5, {"text": "d"}),
    ]
    assert rows[-1].done == 1
    assert rows[0].file == str(path)


def test_lines_that_can_t_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'{"text": "a"\n{"text": "\xff"}\n[1]\n"x"\nnull\n7\n' + b'{"text": ' + b"1" * 5000 + b"}\n")
    problems = [(row.line, row.problem.reason, str(row.problem)) for row in read(path) if row.problem]
    assert problems[:6] == [
        (1, "malformed_json", "not valid JSON: Expecting ',' delimiter at column 13"),
        (2, "not_utf8", "not valid UTF-8 at byte 10"),
        (3, "not_an_object", "the row is a list, expected an object"),
        (4, "not_an_object", "the row is text, expected an object"),
        (5, "not_an_object", "the row is null, expected an object"),
        (6, "not_an_object", "the row is a number, expected an object"),
    ]
    assert problems[6][1] == "malformed_json"
    path.write_text('{"text": ' + "[" * 100000 + "\n")
    assert [row.problem.reason for row in read(path) if row.problem] == ["malformed_json"]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [say("q", "a"), [{"role": "user", "content": "only", "train": True}], None]
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"messages": messages, "image": [b"0"] * 3})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    rows = read(path, "messages")
    assert [row.line for row in rows] == [1, 2, 3]
    assert rows[-1].done == 1
    assert "image" not in (rows[0].values or {}), "columns that aren't needed aren't read"
    # Parquet fills in the fields that some messages lack with null.
    assert parse("messages", rows[0].values or {}).messages == messages[0]
    assert problem(rows[2].values) == ("null", "messages is null, expected a list of messages")

    with pytest.raises(NibbleError) as caught:
        read(path, "text")
    assert str(caught.value) == (
        f"data.train: {path}: no field 'text'; the file has messages, image. Set data.format: messages"
    )
    path.write_bytes(b"PAR1 no")
    with pytest.raises(NibbleError, match=r"data.train: .*rows.parquet: not a readable parquet file: "):
        read(path, "messages")


def test_parquet_with_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"a", b"\xff", "é".encode()], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    assert [row.values for row in rows] == [{"text": "a"}, None, {"text": "é"}]
    assert (rows[1].line, str(rows[1].problem)) == (2, "not valid UTF-8 at byte 0 of a text")


def test_damaged_parquet_is_an_error_of_the_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text"] * 50}), path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            said = ""
            try:
                read(path)
            except NibbleError as error:
                said = str(error)
            assert not said or (said.startswith(f"data.train: {path}: ") and said.isprintable())


ROWS = [
    {"text": "a"},
    {"text": 'brackets ]}[{, a "quote", a \\ and \n a line', "of": [{"x": ["]"]}, {}]},
    {"text": "é数\u2028😀" * 9, "n": 1.5, "none": None},
]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_an_array_holds_the_rows_that_json_reads(
    indent: int | None, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.rows.files._CHUNK", chunk)
    path = tmp_path / "rows.json"
    for rows in (ROWS, ROWS[:1], []):
        for escaped in (False, True):
            path.write_text("\ufeff \n" + json.dumps(rows, indent=indent, ensure_ascii=escaped) + "\n", "utf-8")
            found = read(path)
            assert [row.values for row in found] == rows
            assert [row.line for row in found] == list(range(1, len(rows) + 1)), "the number of the row"
            assert not rows or found[-1].done == 1


@pytest.mark.parametrize("lines", [True, False])
def test_compressed_files_hold_the_same_rows(lines: bool, tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS) if lines else json.dumps(ROWS)
    path = tmp_path / ("rows.jsonl.gz" if lines else "Rows.JSON.gz")
    path.write_bytes(gzip.compress(text.encode()))
    assert [row.values for row in read(path)] == ROWS
    path.write_bytes(path.read_bytes()[:-9])
    assert error_of(path).startswith(f"data.train: {path} is not a whole gzip file: ")
    path.write_text(text)
    assert error_of(path) == f"data.train: {path} is not a whole gzip file: Not a gzipped file ({text[:2].encode()!r})."


def test_csv_holds_what_was_written(tmp_path: Path) -> None:
    rows = [{"text": "a, b", "of": ""}, {"text": 'two\nlines, "quoted"', "of": "é"}, {"text": "x" * 200_000, "of": "y"}]
    made = io.StringIO()
    writer = csv.DictWriter(made, ["text", "of"])
    writer.writeheader()
    writer.writerows(rows)
    path = tmp_path / "rows.csv"
    path.write_text("\ufeff" + made.getvalue(), "utf-8", newline="")
    found = read(path)
    assert [row.values for row in found] == rows
    assert [row.line for row in found] == [2, 3, 5], "the line on which the row begins"
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row.values for row in read(packed)] == rows


def test_csv_rows_that_can_t_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'text,of\n1,2,3\n\n"a"b,c\n\xff,d\nonly\ngood,row\n')
    found = read(path)
    assert [(row.line, row.problem.reason, str(row.problem)) for row in found if row.problem] == [
        (2, "malformed_csv", "3 cells, the first row has 2"),
        (4, "malformed_csv", "not valid CSV: ',' expected after '\"'"),
        (5, "not_utf8", "not valid UTF-8"),
        (6, "malformed_csv", "1 cell, the first row has 2"),
    ]
    assert found[-1].values == {"text": "good", "of": "row"}
    path.write_text('text,of\na,"b\nc,d\n')
    assert error_of(path) == f"data.train: {path}:2: the quoted cell that begins in this row doesn't end."
    path.write_text("text,text\na,b\n")
    assert "its first row can't be the names of the columns: column 'text' stands twice." in error_of(path)


DAMAGED = {
    "NaN": '{"text": NaN}',
    "-Infinity": '{"text": [-Infinity]}',
    "twice": '{"text": "a", "text": "b"}',
    "large": '{"text": 1e400}',
    "digits": '{"text": ' + "1" * 5000 + "}",
    "deep": '{"text": ' + "[" * 101 + "]" * 101 + "}",
    "very deep": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "comma": '{"text" "a"}',
}
REASONS = {
    "NaN": "not valid JSON: NaN is not JSON",
    "-Infinity": "not valid JSON: -Infinity is not JSON",
    "twice": "not valid JSON: the key 'text' stands twice in one object",
    "large": "not valid JSON: '1e400' is too large a number",
    "digits": "not valid JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits",
    "deep": "not valid JSON: nested more than 100 deep",
    "very deep": "not valid JSON: nested more than 100 deep",
    "comma": "not valid JSON: Expecting ':' delimiter at column 9",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("array", [False, True])
def test_one_damaged_row_is_one_bad_row(name: str, array: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = ['{"text": "before"}', DAMAGED[name], '{"text": "after"}']
    path.write_text("[" + ",\n".join(rows) + "]" if array else "\n".join(rows))
    before, damaged, after = read(path)
    assert (before.values, after.values) == ({"text": "before"}, {"text": "after"})
    assert damaged.line == 2
    assert str(damaged.problem) == REASONS[name]


def test_lists_among_lines_are_bad_rows_and_no_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('[1, 2]\n\n{"text": "a"}\n[3]\n')
    assert [(row.line, row.values, row.problem and str(row.problem)) for row in read(path)] == [
        (1, None, "the row is a list, expected an object"),
        (3, {"text": "a"}, None),
        (4, None, "the row is a list, expected an object"),
    ]


def test_arrays_that_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text, number in (('[{"text": "a"},\n{"text": "b', 2), ("[", 1), ('[{"text": "a"},\n{"text": {"b"]', 2)):
        path.write_text(text)
        assert error_of(path) == (
            f"data.train: {path} is a JSON array that is cut off or damaged: its element {number} doesn't end."
        )
    path.write_text('[\n{"text": "a"}]\n{"text": "b"}')
    assert error_of(path) == f"data.train: {path} is a JSON array with something after its end, element 1."


def test_paths_that_can_t_be_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    expected = {
        "no.jsonl": f"no.jsonl: no such file. Relative paths start at the current directory ({tmp_path}).",
        "no*.jsonl": f"no*.jsonl: no file matches. Relative paths start at the current directory ({tmp_path}).",
        "folder": "folder is a folder; name its files, e.g. folder/*.jsonl.",
        "x" * 300: f"'{'x' * 38}…{'x' * 38}' can't be a file: File name too long.",
        "a\0b.jsonl": "'a\\x00b.jsonl' can't be a file: embedded null byte.",
        "file/rows.jsonl": "'file/rows.jsonl' can't be a file: Not a directory.",
        "/dev/null": "/dev/null is no regular file.",
    }
    for path, text in expected.items():
        with pytest.raises(NibbleError) as caught:
            read_rows(path, form="text", key="data.eval") if "*" not in path else check(path)
        assert str(caught.value) == f"data.eval: {text}"
        with pytest.raises(NibbleError) as caught:
            check(path)
        assert str(caught.value) == f"data.eval: {text}"
    with pytest.raises(
        NibbleError, match=r"^data.eval: file is neither \.jsonl, \.json nor \.csv \(also with \.gz\) nor"
    ):
        read_rows("file", form="text", key="data.eval")


def check(path: str) -> None:
    (Path.cwd() / "rows.jsonl").touch()
    config = parse_config("model: {path: x}\ndata: {train: rows.jsonl}\noutput: {dir: x}")
    check_files(config.model_copy(update={"data": config.data.model_copy(update={"eval": path})}))


# ------------------------------------------------------------------------------------------------ files of other kinds


@pytest.mark.parametrize("data", [b'{\n  "data": [\n', b'{"data": [\n{"text": "a"}\n]}\n', b' { "train": {\n'])
def test_an_object_over_several_lines(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    with pytest.raises(
        NibbleError, match=r"begins with an object over several lines; wanted a row per line, or an arr"
    ):
        read(path)


def test_utf16_and_columns_with_another_separator(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-16")
    with pytest.raises(NibbleError, match=r"rows\.jsonl is text in UTF-16; wanted UTF-8\.$"):
        read(path)
    path = tmp_path / "rows.csv"
    path.write_text("prompt;completion\na;b\n")
    with pytest.raises(NibbleError, match=r"rows\.csv: its columns are separated by ';'; wanted commas\.$"):
        read(path)


def test_a_row_longer_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small compressed file can hold a line or an element without end."""
    longest = 5000
    monkeypatch.setattr("train.rows.files.LONGEST_ROW", longest)
    monkeypatch.setattr("train.rows.files._CHUNK", 1000)
    long = b'"' + b"x" * (longest + 10) + b'"'
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": ' + long + b'}\n{"text": "b"}\n', 1))
    found = read(path)
    assert [(row.line, row.problem.reason) for row in found if row.problem] == [(1, "too_long")]
    assert [row.values for row in found if not row.problem] == [{"text": "b"}], "and the next row is read"
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b'[{"text": "a"}, {"text": ' + long + long + b"}]", 1))
    with pytest.raises(NibbleError, match=r"its element 2 has more than 5,000 bytes"):
        read(path)
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"text\n" + long, 1))
    with pytest.raises(NibbleError, match=r"rows\.csv\.gz:2: the line has more than 5,000 bytes"):
        read(path)
    # All rows of an array may stand on one line that is longer.
    path = tmp_path / "rows.json"
    path.write_bytes(b"[" + b", ".join([b'{"text": "' + b"y" * (longest // 3) + b'"}'] * 4) + b"]")
    assert [len((row.values or {})["text"]) for row in read(path)] == [longest // 3] * 4


def test_parquet_that_holds_a_value_once_for_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 500 bytes can be 60 GB of rows: no more of them are decoded at once than there is room for."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("train.rows.files._DECODED", 4 << 20)
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 64, pyarrow.int32()), ["x" * (1 << 20)])
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 5000
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for row in read_rows(path, form="text", key="data.train")]
    assert len(held) == 64
    assert max(held) < 16 << 20


# Three rows, and statistics of a column's sizes that don't fit its schema.
_BROKEN_STATISTICS = (
    b"c-obc%}N6?5XUFmZCs^bTbPi*B8%9tg>7wx77smG4}#J|@$99PKnwkH8^5kTgh$`Pi%;M~_z1p&;OuTo6}=cpNG3DCf96m6-"
    b"ODDrxPyKV9fUGK_;UCe<f{M-"
    b"04xHQ@gPEuMVj1iL&&UTwp4;u>h?K+LkG?n2SOEb{|CzJW~gKkZ4Vn8n)KE;o1K90kLX5k_hF@%t+`ZHU9~{+<#1%C19Slk6-"
    b"T<(+}jHDd`fFMGC#K?6VuChuaiVv=}yK=iw>1nPUV)Fn5mgr5M22x(%@r3wSX5@2Eu~iA{I|fpJ?y94Jx9hA;AE3<v@o3TxohAKt"
    b"gdd%5kQjYOb|X<{J|qOusYz%>L)cFX5`@pw3cjsO;4dTzld%2Vt-"
    b"n#Md{*)`p8kZ4k%vyWrNu%kg{`9JT9>dQ(MYQsUDE@%!{8z5rK+N0a"
)


def test_parquet_whose_statistics_are_broken(tmp_path: Path) -> None:
    """pyarrow ends the process where it is asked for such a column's metadata; the rows can be read all the same."""
    path = tmp_path / "rows.parquet"
    path.write_bytes(zlib.decompress(base64.b85decode(_BROKEN_STATISTICS)))
    rows = list(read_rows(path, form="text", key="data.train"))
    assert [(row.values or {})["text"] for row in rows] == ["t"] * 3
