"""The table between a hub checkpoint's keys and the native model's tensors.

One table per architecture serves every direction: loading, converting, exporting, and naming the
groups that LoRA can target. A hub key that the table neither names nor declares as carried is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from models.groups import Group

Stored = Literal["storage", "dense", "float32"]


@dataclass(frozen=True)
class Key:
    """One native tensor, and the hub's key or keys for it.

    native: dotted name in the native model of a Parameter or buffer, or of a Storage module (`is_storage`).
    hub: the hub's key. For stacked experts, the fused key.
    shape: the dense shape, the same on both sides; stacked experts are [E, out, in].
    stored: `storage` follows the model's storage, `dense` has the model's dtype, `float32` is always float32.
    parts: stacked experts only: the per-expert keys with `{e}` for the expert, whose matrices are concatenated
        along their first dimension (gate above up).
    fused: stacked experts only: an export writes the fused key rather than the parts. Both can be read.
    counted: among the parameters that are counted, as transformers counts them (GLM's correction biases are not).
    """

    native: str
    hub: str
    group: Group
    shape: tuple[int, ...]
    stored: Stored
    is_storage: bool
    parts: tuple[str, ...] = ()
    fused: bool = False
    counted: bool = True

    def part_keys(self) -> Iterator[str]:
        """The keys under which the hub may hold this tensor unfused: one, or E × parts for stacked experts."""
        if not self.parts:
            yield self.hub
            return
        for expert in range(self.shape[0]):
            for part in self.parts:
                yield part.format(e=expert)

    def hub_keys(self) -> Iterator[str]:
        """The keys that an export writes."""
        if self.fused:
            yield self.hub
        else:
            yield from self.part_keys()


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
    """Collects keys layer by layer. Native names are the hub's, but for the fused experts' `.weight`.

    hub_model: what the hub has in the place of the leading `model` of native names.
    Where a single name differs, `hub` gives the hub's.
    """

    def __init__(self, hub_model: str = "model") -> None:
        self._keys: list[Key] = []
        self._carried: list[str] = []
        self._hub_model = hub_model

    def _hub(self, name: str) -> str:
        return f"{self._hub_model}.{name.removeprefix('model.')}" if name.startswith("model.") else name

    def plain(
        self,
        name: str,
        group: Group,
        shape: tuple[int, ...],
        *,
        float32: bool = False,
        counted: bool = True,
        hub: str | None = None,
    ) -> None:
        """A norm, an embedding, a bias or a buffer."""
        stored: Stored = "float32" if float32 else "dense"
        self._keys.append(Key(name, self._hub(hub or name), group, shape, stored, is_storage=False, counted=counted))

    def matrix(
        self, name: str, group: Group, shape: tuple[int, int], *, stored: Stored = "storage", hub: str | None = None
    ) -> None:
        """The weight [out, in] of a linear layer."""
        hub_name = self._hub(hub or name)
        self._keys.append(Key(f"{name}.weight", f"{hub_name}.weight", group, shape, stored, is_storage=True))

    def linear(
        self, name: str, group: Group, shape: tuple[int, int], *, bias: bool = False, stored: Stored = "storage"
    ) -> None:
        self.matrix(name, group, shape, stored=stored)
        if bias:
            self.plain(f"{name}.bias", group, shape[:1])

    def swiglu(self, name: str, group: Group, hidden: int, width: int) -> None:
        """The three matrices of a gated MLP."""
        self.linear(f"{name}.gate_proj", group, (width, hidden))
        self.linear(f"{name}.up_proj", group, (width, hidden))
        self.linear(f"{name}.down_proj", group, (hidden, width))

    def experts(self, name: str, experts: int, hidden: int, width: int, *, fused: bool = False) -> None:
        """Routed experts: gate and up fused into [E, 2I, H], down [E, H, I]."""
        hub = self._hub(name)
        gate, up, down = (f"{hub}.{{e}}.{part}_proj.weight" for part in ("gate", "up", "down"))
        for stack, shape, parts in (
            ("gate_up_proj", (experts, 2 * width, hidden), (gate, up)),
            ("down_proj", (experts, hidden, width), (down,)),
        ):
            native, key = f"{name}.{stack}.weight", f"{hub}.{stack}"
            self._keys.append(Key(native, key, "experts", shape, "storage", is_storage=True, parts=parts, fused=fused))

    def head(self, name: str, shape: tuple[int, int], *, tied: bool) -> None:
        """The output head; a tied one is the embedding, of which some files hold a copy all the same."""
        if tied:
            self._carried.append(re.escape(f"{name}.weight"))
        else:
            self.matrix(name, "head", shape, stored="dense")

    def build(self, carried: Iterable[str] = ()) -> KeyMap:
        return KeyMap(tuple(self._keys), (*carried, *self._carried))
