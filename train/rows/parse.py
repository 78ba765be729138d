"""Training rows, checked one by one: a conversation, a prompt with its completion, a text, or what is wrong with it.

Three formats (`data.format`), whose fields `data.fields` can map to other names:

    messages           messages: [{role, content, …}], tools and system (optional)
    prompt_completion  prompt, completion: texts, or lists of messages (then tools too)
    text               text

A message is trained when its role is assistant, unless it has `"train": false` or `"weight": 0`; of a prompt and its
completion, only the completion's are. Where there is no `messages` and no other name is given, `conversations` is read;
so are `from` and `value` in place of `role` and `content`, and ShareGPT's names of roles.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.common.jsonfile import JsonError, kind_of, parse_json
from quant.common.words import printable, shown
from train.config.fields import columns, joined
from train.config.sections import REQUIRED, Format
from train.rows.bad_rows import BadRow
from train.rows.tool_calls import json_of, parse_calls, parse_tools, spoken_calls, without_nulls

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# ShareGPT's names.
_ROLE_ALIASES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
# An assistant's tool call may have no text, a tool may return nothing, and an instruction may be left empty.
_MAY_BE_EMPTY = ("tool", "function", "system", "developer")
_SHAREGPT = {"messages": "conversations", "role": "from", "content": "value"}
# Names under which public data sets keep a prompt and its completion, the more telling first.
_PROMPTS = ("prompt", "question", "instruction", "query", "problem", "input")
_COMPLETIONS = ("completion", "answer", "output", "response", "solution", "chosen")
# Of an object that holds a whole file's rows.
_WRAPPERS = ("data", "rows", "examples", "train")


_MAPS = " (data.fields maps names)"


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


def columns_read(form: Format, fields: Mapping[str, str], present: Iterable[str]) -> dict[str, bool]:
    """The columns that :func:`parse_row` reads of a row or file that has `present`, and whether each must be there."""
    found: dict[str, bool] = {}
    for name in REQUIRED[form]:
        value = fields.get(name) or _own_name(name, present)
        must = joined(value) is None
        found.update(dict.fromkeys(columns(value), must))
    if form != "text":
        found.setdefault(fields.get("tools", "tools"), False)
    if "system" in fields:
        found.update(dict.fromkeys(columns(fields["system"]), False))
    return found


def parse_row(
    values: dict[str, Any], form: Format, fields: Mapping[str, str] | None = None
) -> Chat | Completion | Text:
    """Check one row. Raises BadRow naming the field as the file spells it."""
    fields = fields or {}
    if form == "messages":
        return _parse_chat(values, fields)
    texts = []
    for name in REQUIRED[form]:
        source = fields.get(name, name)
        parts = joined(source)
        if parts is not None:
            texts.append(_joined_text(values, parts))
            continue
        if source not in values:
            raise BadRow("missing_field", missing(source, values, "the row", form))
        texts.append(values[source])
    if form == "prompt_completion":
        texts = [messages_in(text) for text in texts]
    if form == "prompt_completion" and any(isinstance(text, list) and _are_messages(text) for text in texts):
        return _parse_turns(values, texts, fields)
    for name, text in zip(REQUIRED[form], texts, strict=True):
        if form == "prompt_completion" and isinstance(text, dict):
            place = fields.get(name, name)
            raise BadRow("wrong_type", f"{place} is an object, expected text or a list of messages")
    checked = [_text(text, fields.get(name, name)) for name, text in zip(REQUIRED[form], texts, strict=True)]
    return Completion(*checked) if form == "prompt_completion" else Text(*checked)


def parse_unanswered(values: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """The messages of a row that are to be answered, and its tools, without data.fields. Raises BadRow naming the
    field.
    """
    name = _own_name("messages", values)
    try:
        messages, _ = _parse_messages(_listed(values, name), name, {})
    except BadRow as problem:
        raise BadRow(problem.reason, str(problem).removesuffix(_MAPS)) from problem
    if messages[-1]["role"] == "assistant":
        raise BadRow(
            "nothing_to_answer", f"{name} ends with the assistant's turn; leave out what is to be answered anew"
        )
    return messages, parse_tools(values.get("tools"), "tools")


def missing(name: str, present: Iterable[str], owner: str, form: Format | None = None) -> str:
    """What to say where a column isn't there: the nearest name, or the keys to set for such rows."""
    names = [str(key) for key in present]
    near, advice = _did_you_mean(name, names), ""
    if form is not None and not near:
        advice = _advice(form, names)
    has = (
        ", ".join(printable(key, 60) for key in names[:12]) + (", …" if len(names) > 12 else "") if names else "nothing"
    )
    have = "have" if owner.endswith("rows") else "has"
    return f"no field {shown(name)}{near}; {owner} {have} {has}{advice or _MAPS}"


