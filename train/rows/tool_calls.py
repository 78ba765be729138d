"""Tool calls and tools, as templates read them: objects, without the fields that a table filled in."""

from __future__ import annotations

import math
from typing import Any

from quant.common.jsonfile import JsonError, kind_of, parse_json
from train.rows.bad_rows import BadRow


def json_of(text: str, place: str) -> Any:
    """The value of a field that holds JSON as text. Raises BadRow."""
    try:
        return parse_json(text)
    except JsonError as error:
        reason = str(error).replace("at line 1 column", "at column")
        raise BadRow("malformed_json", f"{place} is text, but not valid JSON: {reason}") from error


def parse_calls(calls: Any, place: str) -> list[Any]:
    """tool_calls of a message, every call with its arguments as an object. calls: a list of objects or of JSON texts,
    or one JSON text of it all."""
    if isinstance(calls, str):
        calls = json_of(calls, place)
    if not isinstance(calls, list):
        raise BadRow("wrong_type", f"{place} is {kind_of(calls)}, expected a list of objects")
    return [parse_call(call, f"{place}[{index}]") for index, call in enumerate(calls)]


def parse_call(call: Any, place: str) -> dict[str, Any]:
    if isinstance(call, str):
        call = json_of(call, place)
    if not isinstance(call, dict):
        raise BadRow("wrong_type", f"{place} is {kind_of(call)}, expected an object")
    function = call.get("function")
    if isinstance(function, dict) or (isinstance(function, str) and function.lstrip().startswith("{")):
        return {**call, "function": parse_call(function, f"{place}.function")}
    # APIs give arguments as a string of JSON; templates iterate over an object, and servers parse it before rendering.
    arguments = call.get("arguments")
    if arguments is None and isinstance(call.get("parameters"), dict):
        raise BadRow("wrong_type", f"{place} has parameters, expected arguments")
    if isinstance(arguments, str):
        text = arguments.strip()
        if text.startswith("{"):
            arguments = json_of(text, f"{place}.arguments")
        elif text in ("", "null"):
            arguments = None
    return {**call, "arguments": {} if arguments is None or arguments == [] else arguments}  # []: an empty map of Arrow


def spoken_calls(value: Any, place: str) -> list[Any]:
    """tool_calls of a turn whose text is JSON of a call or of a list of calls (ShareGPT's role function_call)."""
    if isinstance(value, str):
        value = json_of(value, place)
    calls = parse_calls(value if isinstance(value, list) else [value], place)
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def parse_tools(tools: Any, place: str) -> list[Any] | None:
    """The tools of a row: a list of objects or of JSON texts, or one JSON text of it all. None when there are none."""
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = json_of(tools, place)
    elif tools is not None:
        tools = without_nulls(tools, place)
    if tools is not None and not isinstance(tools, list):
        raise BadRow("wrong_type", f"{place} is {kind_of(tools)}, expected a list")
    return [_parse_tool(tool, f"{place}[{index}]") for index, tool in enumerate(tools)] if tools else None


def _parse_tool(tool: Any, place: str) -> Any:
    if isinstance(tool, str):
        tool = json_of(tool, place)
    if not isinstance(tool, dict):
        raise BadRow("wrong_type", f"{place} is {kind_of(tool)}, expected an object")
    # Tables whose rows have different tools keep what differs as text.
    for key in ("function", "parameters"):
        value = tool.get(key)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = json_of(value, f"{place}.{key}")
        if key == "function" and isinstance(value, dict):
            value = _parse_tool(value, f"{place}.{key}")
        if value is not tool.get(key):
            tool = {**tool, key: value}
    return tool


def without_nulls(value: Any, place: str) -> Any:
    """`value` without the keys of objects that are null.

    Arrow gives all objects of a column the same keys, null where a row has none, and files made from its tables keep
    them. Templates write tool calls and tools out whole: there these nulls would be read, and learnt, as arguments.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner, place) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        if value and isinstance(value[0], tuple):  # Arrow's map, a list of pairs
            return without_nulls(dict(value), place)
        return [without_nulls(inner, place) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow("malformed_json", f"{place} has the number {value}, which is not JSON")
    return value
