"""Files of rows: JSON lines, a JSON array, CSV or parquet; the first three may be compressed with gzip.

What is wrong with one row is that row's problem. What is wrong with the file ends the reading.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from quant.common.errors import NibbleError
from quant.common.jsonfile import JsonError, kind_of, parse_json
from quant.common.words import printable, shown
from train.config.row_paths import require_file
from train.config.sections import Format
from train.rows.bad_rows import BadRow
from train.rows.columns import Columns
from train.rows.parse import columns_read, missing

_CHUNK = 1 << 20  # bytes
_DECODED = 1 << 28  # bytes of a parquet file's rows at once
LONGEST_ROW = 64 << 20  # bytes: books have less, and a line of a compressed file may be longer than memory
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_KINDS = (".jsonl", ".json", ".csv", ".parquet")
_OBJECT_OPENS = re.compile(rb'\s*\{\s*(?:"[^"]*"\s*:\s*[\[{]\s*)?')  # of a line: an object over several lines
# What nests in JSON, whole strings, and the quote that begins a string of which the end isn't there.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},"]', re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One row as the file has it.

    line: 1-based; in a parquet file or a JSON array the number of the row.
    values: None when `problem` is why the row can't be read.
    done: share of the file read so far, 0 to 1, for progress.
    """

    file: str
    line: int
    values: dict[str, Any] | None
    done: float
    problem: BadRow | None = None


