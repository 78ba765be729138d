"""A config of the required keys alone, and the messages for changes of it."""

from __future__ import annotations

import pytest

from quant.common.errors import NibbleError
from train.config.load import Config, parse_config

MINIMAL = """\
model: {path: some/model}
data:
  train: rows.jsonl
output: {dir: out}
"""


def message(text: str, *overrides: str) -> str:
    with pytest.raises(NibbleError) as caught:
        parse_config(text, overrides, name="my.yaml")
    return str(caught.value)


def with_keys(overrides: str) -> Config:
    return parse_config(MINIMAL, overrides.split())


def wrong(*overrides: str) -> str:
    """The message for overrides of a config that is right without them, less the place."""
    return message(MINIMAL, *overrides).split(": ", 1)[1]
