"""The parameter table of a run: of each group the number of parameters, their storage and how many are trained.

Shapes come from the key map, so that whole tensors are counted where a process holds parts of them; dtype, storage and
requires_grad come from the tensors held.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.adapters.targets import module_name
from models.blocks.groups import GROUP_WORDS
from models.blocks.linear import LoRA
from models.checkpoint.keymap import Key, key_map_of
from models.decoder import CausalLM
from quant.kinds import storage_tensors
from quant.storage import Storage


@dataclass(frozen=True)
class WholeTensor:
    """One tensor of the model, of the size that it has on a single process.

    name: dotted, as the model has it. key: of the weight that it keeps, or belongs to. lora: it is LoRA's A or B.
    trained: it has a gradient.
    """

    name: str
    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    lora: bool
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


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
    tensors = whole_tensors(model)
    rows = []
    for group in GROUP_WORDS:
        of_group = [tensor for tensor in tensors if tensor.key.group == group]
        if of_group:
            rows.append(_row(model, group, of_group))
    return [*rows, _row(model, "total", tensors)]


def whole_tensors(model: CausalLM) -> list[WholeTensor]:
    """The tensors of every key, parameters and buffers, then those of its LoRA, in the order of the key map."""
    return [tensor for key in key_map_of(model).keys for tensor in (*_weights(model, key), *_lora(model, key))]


def _weights(model: CausalLM, key: Key) -> Iterator[WholeTensor]:
    held = _held(model, key)
    if isinstance(held, Tensor):
        yield WholeTensor(key.native, key, key.shape, held.dtype, False, held.requires_grad)
        return
    for name, (shape, dtype) in storage_tensors(held.spec, key.shape, held.dtype, held.name).items():
        trained = held.get_parameter(name).requires_grad
        yield WholeTensor(f"{key.native}.{name}", key, shape, dtype, False, trained)


def _lora(model: CausalLM, key: Key) -> Iterator[WholeTensor]:
    lora = _lora_of(model, key)
    if lora is None:
        return
    *experts, rows, columns = key.shape
    for name, tensor, shape in (("A", lora.A, (lora.rank, columns)), ("B", lora.B, (rows, lora.rank))):
        full = f"{module_name(key.native)}.lora.{name}"
        yield WholeTensor(full, key, (*experts, *shape), tensor.dtype, True, tensor.requires_grad)


def _held(model: CausalLM, key: Key) -> Storage | Tensor:
    owner, _, leaf = key.native.rpartition(".")
    held = getattr(model.get_submodule(owner), leaf)
    assert isinstance(held, Storage | Tensor)
    return held


def _lora_of(model: CausalLM, key: Key) -> LoRA | None:
    return getattr(model.get_submodule(module_name(key.native)), "lora", None) if key.spec is not None else None


def _row(model: CausalLM, group: str, tensors: Iterable[WholeTensor]) -> GroupRow:
    parameters = nbytes = trained = 0
    kinds: dict[str, int] = {}
    ranks: set[int] = set()
    for key, of_key in _by_key(tensors):
        size = sum(tensor.nbytes for tensor in of_key if not tensor.lora)
        kind = _kind(_held(model, key))
        kinds[kind] = kinds.get(kind, 0) + size
        nbytes += size
        if key.counted:
            parameters += math.prod(key.shape)
        trained += sum(tensor.numel for tensor in of_key if tensor.trained)
        if (lora := _lora_of(model, key)) is not None:
            ranks.add(lora.rank)
    stored = tuple(sorted(kinds, key=lambda kind: -kinds[kind]))
    return GroupRow(group, parameters, stored, nbytes, trained, tuple(sorted(ranks, reverse=True)))


def _by_key(tensors: Iterable[WholeTensor]) -> Iterable[tuple[Key, list[WholeTensor]]]:
    found: dict[Key, list[WholeTensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.key, []).append(tensor)
    return found.items()


def _kind(held: Storage | Tensor) -> str:
    if isinstance(held, Storage) and held.kind != "none":
        return held.kind
    return str(held.dtype).removeprefix("torch.")
