"""The parameter table of a run: of each group the number of parameters, their storage and how many are trained.

Shapes come from the key map, so that whole tensors are counted where a process holds parts of them; dtype, storage and
requires_grad come from the tensors held.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch

from models.adapters.targets import module_name
from models.blocks.groups import GROUP_WORDS
from models.checkpoint.keymap import Key, key_map_of
from models.decoder import CausalLM
from quant.kinds import storage_tensors
from quant.storage import Storage


@dataclass(frozen=True)
class WholeTensor:
    """One tensor of the model, of the size that it has on a single process.

    name: dotted, as the model has it. key: of the weight that it keeps, or belongs to. kind: the weight's storage or
    dtype; "lora" for LoRA's A and B. trained: it has a gradient.
    """

    name: str
    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    trained: bool

    @property
    def lora(self) -> bool:
        return self.kind == "lora"

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
    groups = {group: [tensor for tensor in tensors if tensor.key.group == group] for group in GROUP_WORDS}
    return [*(_row(group, found) for group, found in groups.items() if found), _row("total", tensors)]


def whole_tensors(model: CausalLM) -> list[WholeTensor]:
    """The tensors of every key, parameters and buffers, each key's followed by those of its LoRA."""
    found = []
    for key in key_map_of(model).keys:
        owner, _, leaf = key.native.rpartition(".")
        held = getattr(model.get_submodule(owner), leaf)
        kind = str(held.dtype).removeprefix("torch.")
        if isinstance(held, Storage):
            kind = kind if held.kind == "none" else held.kind
            for name, (shape, dtype) in storage_tensors(held.spec, key.shape, held.dtype, held.name).items():
                trained = held.get_parameter(name).requires_grad
                found.append(WholeTensor(f"{key.native}.{name}", key, shape, dtype, kind, trained))
        else:
            found.append(WholeTensor(key.native, key, key.shape, held.dtype, kind, held.requires_grad))
        module = module_name(key.native)
        lora = getattr(model.get_submodule(module), "lora", None) if key.spec is not None else None
        if lora is not None:
            *experts, rows, columns = key.shape
            for name, tensor, matrix in (("A", lora.A, (lora.rank, columns)), ("B", lora.B, (rows, lora.rank))):
                shape = (*experts, *matrix)
                found.append(
                    WholeTensor(f"{module}.lora.{name}", key, shape, tensor.dtype, "lora", tensor.requires_grad)
                )
    return found


def _row(group: str, tensors: list[WholeTensor]) -> GroupRow:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if not tensor.lora:
            sizes[tensor.kind] += tensor.nbytes
    return GroupRow(
        group=group,
        parameters=sum(math.prod(key.shape) for key in {tensor.key for tensor in tensors} if key.counted),
        stored=tuple(kind for kind, _ in sizes.most_common()),
        nbytes=sizes.total(),
        trained=sum(tensor.numel for tensor in tensors if tensor.trained),
        ranks=tuple(sorted({t.shape[-2] for t in tensors if t.name.endswith(".lora.A")}, reverse=True)),
    )
