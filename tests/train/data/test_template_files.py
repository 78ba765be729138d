"""Where a checkpoint keeps its chat templates: the same places, in the same order, as transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant.common.errors import NibbleError
from tests.text_helpers import GLM_TEMPLATE, save_checkpoint_texts, say, write_json
from train.data.template_files import load_chat_template, missing_template

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def place(folder: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "tokenizer_config.json":
            value = {**json.loads(path.read_text()), **value}
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template} for name, template in templates.items()]


PLACES: dict[str, dict[str, Any]] = {
    "jinja": {"chat_template.jinja": "jinja {{ bos_token }}"},
    "named files": {"chat_template.jinja": "d", "additional_chat_templates/tool_use.jinja": "t"},
    "other named file": {"chat_template.jinja": "d", "additional_chat_templates/rag.jinja": "r"},
    "a default among the named files": {"chat_template.jinja": "d", "additional_chat_templates/default.jinja": "D"},
    "named files alone": {
        "additional_chat_templates/default.jinja": "D",
        "additional_chat_templates/tool_use.jinja": "t",
        "tokenizer_config.json": {"chat_template": "config"},
    },
    "text in the config": {"tokenizer_config.json": {"chat_template": "config"}},
    "list": {"tokenizer_config.json": {"chat_template": named(default="d", tool_use="t", rag="r")}},
    "object": {"tokenizer_config.json": {"chat_template": {"default": "d", "tool_use": "t"}}},
    "no tool_use": {"tokenizer_config.json": {"chat_template": named(default="d", rag="r")}},
    "file before config": {
        "chat_template.jinja": "jinja",
        "tokenizer_config.json": {"chat_template": {"default": "d", "tool_use": "t"}},
        "chat_template.json": {"chat_template": "processor"},
    },
    "config before processor": {
        "tokenizer_config.json": {"chat_template": "config"},
        "chat_template.json": {"chat_template": "processor"},
    },
}


@pytest.mark.parametrize("files", PLACES.values(), ids=PLACES)
def test_templates_are_where_transformers_finds_them(tmp_path: Path, files: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    folder = place(save_checkpoint_texts(tmp_path), files)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_chat_template(folder, {"bos_token": "<s>"})
    assert ours is not None
    for tools in (None, TOOLS):
        assert ours.render(say("hi"), tools) == theirs.apply_chat_template(say("hi"), tools, tokenize=False)


def test_what_only_a_processor_has(tmp_path: Path) -> None:
    """The tokenizer of transformers reads neither; its processor does."""
    assert load_chat_template(tmp_path, {}) is None
    for name in ("chat_template.json", "processor_config.json"):
        write_json(tmp_path / name, {"chat_template": name})
        found = load_chat_template(tmp_path, {})
        assert found is not None
        assert found.render(say("hi")) == name


NAMED = "chat_template"
BROKEN: list[tuple[dict[str, Any], str]] = [
    (
        {"chat_template.jinja": GLM_TEMPLATE + "\n{% if %}"},
        rf"chat_template.jinja: line {GLM_TEMPLATE.count(chr(10)) + 2}: not a valid Jinja template: Expected",
    ),
    (
        {"chat_template.jinja": "x", "additional_chat_templates/tool_use.jinja": "\n{% if %}"},
        r"additional_chat_templates/tool_use.jinja: line 2: not a valid Jinja template: Expected",
    ),
    (
        {"additional_chat_templates/rag.jinja": "x"},
        r"additional_chat_templates: no template is named 'default', only 'rag'",
    ),
    ({"tokenizer_config.json": {NAMED: named(rag="")}}, r"chat_template: no template is named 'default', only 'rag'"),
    ({"tokenizer_config.json": {NAMED: []}}, r"chat_template: no template is named 'default', only none"),
    (
        {"tokenizer_config.json": {NAMED: 3}},
        r"chat_template must be text, a list of named templates or an object of them",
    ),
    (
        {"tokenizer_config.json": {NAMED: [{"name": "default"}]}},
        r"chat_template: entry 0 must have a name and a template",
    ),
    ({"tokenizer_config.json": {NAMED: [*named(default="x"), {"template": "x"}]}}, r"entry 1 must have a name and a"),
    (
        {"tokenizer_config.json": {NAMED: [{"name": 1, "template": "x"}]}},
        r"entry 0 must have a name and a template, both",
    ),
    ({"tokenizer_config.json": {NAMED: ["x"]}}, r"entry 0 must have a name and a template, both text: 'x'"),
    ({"tokenizer_config.json": {NAMED: {"default": 3}}}, r"chat_template: the template 'default' must be text, got 3"),
    ({"tokenizer_config.json": {NAMED: {"default": None}}}, r"the template 'default' must be text, got None"),
    ({"chat_template.json": []}, r"chat_template.json holds a list, expected an object"),
    ({"chat_template.json": "{"}, r"chat_template.json is not valid JSON"),
    (
        {"chat_template.jinja": "x" * 2**23},
        r"chat_template.jinja has 8,388,608 bytes, more than any chat template needs",
    ),
]


@pytest.mark.parametrize(("files", "message"), BROKEN, ids=range(len(BROKEN)))
def test_broken_templates(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    place(save_checkpoint_texts(tmp_path), files)
    with pytest.raises(NibbleError, match=message) as caught:
        load_chat_template(tmp_path, {})
    assert str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_a_template_that_is_no_text(tmp_path: Path, name: str) -> None:
    place(tmp_path, {name: ""})
    (tmp_path / name).write_bytes("é".encode("latin-1"))
    with pytest.raises(NibbleError, match=rf"{name}: not UTF-8 at byte 0"):
        load_chat_template(tmp_path, {})
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    if name.startswith("additional"):
        with pytest.raises(NibbleError, match=rf"{name} can't be read: Is a directory"):
            load_chat_template(tmp_path, {})
    else:
        assert load_chat_template(tmp_path, {}) is None


def test_variables_reach_the_process(tmp_path: Path) -> None:
    with pytest.raises(NibbleError, match=r"^data.template_variables: .* has no chat template that could read them"):
        load_chat_template(tmp_path, {}, variables={"sign": "!"})
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ sign }}")
    found = load_chat_template(tmp_path, {}, variables={"sign": "!"})
    assert found is not None
    assert found.render(say("hi")) == "hi!"
    with pytest.raises(
        NibbleError, match=r"^data.template_variables: .*chat_template.jinja reads no 'x'. Those that it "
    ):
        load_chat_template(tmp_path, {}, variables={"x": None})


def test_no_template() -> None:
    message = str(missing_template(Path("/models/base")))
    assert message.startswith(
        "/models/base: no chat template (chat_template.jinja, or chat_template in tokenizer_config"
    )
    assert "data.format prompt_completion or text" in message
    assert message.count("\n") < 3
