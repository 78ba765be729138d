"""Training rows: read from JSONL or parquet, checked one by one, with one problem reported for each.

Three formats (`data.format`), whose fields `data.fields` can map to other names:

    messages           messages: [{role, content, …}], tools (optional)
    prompt_completion  prompt, completion
    text               text

A message is trained when its role is assistant, unless it has `"train": false` or `"weight": 0`.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from quant.common.errors import NibbleError
from train.config.sections import REQUIRED, Format

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# ShareGPT's names.
_ROLE_ALIASES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Row:
    """One row as the file has it.

    line: 1-based; in a parquet file the number of the row.
    values: None when `problem` is why the row can't be read.
    done: share of the file read so far, 0 to 1, for progress.
    """

    file: str
    line: int
    values: dict[str, Any] | None
    done: float
    problem: BadRow | None = None


@dataclass(frozen=True)
class Chat:
    """A checked conversation. trained: for each message, whether it is an assistant's turn to learn."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str


class BadRow(Exception):
    """Why a row can't be used. reason: a short key to count by; the text names the field."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class SkippedRow:
    file: str
    line: int
    reason: str
    detail: str


class RowLog:
    """Collects the problems of rows, and reports them.

    on_bad_row: "skip" records a bad row; "error" raises NibbleError at the first one.
    warn: receives one line per problem: the first three of each kind, then the 10th, 100th, 1000th …; `skipped`
        has them all.
    """

    def __init__(self, on_bad_row: Literal["skip", "error"], warn: Callable[[str], None] | None = None):
        self.on_bad_row = on_bad_row
        self.skipped: list[SkippedRow] = []
        self.counts: Counter[str] = Counter()
        self._warn = warn

    def bad(self, row: Row, problem: BadRow) -> None:
        place = f"{row.file}:{row.line}: {problem}"
        if self.on_bad_row == "error":
            raise NibbleError(f"{place} (data.on_bad_row: error).\nFix the row, or set data.on_bad_row: skip.")
        self.skipped.append(SkippedRow(row.file, row.line, problem.reason, str(problem)))
        self.note(problem.reason, f"{place}; row skipped (data.on_bad_row: skip)")

    def note(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        count = self.counts[kind]
        if self._warn is not None and (count <= 3 or str(count).strip("0") == "1"):
            self._warn(f"{text}. {count:,} such {'row' if count == 1 else 'rows'} so far.")


def write_skipped_rows(path: str | Path, skipped: Sequence[SkippedRow]) -> None:
    """One JSON object per line: file, line, reason, detail."""
    with open(path, "w", encoding="utf-8") as file:
        for row in skipped:
            file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def read_rows(file: str | Path, *, form: Format, fields: Mapping[str, str] | None = None, key: str) -> Iterator[Row]:
    """The rows of a file, in order, unchecked.

    fields: {name of the format: name in the file}. key: the config key that names the file, for messages.
    Raises NibbleError for a file that is missing, of an unknown kind or unreadable as a whole, before the first row.
    """
    path, fields = Path(file), fields or {}
    if path.is_dir():
        raise NibbleError(f"{key}: {path} is a folder; name its file (.jsonl, .json or .parquet).")
    if not path.is_file():
        raise NibbleError(f"{key}: {path} does not exist (relative to {Path.cwd()}).")
    if path.suffix.lower() not in (".jsonl", ".json", ".parquet"):
        raise NibbleError(f"{key}: {path} is neither .jsonl, .json (one object per line) nor .parquet.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise NibbleError(f"{key}: {path} can't be read: {error.strerror}.") from error
    if path.suffix.lower() != ".parquet":
        return _read_jsonl(path, key)
    needed = [fields.get(name, name) for name in REQUIRED[form]]
    return _read_parquet(path, needed, [fields.get("tools", "tools")] if form == "messages" else [], key)


def _read_jsonl(path: Path, key: str) -> Iterator[Row]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        position, first = 0, True
        for number, line in enumerate(file, 1):
            position += len(line)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            row = _parse_line(str(path), number, line, position / size)
            if first and row.problem is not None and line.lstrip().startswith(b"["):
                _check_array(path, file, key)
            first = False
            yield row


def _parse_line(file: str, number: int, line: bytes, done: float) -> Row:
    try:
        value = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        problem = BadRow("not_utf8", f"not valid UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: also a number with thousands of digits
        problem = BadRow("malformed_json", f"not valid JSON: {_json_error(error)}")
    else:
        if isinstance(value, dict):
            return Row(file, number, value, done)
        problem = BadRow("not_an_object", f"the line is {_kind(value)}, expected an object")
    return Row(file, number, None, done, problem)


def _check_array(path: Path, file: IO[bytes], key: str) -> None:
    # A whole file that is one array would otherwise be reported as thousands of malformed lines.
    here = file.tell()
    file.seek(max(path.stat().st_size - 64, 0))
    closed = file.read().rstrip().endswith(b"]")
    file.seek(here)
    if closed:
        raise NibbleError(
            f"{key}: {path} is one JSON array; one object per line is expected.\n"
            f"Convert it: jq -c '.[]' {path.name} > {path.stem}.jsonl"
        )


def _json_error(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_parquet(path: Path, needed: list[str], extra: list[str], key: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        for name in needed:
            if name not in columns:
                raise NibbleError(f"{key}: {path}: {_missing(name, columns, 'the file')}")
        number, rows = 0, max(table.metadata.num_rows, 1)
        for batch in table.iter_batches(batch_size=1024, columns=[*needed, *(n for n in extra if n in columns)]):
            for values in batch.to_pylist():
                number += 1
                if extra:
                    _drop_filled_in(values, needed[0], extra[0])
                yield Row(str(path), number, values, number / rows)
    except pyarrow.ArrowException as error:
        raise NibbleError(f"{key}: {path}: not a readable parquet file: {error}") from error


def _drop_filled_in(values: dict[str, Any], messages: str, tools: str) -> None:
    """Parquet gives all objects of a column the same fields, null where a row has none. Templates write tool calls and
    tools out whole: there these nulls would be read, and learnt, as arguments."""
    if values.get(tools) is not None:
        values[tools] = _without_nulls(values[tools])
    for message in values[messages] if isinstance(values[messages], list) else ():
        if isinstance(message, dict) and message.get("tool_calls"):
            message["tool_calls"] = _without_nulls(message["tool_calls"])


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def parse_row(
    values: dict[str, Any], form: Format, fields: Mapping[str, str] | None = None
) -> Chat | Completion | Text:
    """Check one row. Raises BadRow naming the field as the file spells it."""
    fields = fields or {}
    names = [fields.get(name, name) for name in REQUIRED[form]]
    for name in names:
        if name not in values:
            raise BadRow("missing_field", _missing(name, list(values), "the row"))
    if form == "messages":
        return _parse_chat(values, fields)
    texts = [_text(values[name], name) for name in names]
    return Completion(*texts) if form == "prompt_completion" else Text(*texts)


def _parse_chat(values: dict[str, Any], fields: Mapping[str, str]) -> Chat:
    name = fields.get("messages", "messages")
    role_name, content_name = fields.get("role", "role"), fields.get("content", "content")
    raw = values[name]
    if not isinstance(raw, list):
        raise BadRow("null" if raw is None else "wrong_type", f"{name} is {_kind(raw)}, expected a list of messages")
    if not raw:
        raise BadRow("empty", f"{name} is empty")
    messages, trained = [], []
    for index, entry in enumerate(raw):
        message, wanted = _parse_message(entry, f"{name}[{index}]", role_name, content_name)
        messages.append(message)
        trained.append(wanted)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("nothing_to_learn", f"{name} has no assistant message, so there is nothing to learn")
    if not any(trained):
        raise BadRow("nothing_to_learn", f"every assistant message of {name} has train: false or weight: 0")
    return Chat(messages, trained, _parse_tools(values, fields.get("tools", "tools")))


def _parse_message(entry: Any, place: str, role_name: str, content_name: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(entry, dict):
        raise BadRow("null" if entry is None else "wrong_type", f"{place} is {_kind(entry)}, expected an object")
    message = {key: value for key, value in entry.items() if value is not None}
    for required in (role_name, content_name):
        if required not in entry and not (required == content_name and "tool_calls" in message):
            raise BadRow("missing_field", f"{place}: {_missing(required, list(entry), 'the message')}")

    role = entry[role_name]
    if not isinstance(role, str):
        raise BadRow("null" if role is None else "wrong_type", f"{place}.{role_name} is {_kind(role)}")
    role = _ROLE_ALIASES.get(role, role)
    if role not in ROLES:
        known = f"known roles are {', '.join(ROLES)}"
        raise BadRow("unknown_role", f"{place}.{role_name} is {role!r}{_did_you_mean(role, ROLES)}; {known}")

    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = _parse_calls(calls, f"{place}.tool_calls")
    # An assistant's tool call may have no text, and a tool may return nothing.
    may_be_empty = bool(calls) or role in ("tool", "function")
    content = message.pop(content_name, None)
    if content is not None or not calls:
        content = _text(content, f"{place}.{content_name}", may_be_empty)
    message.pop(role_name)
    train, weight = message.pop("train", True), message.pop("weight", 1)
    if not isinstance(train, bool):
        raise BadRow("wrong_type", f"{place}.train is {_kind(train)}, expected true or false")
    if weight not in (0, 1):
        raise BadRow("wrong_type", f"{place}.weight is {weight!r}, expected 0 or 1")
    head: dict[str, Any] = {"role": role} if content is None else {"role": role, "content": content}
    return {**head, **message}, role == "assistant" and train and weight == 1


def _text(value: Any, place: str, may_be_empty: bool = False) -> str:
    if isinstance(value, list):
        value = "".join(_part(part, f"{place}[{index}]") for index, part in enumerate(value))
    if value is None:
        raise BadRow("null", f"{place} is null")
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{place} is {_kind(value)}, expected text")
    if not may_be_empty and not value.strip():
        raise BadRow("empty", f"{place} is empty")
    return value


def _part(part: Any, place: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind != "text":
        what = f"of type {kind!r}" if kind is not None else _kind(part)
        raise BadRow("unsupported_part", f"{place} is {what}; only parts of type 'text' can be trained on")
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRow("null" if text is None else "wrong_type", f"{place}.text is {_kind(text)}, expected text")
    return text


def _parse_calls(calls: Any, place: str) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow("wrong_type", f"{place} is not a list of objects")
    return [_parse_call(call) for call in calls]


def _parse_call(call: dict[str, Any]) -> dict[str, Any]:
    # APIs give arguments as a string of JSON; templates iterate over an object, and servers parse it before rendering.
    if isinstance(call.get("function"), dict):
        return {**call, "function": _parse_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call
        if isinstance(parsed, dict):
            return {**call, "arguments": parsed}
    return call


def _parse_tools(values: dict[str, Any], name: str) -> list[Any] | None:
    tools = values.get(name)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow("malformed_json", f"{name} is text, but not valid JSON: {_json_error(error)}") from error
    if tools is not None and not isinstance(tools, list):
        raise BadRow("wrong_type", f"{name} is {_kind(tools)}, expected a list")
    return tools or None


def _missing(name: str, present: Sequence[str], owner: str) -> str:
    has = ", ".join(map(str, present[:12])) + (", …" if len(present) > 12 else "") if present else "nothing"
    return f"no field {name!r}{_did_you_mean(name, present)}; {owner} has {has} (data.fields maps names)"


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return "text"
    if isinstance(value, int | float):
        return "a number"
    return "a list" if isinstance(value, list | tuple) else "an object"
