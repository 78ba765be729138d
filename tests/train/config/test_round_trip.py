"""A run writes its config with every key filled in: whatever a key may hold is read back as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from quant.common.files import write_atomically
from train.config.load import Config, config_schema, dump_config, load_config
from train.config.schema import keys

MINIMAL = {"model": {"path": "some/model"}, "data": {"train": "rows.jsonl"}, "output": {"dir": "out"}}

LINE_BREAKS = [
    "a\nb",
    "a\n",
    "\na",
    "a\n\n b\n",
    "a\rb",
    "a\r\nb",
    "a\x85b",
    "\x85",
    "a\u2028b",
    "a\u2029b",
    "a\x0b\x0cb",
]
UNPRINTABLE = ["\x00", "\x01", "a\x1bb", "\x7f", "\x80", "\x9f", "\xa0", "\ufeffa", "a\ufeff", "\ufffe", "\uffff"]
NUMBERS = [
    "2e-4",
    "1e5",
    "1e-08",
    ".5",
    ".5e3",
    "0o7",
    "010",
    "0x1F",
    "0b11",
    "1_000",
    "+3",
    "1:30",
    ".inf",
    "-.INF",
    ".nan",
]
NUMBERS += ["2024-01-01", "2024-01-01 10:00:00", "2024-01-01T10:00:00Z"]
WORDS = ["no", "on", "Yes", "OFF", "y", "true", "False", "null", "Null", "~", "nan", "=", "<<"]
SYNTAX = [
    "-",
    "---",
    "--- x",
    "...",
    "- x",
    "? x",
    ": x",
    "a: b",
    "a:",
    "a #b",
    "#a",
    "*a",
    "&a",
    "!a",
    "!!int 3",
    "%a",
    "@a",
]
SYNTAX += [
    "`a",
    "|",
    ">",
    "a,b",
    "[a",
    "a]",
    "{a",
    "a}",
    "'",
    '"',
    "it's",
    "'\"\\",
    "\\",
    "\\n",
    "\\x85",
    "{{x}}",
    "%s",
]
SPACES = [" ", "  ", " a", "a ", "a  b", "\t", "a\tb", "a\t"]
LETTERS = ["é", "中文", "😀", "a😀" * 300, "\U0010fffd", "👩‍🔬", "e\u0301", "\u202eabc"]
LONG = ["x" * 5000, "word " * 1000 + "end", "a: " * 500 + "b"]
TEXTS = [*LINE_BREAKS, *UNPRINTABLE, *NUMBERS, *WORDS, *SYNTAX, *SPACES, *LETTERS, *LONG]
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 7, 100, 2**32 - 1, 10**30, 0.0, 1e-8, 2e-4, 0.1, 0.30000000000000004, 0.5, 1.0, 1e16,
    1e22, 5e-324, 1.7976931348623157e308, [0], [1, 3, 2], [0.0, 0.999999999999], [1e-8, 0.5], ["router",
    "mlp.gate.weight"], {"attention": 1, "experts": 2}, {"attention": 1e-8, "experts": 1e22},
    {"role": "from: x", "content": "no"}, {}, "cpu", "cuda:3", "prompt/completion",
]  # fmt: skip


def read_back(config: Config, path: Path) -> None:
    """The config that a run would write, read by nibble and by PyYAML under its own rules, those of YAML 1.1."""
    write_atomically(path, dump_config(config).encode())
    assert load_config(path) == config
    assert yaml.safe_load(path.read_bytes()) == config.model_dump(mode="json")


def with_value(key: str, value: object) -> dict[str, Any]:
    section, _, name = key.partition(".")
    values: dict[str, Any] = copy.deepcopy(MINIMAL)
    values.setdefault(section, {})[name] = value
    return values


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:12]))
def test_any_text_in_every_key_that_takes_text(text: str, tmp_path: Path) -> None:
    values = {
        "model": {"path": text},
        "adapter": {"targets": [text, f"{text}2"], "init_from": text},
        "data": {
            "train": text,
            "eval": text,
            "format": "prompt_completion",
            "fields": {"prompt": text, "completion": f"2{text}"},
        },
        "train": {"resume": text},
        "output": {"dir": text},
    }
    config = Config.model_validate(values)
    for section, given in values.items():
        assert given.items() <= getattr(config, section).model_dump(mode="json").items()
    read_back(config, tmp_path / "config.yaml")


def test_the_keys_that_take_text_are_those_of_the_test_above() -> None:
    free = {"model.path", "adapter.init_from", "data.train", "data.eval", "train.resume", "output.dir"}
    for key in keys(config_schema()):
        try:
            Config.model_validate(with_value(key, "some text"))
        except ValidationError:
            assert key not in free
        else:
            assert key in free


def test_every_value_of_every_key(tmp_path: Path) -> None:
    """As many keys in one config as go together."""
    accepted = {}
    for key, entry in keys(config_schema()).items():
        accepted[key] = [value for value in [*VALUES, *entry.get("enum", ())] if is_config(with_value(key, value))]
        assert accepted[key], key
    while any(accepted.values()):
        values: dict[str, Any] = copy.deepcopy(MINIMAL)
        for key, left in accepted.items():
            section, _, name = key.partition(".")
            together = {**values, section: {**values.get(section, {}), name: left[-1]}} if left else {}
            if is_config(together):
                values = together
                left.pop()
        read_back(Config.model_validate(values), tmp_path / "config.yaml")


def is_config(values: dict[str, Any]) -> bool:
    try:
        Config.model_validate(values)
    except ValidationError:
        return False
    return True