def _advice(form: Format, names: Sequence[str]) -> str:
    """The keys that fit rows with these columns, "" if that isn't clear."""
    prompt, completion = (next((name for name in known if name in names), None) for known in (_PROMPTS, _COMPLETIONS))
    if form != "messages" and ("messages" in names or "conversations" in names):
        return ". Set data.format: messages"
    if prompt is not None and completion is not None:
        if prompt == "instruction" and "input" in names:
            prompt = '"{instruction}\\n\\n{input}"'
        keys = [] if form == "prompt_completion" else ["data.format: prompt_completion"]
        if (prompt, completion) != ("prompt", "completion"):
            keys.append(f"data.fields: {{prompt: {prompt}, completion: {completion}}}")
        return f". Set {' and '.join(keys)}" if keys else ""
    if len(names) == 1 and names[0] in _WRAPPERS:
        return ". Rows stand on a line each, or in one array"
    return ". Set data.format: text" if form != "text" and "text" in names else ""


def _own_name(name: str, present: Iterable[str]) -> str:
    """The name of a field that data.fields doesn't give: the format's, or ShareGPT's where only that is there."""
    if name in present:
        return name
    other = _SHAREGPT.get(name, name)
    return other if other in present else name


def _joined_text(values: dict[str, Any], parts: tuple[tuple[str, str], ...]) -> str:
    """The columns put into the text; white space between two of them is left out beside an empty one."""
    text, filled = "", False
    for index, (before, column) in enumerate(parts):
        value = values.get(column) if column else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        elif value is not None and not isinstance(value, str):
            raise BadRow("wrong_type", f"{column} is {kind_of(value)}, expected text")
        filled = filled or bool(value and value.strip())
        if index and column and not before.strip() and not (text and value):
            before = ""
        text += before + (value or "")
    if not filled:
        names = [column for _, column in parts if column]
        raise BadRow("empty", f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} empty")
    return text


def _parse_chat(values: dict[str, Any], fields: Mapping[str, str]) -> Chat:
    name = fields.get("messages") or _own_name("messages", values)
    messages, trained = _parse_messages(_listed(values, name), name, fields)
    if "system" in fields:
        _put_system_first(messages, trained, values, fields["system"], name)
    return _chat(messages, trained, values, fields, name, 0)


def _listed(values: dict[str, Any], name: str) -> list[Any]:
    """The column of messages, not empty."""
    if name not in values:
        raise BadRow("missing_field", missing(name, values, "the row", "messages"))
    raw = values[name]
    if isinstance(raw, str) and raw.lstrip().startswith("["):
        raw = json_of(raw, name)
    if not isinstance(raw, list):
        raise BadRow("null" if raw is None else "wrong_type", f"{name} is {kind_of(raw)}, expected a list of messages")
    if not raw:
        raise BadRow("empty", f"{name} is empty")
    return raw


def _parse_turns(values: dict[str, Any], turns: list[Any], fields: Mapping[str, str]) -> Chat:
    """A prompt and a completion of which at least one is a list of messages."""
    messages: list[dict[str, Any]] = []
    trained: list[bool] = []
    for name, role, value in zip(REQUIRED["prompt_completion"], ("user", "assistant"), turns, strict=True):
        place = fields.get(name, name)
        if isinstance(value, list) and _are_messages(value):
            found, wanted = _parse_messages(value, place, fields)
        else:
            found, wanted = [{"role": role, "content": _text(value, place)}], [role == "assistant"]
        start = len(messages)
        messages += found
        trained += [one and name == "completion" for one in wanted]
    return _chat(messages, trained, values, fields, place, start)


def _chat(
    messages: list[dict[str, Any]],
    trained: list[bool],
    values: dict[str, Any],
    fields: Mapping[str, str],
    name: str,
    start: int,
) -> Chat:
    """The chat of checked messages, of which those from `start` on stand in the column `name` and are to be learnt."""
    if not any(message["role"] == "assistant" for message in messages[start:]):
        raise BadRow("nothing_to_learn", f"{name} has no assistant message, so there is nothing to learn")
    if not any(trained):
        raise BadRow("nothing_to_learn", f"every assistant message of {name} has train: false or weight: 0")
    tools = fields.get("tools", "tools")
    return Chat(messages, trained, parse_tools(values.get(tools), tools))


