"""The table that a run starts with: how many weights each group has, how they are stored, how many are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quant.storage import Storage

from .decoder import CausalLM
from .keymap import Key
from .lora import key_map_of
from .targets import GROUP_WORDS, module_name


@dataclass(frozen=True)
class GroupRow:
    """One group of weights, for the table that a run starts with.

    group: a key map's group, or "total"; stored: the kinds of storage or dtypes, most bytes first; parameters: the true
    count, quantised or not (buffers such as router biases are no parameters); nbytes: as stored, without LoRA;
    trained: parameters with a gradient; ranks: of their LoRAs, empty where the weights themselves are trained.
    """

    group: str
    parameters: int
    stored: tuple[str, ...]
    nbytes: int
    trained: int
    ranks: tuple[int, ...]


def parameter_table(model: CausalLM) -> list[GroupRow]:
    """A row for each group that the model has, then the total."""
    key_map = key_map_of(model)
    rows = []
    for group in GROUP_WORDS:
        keys = [key for key in key_map.keys if key.group == group]
        if keys:
            rows.append(_row(model, group, keys))
    return [*rows, _row(model, "total", key_map.keys)]


def _row(model: CausalLM, group: str, keys: Sequence[Key]) -> GroupRow:
    parameters = nbytes = trained = 0
    kinds: dict[str, int] = {}
    ranks: set[int] = set()
    for key in keys:
        held, kind, size, own_trained = _held(model, key)
        parameters += held
        nbytes += size
        trained += own_trained
        kinds[kind] = kinds.get(kind, 0) + size
        lora = getattr(model.get_submodule(module_name(key.native)), "lora", None) if key.is_storage else None
        if lora is not None:
            trained += sum(tensor.numel() for tensor in lora.parameters() if tensor.requires_grad)
            ranks.add(lora.rank)
    stored = tuple(sorted(kinds, key=lambda kind: -kinds[kind]))
    return GroupRow(group, parameters, stored, nbytes, trained, tuple(sorted(ranks, reverse=True)))


def _held(model: CausalLM, key: Key) -> tuple[int, str, int, int]:
    """Of one native tensor: parameters, kind of storage, bytes, trained parameters."""
    owner, _, leaf = key.native.rpartition(".")
    held = getattr(model.get_submodule(owner), leaf)
    if isinstance(held, Storage):
        trained = held.numel if any(tensor.requires_grad for tensor in held.parameters()) else 0
        kind = held.kind if held.kind != "none" else str(held.dtype).removeprefix("torch.")
        return held.numel, kind, held.nbytes, trained
    count = held.numel() if key.counted else 0
    trained = count if held.requires_grad else 0
    return count, str(held.dtype).removeprefix("torch."), held.numel() * held.element_size(), trained