def read_rows(
    file: str | Path,
    *,
    form: Format,
    fields: Mapping[str, str] | None = None,
    key: str,
    columns: Columns | None = None,
    at_a_time: int = 1024,
) -> Iterator[Row]:
    """The rows of a file, in order, unchecked.

    fields: {name of the format: name in the file}. key: the config key that names the file, for messages. columns:
    is told of the columns that a parquet reader leaves out, of `at_a_time` rows at a time.
    Raises NibbleError for a file that is missing, of an unknown kind or unreadable as a whole, before the first row.
    """
    path = Path(file)
    require_file(str(file), key)
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in _KINDS or name.endswith(".parquet.gz"):
        raise NibbleError(f"{key}: {path} is neither .jsonl, .json nor .csv (also with .gz) nor .parquet.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise NibbleError(f"{key}: {path} can't be read: {error.strerror}.") from error
    if kind == ".parquet":
        return _read_parquet(path, form, fields or {}, key, columns, at_a_time)
    return _read_text(path, kind == ".csv", key)


def _read_text(path: Path, is_csv: bool, key: str) -> Iterator[Row]:
    size = max(path.stat().st_size, 1)
    with open(path, "rb") as raw:
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw  # type: ignore[assignment]
        try:
            if file.read(2) in _UTF16:
                raise NibbleError(f"{key}: {path} is text in UTF-16; wanted UTF-8.")
            file.seek(0)
            rows = _read_csv(file, path, key) if is_csv else _read_json(file, path, key)
            for line, values, problem in rows:
                yield Row(str(path), line, values, raw.tell() / size, problem)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise NibbleError(f"{key}: {path} is not a whole gzip file: {error}.") from error


_Found = tuple[int, dict[str, Any] | None, BadRow | None]


def _read_json(file: IO[bytes], path: Path, key: str) -> Iterator[_Found]:
    first, lines = True, enumerate(_lines(file), 1)
    for number, line in lines:
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        if first and _OBJECT_OPENS.fullmatch(line):
            raise NibbleError(
                f"{key}: {path} begins with an object over several lines; wanted a row per line, or an array of rows."
            )
        if first and line.lstrip().startswith(b"["):
            if len(line) > LONGEST_ROW:  # of which there is more
                yield from _read_array(file, line, path, key)
                return
            following = next(((at, text) for at, text in lines if text.strip()), None)
            # One array for the whole file, unless the list ends with the line and something follows.
            if following is None or not _is_json(line):
                yield from _read_array(file, line + (following[1] if following else b""), path, key)
                return
            yield number, *_parse_line(line)
            number, line = following
        first = False
        yield number, *_parse_line(line)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines; of one that is longer than LONGEST_ROW bytes, only so much and one more."""
    while line := file.readline(LONGEST_ROW + 1):
        yield line
        while len(line) > LONGEST_ROW and not line.endswith(b"\n"):
            line = file.readline(LONGEST_ROW + 1)


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line)
    except JsonError:
        return False
    return True


def _parse_line(line: bytes) -> tuple[dict[str, Any] | None, BadRow | None]:
    if len(line) > LONGEST_ROW:
        return None, BadRow("too_long", f"the row has more than {LONGEST_ROW:,} bytes")
    try:
        value = parse_json(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        return None, BadRow("not_utf8", f"not valid UTF-8 at byte {error.start}")
    except JsonError as error:
        reason = str(error).replace("at line 1 column", "at column")
        return None, BadRow("malformed_json", f"not valid JSON: {reason}")
    if isinstance(value, dict):
        return value, None
    return None, BadRow("not_an_object", f"the row is {kind_of(value)}, expected an object")


def _read_array(file: IO[bytes], data: bytes, path: Path, key: str) -> Iterator[_Found]:
    """The elements of an array that begins with `data`; each is parsed by itself, so that a bad one is one bad row."""
    data = data.lstrip()[1:]
    number = start = position = depth = 0  # position: where to look on, start: where the element begins
    more = True
    while True:
        found = _TOKEN.search(data, position)
        if found is None or found.group() == b'"':
            if not more:
                where = f"its element {number + 1} doesn't end"
                raise NibbleError(f"{key}: {path} is a JSON array that is cut off or damaged: {where}.")
            if len(data) - start > LONGEST_ROW:
                raise NibbleError(f"{key}: {path}: its element {number + 1} has more than {LONGEST_ROW:,} bytes.")
            position = found.start() - start if found else len(data) - start
            chunk = file.read(max(_CHUNK, len(data) - start))
            more = bool(chunk)
            data, start = data[start:] + chunk, 0
            continue
        token, position = found.group(), found.end()
        if token in (b"[", b"{"):
            depth += 1
        elif token in (b"]", b"}") and depth:
            depth -= 1
        elif token in (b"]", b",") and not depth:
            element = data[start : found.start()].strip()
            if element or token == b",":
                number += 1
                yield number, *_parse_line(element)
            start = position
            if token == b"]":
                break
    if (data[start:] + file.read(_CHUNK)).strip():
        raise NibbleError(f"{key}: {path} is a JSON array with something after its end, element {number}.")


def _read_csv(file: IO[bytes], path: Path, key: str) -> Iterator[_Found]:
    limit = csv.field_size_limit(LONGEST_ROW)  # of the module, there is none of a reader
    try:
        yield from _read_cells(file, path, key)
    finally:
        csv.field_size_limit(limit)


def _read_cells(file: IO[bytes], path: Path, key: str) -> Iterator[_Found]:
    def lines() -> Iterator[str]:
        for at, line in enumerate(_lines(file), 1):
            if len(line) > LONGEST_ROW:
                raise NibbleError(f"{key}: {path}:{at}: the line has more than {LONGEST_ROW:,} bytes.")
            yield line.removeprefix(_BOM if at == 1 else b"").decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    before = 0
    while True:
        line, cells, problem = before + 1, [], None
        try:
            cells = next(reader)
            "".join(cells).encode()
        except StopIteration:
            return
        except UnicodeEncodeError:
            problem = BadRow("not_utf8", "not valid UTF-8")
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise NibbleError(
                    f"{key}: {path}:{line}: the quoted cell that begins in this row doesn't end."
                ) from error
            problem = BadRow("malformed_csv", f"not valid CSV: {error}")
        before = reader.line_num
        if header is None:
            header = cells
            twice = next((name for name in header if header.count(name) > 1), None)
            if problem is not None or twice is not None or not header:
                what = problem or ("it is empty" if twice is None else f"column {shown(twice)} stands twice")
                raise NibbleError(f"{key}: {path}: its first row can't be the names of the columns: {what}.")
            other = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
            if other is not None:
                raise NibbleError(f"{key}: {path}: its columns are separated by {shown(other)}; wanted commas.")
        elif problem is not None:
            yield line, None, problem
        elif len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True)), None
        elif cells:  # not an empty line
            text = f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}, the first row has {len(header)}"
            yield line, None, BadRow("malformed_csv", text)


def _read_parquet(
    path: Path, form: Format, fields: Mapping[str, str], key: str, columns: Columns | None, at_a_time: int
) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        schema = table.schema_arrow
        wanted = columns_read(form, fields, schema.names)
        for name, must in wanted.items():
            if must and name not in schema.names:
                raise NibbleError(f"{key}: {path}: {missing(name, schema.names, 'the file', form)}")
        needed = [name for name in wanted if name in schema.names]
        left = [] if columns is None else _left_out(schema, needed, columns)
        number, rows = 0, max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=_rows_at_a_time(table, at_a_time), columns=[*needed, *left]):
            for name in left:
                columns.filled[name] += _filled(batch.column(name))  # type: ignore[union-attr]
            for values, problem in _rows_of(batch.select(needed)):
                number += 1
                yield Row(str(path), number, values, number / rows, problem)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 200)
        raise NibbleError(f"{key}: {path}: not a readable parquet file: {reason}") from error


def _rows_at_a_time(table: Any, most: int) -> int:
    """How many rows to decode at once, so that they take about 256 MiB at most: a dictionary stores a value once for
    all the rows that have it, and a file of 500 bytes may be 60 GB of text. The file's metadata is believed, that of
    whole groups: pyarrow ends the process, without an exception, where it is asked for a column's that is broken.
    """
    groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
    largest = max((group.total_byte_size for group in groups), default=0)
    return max(1, min(most, _DECODED // max(largest, 1)))


def _rows_of(batch: Any) -> Iterator[tuple[dict[str, Any] | None, BadRow | None]]:
    try:
        yield from [(values, None) for values in batch.to_pylist()]
    except UnicodeDecodeError as error:  # in one row, or in several
        if len(batch) == 1:
            yield None, BadRow("not_utf8", f"not valid UTF-8 at byte {error.start} of a text")
        else:
            for number in range(len(batch)):
                yield from _rows_of(batch.slice(number, 1))


def _left_out(schema: Any, needed: list[str], columns: Columns) -> list[str]:
    """The columns that aren't needed and hold text, lists or objects."""
    import pyarrow.types as types

    columns.seen.update(dict.fromkeys(schema.names))
    left = []
    for field in schema:
        if field.name in needed:
            continue
        if "binary" in str(field.type):
            columns.binary.add(field.name)
        elif "string" in str(field.type) or types.is_nested(field.type):
            left.append(field.name)
    return left


def _filled(column: Any) -> int:
    """In how many rows a column of text, lists or objects isn't empty."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_large_string(column.type):
        sizes = compute.binary_length(column)
    elif types.is_list(column.type) or types.is_large_list(column.type):
        sizes = compute.list_value_length(column)
    else:
        return len(column) - int(column.null_count)
    return int(compute.sum(compute.greater(sizes, 0)).as_py() or 0)