def _put_system_first(
    messages: list[dict[str, Any]], trained: list[bool], values: dict[str, Any], source: str, name: str
) -> None:
    """A column for the system's message (data.fields.system) goes before the messages, where it isn't empty."""
    try:
        text = _joined_text(values, joined(source) or (("", source), ("", "")))
    except BadRow as problem:
        if problem.reason == "empty":
            return
        raise
    if messages[0]["role"] == "system":
        raise BadRow("two_systems", f"{name} begins with a system message, and data.fields.system gives one too")
    messages.insert(0, {"role": "system", "content": text})
    trained.insert(0, False)


def messages_in(value: Any) -> Any:
    """The messages of a text that is JSON of a list of messages; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = parse_json(value)
    except JsonError:
        return value  # a text that begins with a bracket
    are = isinstance(found, list) and all(isinstance(one, dict) and ("role" in one or "from" in one) for one in found)
    return found if found and are else value


def _are_messages(value: list[Any]) -> bool:
    """Whether a list is of messages, rather than of the parts of a text."""
    return bool(value) and not (isinstance(value[0], dict) and "type" in value[0] and "role" not in value[0])


def _parse_messages(
    entries: list[Any], name: str, fields: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[bool]]:
    messages, trained = [], []
    for index, entry in enumerate(entries):
        message, wanted = _parse_message(entry, f"{name}[{index}]", fields)
        messages.append(message)
        trained.append(wanted)
    return messages, trained


def _parse_message(entry: Any, place: str, fields: Mapping[str, str]) -> tuple[dict[str, Any], bool]:
    if isinstance(entry, str) and entry.lstrip().startswith("{"):
        entry = json_of(entry, place)
    if not isinstance(entry, dict):
        raise BadRow("null" if entry is None else "wrong_type", f"{place} is {kind_of(entry)}, expected an object")
    role_name = fields.get("role") or _own_name("role", entry)
    content_name = fields.get("content") or _own_name("content", entry)
    message = {
        key: value if isinstance(value, str) or key == content_name else without_nulls(value, f"{place}.{key}")
        for key, value in entry.items()
        if value is not None
    }
    for required in (role_name, content_name):
        if required not in entry and not (required == content_name and "tool_calls" in message):
            raise BadRow("missing_field", f"{place}: {missing(required, entry, 'the message')}")

    given = message.pop(role_name, None)
    if not isinstance(given, str):
        raise BadRow("null" if given is None else "wrong_type", f"{place}.{role_name} is {kind_of(given)}")
    role = _ROLE_ALIASES.get(given, given)
    if role not in ROLES:
        known = f"known roles are {', '.join(ROLES)}"
        raise BadRow("unknown_role", f"{place}.{role_name} is {shown(role)}{_did_you_mean(role, ROLES)}; {known}")

    content, calls = message.pop(content_name, None), message.get("tool_calls")
    if given == "function_call":
        message["tool_calls"] = spoken_calls(content, f"{place}.{content_name}")
        content = None
    elif calls:
        message["tool_calls"] = parse_calls(calls, f"{place}.tool_calls")
    calls = message.get("tool_calls")
    if content is not None or not calls:
        content = _text(content, f"{place}.{content_name}", bool(calls) or role in _MAY_BE_EMPTY)
    train, weight = message.pop("train", True), message.pop("weight", 1)
    if not isinstance(train, bool):
        raise BadRow("wrong_type", f"{place}.train is {kind_of(train)}, expected true or false")
    if weight not in (0, 1):
        raise BadRow("wrong_type", f"{place}.weight is {shown(weight)}, expected 0 or 1")
    head: dict[str, Any] = {"role": role} if content is None else {"role": role, "content": content}
    return {**head, **message}, role == "assistant" and train and weight == 1


def _text(value: Any, place: str, may_be_empty: bool = False) -> str:
    if isinstance(value, list):
        value = "".join(_part(part, f"{place}[{index}]") for index, part in enumerate(value))
    if value is None:
        raise BadRow("null", f"{place} is null")
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{place} is {kind_of(value)}, expected text")
    if not may_be_empty and not value.strip():
        raise BadRow("empty", f"{place} is empty")
    return value


def _part(part: Any, place: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind != "text":
        what = f"of type {shown(kind)}" if kind is not None else kind_of(part)
        raise BadRow("unsupported_part", f"{place} is {what}; only parts of type 'text' can be trained on")
    text = part.get("text")
    if not isinstance(text, str):
        raise BadRow("null" if text is None else "wrong_type", f"{place}.text is {kind_of(text)}, expected text")
    return text


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:100], [other for other in known if len(other) <= 100], n=1)
    return f" (did you mean {shown(near[0])}?)" if near else ""
