"""Reading single values of a hub config.json, with messages that name the file and the key."""

from __future__ import annotations

from typing import Any

from quant.errors import NibbleError


def integer(config: dict[str, Any], key: str, default: int, where: str) -> int:
    """``key`` as a positive integer, or ``default`` where the file leaves it out."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise NibbleError(f"{where}: {key} must be a positive integer, got {value!r}.")
    return value


def optional_integer(config: dict[str, Any], key: str, default: int, where: str) -> int | None:
    """Like :func:`integer`, where an explicit null means that the part doesn't exist."""
    return None if key in config and config[key] is None else integer(config, key, default, where)


def refuse_unknown_activation(config: dict[str, Any], where: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise NibbleError(
            f"{where}: hidden_act is {activation!r}; only 'silu' is implemented, and another activation "
            "would compute something else."
        )
