"""Where a checkpoint keeps its chat templates: every place that transformers reads, in its order.

    chat_template.jinja, additional_chat_templates/NAME.jinja   the first is called "default"
    tokenizer_config.json, processor_config.json, chat_template.json
        under chat_template: one template, a list of {name, template}, or an object of them by name

The first of these lines that gives one decides. Of several templates "tool_use" is for rows with tools, "default" for
all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from models.checkpoint.side_files import TEMPLATES
from quant.common.errors import NibbleError
from quant.common.jsonfile import read_json
from quant.common.words import shown, some
from train.data.template_process import TemplateProcess

MAX_BYTES = 2**22  # of a template; the longest published ones have 2**15


def load_chat_template(
    folder: str | Path,
    special_tokens: Mapping[str, str],
    *,
    now: datetime | None = None,
    variables: Mapping[str, Any] | None = None,
) -> TemplateProcess | None:
    """The chat template of a checkpoint folder, or None if it has none.

    variables: data.template_variables. Raises NibbleError naming the file, or those that the template doesn't read.
    """
    folder = Path(folder)
    named, where = _templates(folder)
    if named is None:
        if variables:
            raise NibbleError(f"data.template_variables: {folder} has no chat template that could read them.")
        return None
    if "default" not in named:
        raise NibbleError(f"{where}: no template is named 'default', only {some(list(map(shown, named))) or 'none'}.")
    (source, where), (tool_source, tool_where) = named["default"], named.get("tool_use", (None, ""))
    return TemplateProcess(
        source,
        special_tokens,
        where=where,
        tool_source=tool_source,
        tool_where=tool_where,
        now=now,
        variables=variables,
    )


def missing_template(
    folder: str | Path, what: str = "data.format messages", instead: str = "data.format prompt_completion or text"
) -> NibbleError:
    """The error for messages and a checkpoint that can't render them. what: needs it; instead: what doesn't."""
    return NibbleError(
        f"{folder}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), "
        f"which {what} needs.\nPut the template of the instruction-tuned model there as "
        f"chat_template.jinja, or use {instead}."
    )


def _templates(folder: Path) -> tuple[dict[str, tuple[str, str]] | None, str]:
    """Templates by name, each with the place to name for it, and the place to name for all of them."""
    files = {path.name.removesuffix(".jinja"): path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    single = folder / "chat_template.jinja"
    if single.is_file():
        files.setdefault("default", single)
    if files:
        return {name: (_read(path), str(path)) for name, path in files.items()}, str(folder / TEMPLATES)
    for path in (folder / name for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json")):
        value = read_json(path, dict).get("chat_template") if path.is_file() else None
        if value is not None:
            where = f"{path}: chat_template"
            return {name: (text, where) for name, text in _named(value, where).items()}, where
    return None, ""


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise NibbleError(f"{path} has {size:,} bytes, more than any chat template needs ({MAX_BYTES:,}).")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NibbleError(f"{path}: not UTF-8 at byte {error.start}.") from error
    except OSError as error:
        raise NibbleError(f"{path} can't be read: {error.strerror}.") from error


def _named(value: Any, where: str) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        for number, entry in enumerate(value):
            if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
                raise NibbleError(f"{where}: entry {number} must have a name and a template, both text: {shown(entry)}")
        value = {entry["name"]: entry["template"] for entry in value}
    if not isinstance(value, dict):
        raise NibbleError(f"{where} must be text, a list of named templates or an object of them, got {shown(value)}.")
    for name, template in value.items():
        if not isinstance(template, str):
            raise NibbleError(f"{where}: the template {shown(name)} must be text, got {shown(template)}.")
    return value
