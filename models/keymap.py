"""The table between a hub checkpoint's keys and the native model's tensors.

One table per architecture serves every direction: loading, converting, exporting, and naming the
groups that LoRA can target. A hub key that the table neither names nor declares as carried is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Group = Literal["attention", "experts", "shared_experts", "dense_mlp", "router", "norm", "embedding", "head"]
# The groups whose matrices LoRA can adapt, in the order in which tables show them.
TARGET_GROUPS: tuple[Group, ...] = ("attention", "experts", "shared_experts", "dense_mlp", "router")


@dataclass(frozen=True)
class Key:
    """One native tensor, and the hub's key or keys for it.

    native: dotted name in the native model of a Parameter or buffer, or of a Storage module (`is_storage`).
    hub: the hub's key. For stacked experts, the fused key.
    shape: the dense shape, the same on both sides; stacked experts are [E, out, in].
    stored: `storage` follows the model's storage, `dense` has the model's dtype, `float32` is always float32.
    parts: stacked experts only: the per-expert keys with `{e}` for the expert, whose matrices are concatenated
        along their first dimension (gate above up).
    """

    native: str
    hub: str
    group: Group
    shape: tuple[int, ...]
    stored: Literal["storage", "dense", "float32"]
    is_storage: bool
    parts: tuple[str, ...] = ()

    def hub_keys(self) -> Iterator[str]:
        """The keys under which the hub may hold this tensor unfused: one, or E × parts for stacked experts."""
        if not self.parts:
            yield self.hub
            return
        for expert in range(self.shape[0]):
            for part in self.parts:
                yield part.format(e=expert)


@dataclass(frozen=True)
class KeyMap:
    """All native tensors in the order in which they are computed with.

    carried: patterns (full match) of hub keys that this model does not compute with (multi-token prediction layers,
        vision towers). They are named when a checkpoint is read, and an export can carry them through.
    """

    keys: tuple[Key, ...]
    carried: tuple[str, ...] = ()

    def is_carried(self, hub_key: str) -> bool:
        return any(re.fullmatch(pattern, hub_key) for pattern in self.carried)


class KeyMapBuilder:
    """Collects keys layer by layer; native and hub names agree but for the fused experts' `.weight`."""

    def __init__(self) -> None:
        self._keys: list[Key] = []

    def plain(self, name: str, group: Group, shape: tuple[int, ...], *, float32: bool = False) -> None:
        """A norm, an embedding, a bias or a buffer."""
        self._keys.append(Key(name, name, group, shape, "float32" if float32 else "dense", is_storage=False))

    def matrix(self, name: str, group: Group, shape: tuple[int, int], stored: str = "storage") -> None:
        """The weight [out, in] of a linear layer."""
        self._keys.append(Key(f"{name}.weight", f"{name}.weight", group, shape, stored, is_storage=True))  # type: ignore[arg-type]

    def linear(self, name: str, group: Group, shape: tuple[int, int], *, bias: bool = False) -> None:
        self.matrix(name, group, shape)
        if bias:
            self.plain(f"{name}.bias", group, shape[:1])

    def swiglu(self, name: str, group: Group, hidden: int, width: int) -> None:
        """The three matrices of a gated MLP."""
        self.linear(f"{name}.gate_proj", group, (width, hidden))
        self.linear(f"{name}.up_proj", group, (width, hidden))
        self.linear(f"{name}.down_proj", group, (hidden, width))

    def experts(self, name: str, experts: int, hidden: int, width: int) -> None:
        """Routed experts: gate and up fused into [E, 2I, H], down [E, H, I]."""
        gate, up, down = (f"{name}.{{e}}.{part}_proj.weight" for part in ("gate", "up", "down"))
        for stack, shape, parts in (
            ("gate_up_proj", (experts, 2 * width, hidden), (gate, up)),
            ("down_proj", (experts, hidden, width), (down,)),
        ):
            hub = f"{name}.{stack}"
            self._keys.append(Key(f"{hub}.weight", hub, "experts", shape, "storage", is_storage=True, parts=parts))

    def build(self, carried: tuple[str, ...] = ()) -> KeyMap:
        return KeyMap(tuple(self._keys), carried)
