"""The forms in which hub files hold the same tensors, beyond what config.json says.

Routed experts lie there as one fused stack or as matrices per expert: transformers writes either, whichever it has
read. And where it saves the text model taken out of a vision-language one, it writes a text model's config.json beside
keys that keep the other's prefix. All of these are read, and an export writes the form that its source has.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from models.checkpoint.keymap import Key, KeyMap

TEXT, WRAPPED = "model.", "model.language_model."  # how the keys of decoder layers begin


@dataclass(frozen=True)
class Layout:
    """wrapped: keys begin with `model.language_model.`, not `model.`. fused: experts are fused stacks."""

    wrapped: bool
    fused: bool

    @staticmethod
    def of(key_map: KeyMap, names: Collection[str]) -> Layout:
        """The layout of a checkpoint with these keys. Where only some stacks are fused, it counts as not fused."""
        wrapped = any(name.startswith(WRAPPED) for name in names)
        stacks = [key.hub for key in Layout(wrapped, False).apply(key_map).keys if key.parts]
        return Layout(wrapped, bool(stacks) and all(stack in names for stack in stacks))

    def apply(self, key_map: KeyMap) -> KeyMap:
        """The same table, with the hub's keys as this layout has them."""
        return replace(key_map, keys=tuple(map(self._key, key_map.keys)))

    def _key(self, key: Key) -> Key:
        return replace(
            key,
            hub=self._name(key.hub),
            parts=tuple(map(self._name, key.parts)),
            fused=self.fused and bool(key.parts),
        )

    def _name(self, name: str) -> str:
        if not name.startswith(TEXT):
            return name
        rest = name.removeprefix(WRAPPED if name.startswith(WRAPPED) else TEXT)
        return f"{WRAPPED if self.wrapped else TEXT}{rest}"
