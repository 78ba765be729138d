"""Tensors of a checkpoint in pieces small enough to pass through memory one at a time.

Converting, loading, and loading only some experts on each process all read the same stream. A piece is one matrix, or a
range of experts of one stack, already in the form in which the native model keeps it.

Shapes: E experts; a stack is [E, out, in].
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.checkpoint.hub import HubCheckpoint
from models.checkpoint.keymap import HEAD, Key, KeyMap
from models.checkpoint.layout import PREFIXES, Layout
from quant.common.errors import NibbleError
from quant.common.words import format_bytes, some
from quant.kinds import quantise
from quant.storage import all_finite

_READABLE = ("BF16", "F16", "F32", "F64")
# Missing or unused keys named one by one; a checkpoint of another model has tens of thousands.
LISTED = 50
LEFT_OUT = "left out, as nothing here computes with them"
_TEXT, _WRAPPED = (f"{prefix}." for prefix in PREFIXES.values())
# What counts as one part of a model when carried tensors are summed up.
_PART = re.compile(r"model\.layers\.\d+|model\.\w+|\w+")


@dataclass(frozen=True)
class Piece:
    """Native tensors by their dotted names ("model.layers.1.mlp.experts.down_proj.weight.packed").

    start: None for whole tensors. For experts, the tensors hold the rows start, start + 1 … of the stack's dim 0.
    """

    key: Key
    start: int | None
    tensors: dict[str, Tensor]


# Makes another tensor, of the same shape and dtype, of one of a key: of the expert of this number, or of the whole.
Change = Callable[[Key, int | None, Tensor], Tensor]


class Reader(Protocol):
    """A checkpoint that can be read key by key."""

    keys: tuple[Key, ...]

    def read(self, key: Key, experts: range | None = None) -> Iterator[Piece]:
        """The pieces of one key; for a stack, those of the given experts (None: all)."""


class HubReader:
    """Reads a hub checkpoint as native tensors, quantising one matrix at a time.

    keys: the key map's, with the hub's keys as this checkpoint has them (`layout`). carried: hub keys that the
    architecture declares as not computed with. They are left where they are.
    """

    def __init__(
        self,
        checkpoint: HubCheckpoint,
        key_map: KeyMap,
        device: torch.device | str = "cpu",
        change: Change = lambda key, expert, dense: dense,
    ) -> None:
        """device: where matrices are quantised and pieces are. change: what is made of each tensor before.
        Raises NibbleError where keys or shapes don't fit.
        """
        self.checkpoint, self.device, self._change = checkpoint, torch.device(device), change
        self.layout, key_map = _laid_out(key_map, checkpoint)
        self.keys = key_map.keys
        self._fused = {key.hub for key in self.keys if key.parts and key.hub in checkpoint}
        self.carried = self._check_keys(key_map)
        self._check_tensors()

    def read(self, key: Key, experts: range | None = None) -> Iterator[Piece]:
        """One piece per matrix. Raises NibbleError naming a tensor that holds NaN or infinity, and for a tied head that
        differs from the embedding.
        """
        if not key.parts:
            dense = self.checkpoint.tensor(key.hub)
            if key.group == "embedding" and HEAD in self.carried:
                self._check_tied(key, dense)
            yield Piece(key, None, self._stored(key, self._change(key, None, dense), key.hub))
            return
        for expert in experts if experts is not None else range(key.shape[0]):
            name = f"{key.hub}, expert {expert}"
            tensors = self._stored(key, self._change(key, expert, self.dense(key, expert)), name)
            yield Piece(key, expert, {native: tensor.unsqueeze(0) for native, tensor in tensors.items()})

    def left_out(self) -> str:
        """The carried tensors in one line: "model.visual.* (21 tensors, 136.38 KiB), mtp.* (8 tensors, 240 B)"."""
        return sum_up(self.carried, self.checkpoint)

    def dense(self, key: Key, expert: int) -> Tensor:
        """The matrix [out, in] of one expert in the hub's dtype, from a fused stack or from its parts."""
        if key.hub in self._fused:
            return self.checkpoint.row(key.hub, expert)
        parts = [self.checkpoint.tensor(part.format(e=expert)) for part in key.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stored(self, key: Key, dense: Tensor, name: str) -> dict[str, Tensor]:
        dense = dense.to(self.device)
        name = f"{self.checkpoint.path}: {name}"
        if key.spec is not None:
            kept = quantise(key.spec, dense, key.dtype, name=name)
            return {f"{key.native}.{suffix}": part for suffix, part in kept.items()}
        if not all_finite(dense):
            raise NibbleError(f"{name}: some of its values are inf or NaN.\nThe checkpoint is damaged: get it again.")
        return {key.native: dense.to(key.dtype)}

    def _check_tied(self, key: Key, embedding: Tensor) -> None:
        head = self.checkpoint.tensor(HEAD)
        # transformers would take the stored head, against config.json.
        if head.shape != embedding.shape or not torch.equal(head.to(embedding.dtype), embedding):
            raise NibbleError(
                f"{self.checkpoint.path}: config.json says that the output head is the embedding (tie_word_embeddings: "
                f"true), but {HEAD} differs from {key.hub}.\n"
                "Set tie_word_embeddings to false to use the head that is there, or take it out of the weights."
            )

    def _check_keys(self, key_map: KeyMap) -> tuple[str, ...]:
        """Every needed key is there and every other one is declared; returns the latter."""
        wanted: set[str] = set()
        for key in self.keys:
            wanted.update([key.hub] if key.hub in self._fused else key.part_keys())
        missing = [key for key in sorted(wanted) if key not in self.checkpoint]
        others = sorted(key for key in self.checkpoint if key not in wanted)
        carried = tuple(key for key in others if is_carried(key, key_map, self.checkpoint))
        unused = sorted({*others} - {*carried})
        if missing or unused:
            if self.checkpoint.config.get("quantization_config"):
                raise self._quantised("config.json has a quantization_config")
            model_type = self.checkpoint.config.get("model_type")
            lines = [f"{self.checkpoint.path}: the weights don't fit {model_type} as config.json describes it."]
            if missing:
                lines.append(f"{len(missing)} missing: {some(missing, LISTED)}.")
            if unused:
                lines.append(f"{len(unused)} not used: {some(unused, LISTED)}.")
            raise NibbleError("\n".join(lines))
        return carried

    def _check_tensors(self) -> None:
        wrong, unreadable = [], []
        for key in self.keys:
            for hub, shape in self._hub_shapes(key):
                if self.checkpoint.shape(hub) != shape:
                    wrong.append(f"{hub} is {list(self.checkpoint.shape(hub))}, should be {list(shape)}")
                if self.checkpoint.dtype(hub) not in _READABLE:
                    unreadable.append(f"{hub} ({self.checkpoint.dtype(hub)})")
        if wrong:
            raise NibbleError(
                f"{self.checkpoint.path}: shapes differ from what config.json says ({len(wrong)} tensors):\n"
                f"{some(wrong, 3)}."
            )
        if unreadable:
            raise self._quantised(some(unreadable, 3))

    def _quantised(self, why: str) -> NibbleError:
        return NibbleError(
            f"{self.checkpoint.path} is quantised already: {why}.\n"
            "Take the checkpoint in bfloat16, float16 or float32; it is quantised here."
        )

    def _hub_shapes(self, key: Key) -> Iterator[tuple[str, tuple[int, ...]]]:
        if not key.parts or key.hub in self._fused:
            yield key.hub, key.shape
            return
        _, rows, columns = key.shape
        for hub in key.part_keys():
            yield hub, (rows // len(key.parts), columns)


def is_carried(name: str, key_map: KeyMap, names: Collection[str]) -> bool:
    """Whether a checkpoint of these keys has one that is left where it is: what the architecture declares, and layers
    for multi-token prediction that config.json has switched off (DeepSeek-V3's form of them, as GLM has it).
    """
    layer = re.match(r"model\.layers\.\d+\.", name)
    return key_map.is_carried(name) or (layer is not None and f"{layer[0]}eh_proj.weight" in names)


def layout_of(key_map: KeyMap, names: Collection[str]) -> Layout:
    """The layout of a checkpoint with these keys. Where only some stacks are fused, it counts as not fused."""
    wrapped = any(name.startswith(_WRAPPED) for name in names)
    stacks = [key.hub for key in key_map.laid_out(Layout(wrapped, False)).keys if key.parts]
    return Layout(wrapped, bool(stacks) and all(stack in names for stack in stacks))


def _laid_out(key_map: KeyMap, checkpoint: HubCheckpoint) -> tuple[Layout, KeyMap]:
    """The layout of a checkpoint, and the key map in it."""
    layout = layout_of(key_map, checkpoint)
    laid_out = key_map.laid_out(layout)
    if layout.wrapped or not any(key.hub.startswith(_WRAPPED) for key in key_map.keys):
        return layout, laid_out
    # Read all the same, an adapter would have config.json's names, which no class that loads these keys has.
    if all(key.hub in checkpoint or all(part in checkpoint for part in key.part_keys()) for key in laid_out.keys):
        raise NibbleError(
            f"{checkpoint.path}: the keys are those of a text model ({_TEXT}…); config.json says model_type "
            f"{checkpoint.config.get('model_type')}, whose keys are {_WRAPPED}….\n"
            "Make what config.json has as text_config the whole of it, with its own model_type."
        )
    return layout, key_map


def sum_up(carried: Sequence[str], checkpoint: HubCheckpoint | None = None) -> str:
    """Hub keys by parts of the model, with their number and, where their checkpoint is at hand, their size."""
    parts: dict[str, list[str]] = {}
    for name in carried:
        found = _PART.match(name)
        parts.setdefault(found[0] if found else name, []).append(name)
    lines = []
    for names in parts.values():
        count = f"{len(names)} tensor{'s'[: len(names) != 1]}"
        size = f", {format_bytes(checkpoint.nbytes_of(names))}" if checkpoint is not None else ""
        lines.append(f"{_common(names)} ({count}{size})")
    return some(lines)


def _common(names: list[str]) -> str:
    """What names begin with, to a dot: "model.visual.*"; the whole name of a single one."""
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return ".".join([*(parts[0] for parts in same), "*"])
