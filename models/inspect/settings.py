"""Which values of config.json a model was built from, found out by reading it as a model is."""

from __future__ import annotations

from collections.abc import ItemsView
from typing import Any

from models.registry import Architecture, architecture_for


class _Recorder(dict[str, Any]):
    """An object of JSON that notes the dotted names of the keys that are asked for, and the defaults of absent ones.

    Objects inside it are recorders too, with the same notes.
    """

    def __init__(self, values: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> None:
        super().__init__(
            (key, _Recorder(value, asked, f"{prefix}{key}.") if isinstance(value, dict) else value)
            for key, value in values.items()
        )
        self._asked, self._prefix = asked, prefix

    def _note(self, key: str, default: Any = None) -> None:
        if self._asked.get(self._prefix + key) is None:
            self._asked[self._prefix + key] = default

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        for key in self:
            self._note(key)
        return super().items()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of everything in an object of JSON; lists, and objects without a key, are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def read_settings(config: dict[str, Any], where: str) -> tuple[Architecture, Any, dict[str, dict[str, Any]]]:
    """The architecture, its parsed config, and by dotted name: `read`, the values that were looked at; `defaults`, what
    was taken where the file has no such key; `unread`, the file's other values.

    Raises NibbleError where the file can't be used. `where` names it.
    """
    asked: dict[str, Any] = {}
    recorder = _Recorder(config, asked)
    architecture = architecture_for(recorder, where)
    parsed = architecture.parse_config(recorder, where)
    there = flat(config)
    return (
        architecture,
        parsed,
        {
            "read": {key: value for key, value in there.items() if key in asked},
            "defaults": {key: value for key, value in sorted(asked.items()) if value is not None and key not in there},
            "unread": {key: value for key, value in there.items() if key not in asked},
        },
    )
