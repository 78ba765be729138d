"""What quantisation changed of the weights beside what the adapter did: by layer and kind, and in three lines.

A QLoRA adapter is trained against the weights that the quantised base gives back. Merged into the weights as they were,
it meets others; by how much is the norm of the quantisation error, and whether that matters depends on the norm of
the update beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.adapters.targets import layer_of
from models.blocks.groups import Group
from models.checkpoint.keymap import Key
from models.checkpoint.native import describe_storage
from quant.storage import StorageSpec

_WHOLE = -1  # in place of an expert's number


@dataclass(frozen=True)
class Row:
    """Of one layer's adapted matrices of one kind: Frobenius norms. error: of what quantisation changed; delta: of
    s · B·A.
    """

    layer: int
    group: Group
    error: float
    delta: float


class Norms:
    """Squared norms per matrix: of one that is made twice, they are counted once."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = {key.native: key for key in keys}
        self._squares: dict[str, dict[int, tuple[float, float]]] = {}

    def has(self, key: Key, expert: int | None) -> bool:
        """Whether there is nothing more to measure: it has been, or the matrix isn't adapted."""
        found = self._squares.get(key.native, {})
        return key.native not in self._keys or (_WHOLE if expert is None else expert) in found

    def add(self, key: Key, expert: int | None, *, error: Tensor, delta: Tensor) -> None:
        if not self.has(key, expert):
            squares = (float(error.double().square().sum()), float(delta.double().square().sum()))
            self._squares.setdefault(key.native, {})[_WHOLE if expert is None else expert] = squares

    def state(self) -> dict[str, dict[str, list[float]]]:
        """What was measured, for a file of JSON."""
        return {
            native: {str(expert): list(pair) for expert, pair in found.items()}
            for native, found in self._squares.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, TypeError or AttributeError for what `state` can't have given."""
        for native, found in state.items():
            if native in self._keys:
                self._squares.setdefault(native, {}).update(
                    {int(expert): (float(error), float(delta)) for expert, (error, delta) in found.items()}
                )

    def rows(self) -> list[Row]:
        """By layer, and in it by kind in the model's order."""
        sums: dict[tuple[int, Group], list[float]] = {}
        for native, key in self._keys.items():
            for error, delta in self._squares.get(native, {}).values():
                entry = sums.setdefault((layer_of(native) or 0, key.group), [0.0, 0.0])
                entry[0] += error
                entry[1] += delta
        return [
            Row(layer, group, math.sqrt(error), math.sqrt(delta)) for (layer, group), (error, delta) in sums.items()
        ]


def summary(rows: list[Row], trained: StorageSpec, why: str, dequantised: bool) -> list[str]:
    """Three lines: the norms by kind, where the error is largest beside the change, and what follows from it.

    why: where the storage of the training is known from.
    """
    if trained.kind == "none":
        return [f"trained against the weights as they are (storage none, {why}): there is no quantisation error"]
    stored = f"{describe_storage(trained)}, {why}"
    kinds: dict[Group, list[float]] = {}
    for row in rows:
        entry = kinds.setdefault(row.group, [0.0, 0.0])
        entry[0] += row.error**2
        entry[1] += row.delta**2
    by_kind = ", ".join(
        f"{_words(group)} {math.sqrt(error):.3g} beside {math.sqrt(delta):.3g}"
        for group, (error, delta) in kinds.items()
    )
    worst = max(rows, key=lambda row: row.error / row.delta if row.delta else math.inf)
    larger = [row for row in rows if row.error > row.delta]
    return [
        f"norms of the quantisation error ({stored}) beside the adapter's change: {by_kind}",
        f"the error is the larger in {len(larger)} of {len(rows)} (by layer and kind); most so in layer {worst.layer}, "
        f"{_words(worst.group)}: {worst.error:.3g} beside {worst.delta:.3g}",
        _advice(bool(larger), dequantised),
    ]


def _words(group: Group) -> str:
    return group.replace("_", " ")


def _advice(larger: bool, dequantised: bool) -> str:
    if dequantised:
        return "merged into the dequantised base, which is what the adapter was trained against: the error is kept"
    if larger:
        return (
            "advice: the adapter was trained against weights that differ by more than it changes; merge with "
            "--onto dequantised too, and keep the one with the lower loss"
        )
    return "the change outweighs the error everywhere: merging into the base as it is is the usual choice"
