"""Reading single values of a hub config.json, with messages that name the file and the key."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from quant.common.errors import NibbleError


def text_section(config: dict[str, Any]) -> dict[str, Any]:
    """What describes the text model: the section of its own that a vision-language model's file has, or all of it."""
    section = config.get("text_config")
    return section if isinstance(section, dict) else config


def integer(config: dict[str, Any], key: str, default: int, where: str, *, least: int = 1) -> int:
    """`key` as an integer of at least `least`, or `default` where the file leaves it out."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise NibbleError(f"{where}: {key} must be {wanted}, got {value!r}.")
    return value


def optional_integer(config: dict[str, Any], key: str, default: int, where: str) -> int | None:
    """Like :func:`integer`, where an explicit null means that the part doesn't exist."""
    return None if key in config and config[key] is None else integer(config, key, default, where)


def number(config: dict[str, Any], key: str, default: float, where: str) -> float:
    """`key` as a positive number, or `default` where the file leaves it out."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise NibbleError(f"{where}: {key} must be a positive number, got {value!r}.")
    return float(value)


def flag(config: dict[str, Any], key: str, default: bool, where: str) -> bool:
    """`key` as true or false, or `default` where the file leaves it out."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise NibbleError(f"{where}: {key} must be true or false, got {value!r}.")
    return value


def choices(
    config: dict[str, Any], key: str, default: Sequence[str], allowed: Sequence[str], where: str
) -> tuple[str, ...]:
    """`key` as a list of one of `allowed` per layer, or `default`, which has the right length, where it is absent."""
    value = config.get(key)
    if value is None:
        return tuple(default)
    if not isinstance(value, list) or not set(allowed).issuperset(map(str, value)):
        wanted = " and ".join(map(repr, allowed))
        raise NibbleError(f"{where}: {key} must be a list of {wanted}, got {value!r}.")
    if len(value) != len(default):
        raise NibbleError(
            f"{where}: {key} names {len(value)} layers, num_hidden_layers is {len(default)}; make them agree."
        )
    return tuple(value)


def refuse_unknown_activation(config: dict[str, Any], where: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise NibbleError(
            f"{where}: hidden_act is {activation!r}; only 'silu' is implemented, and another activation "
            "would compute something else."
        )


def refuse_dropout(config: dict[str, Any], where: str) -> None:
    if config.get("attention_dropout"):
        raise NibbleError(
            f"{where}: attention_dropout is {config['attention_dropout']!r}; dropout is not implemented, and training "
            "without it would be another training.\nSet it to 0.0."
        )
