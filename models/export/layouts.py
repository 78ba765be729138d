"""The layouts of adapters: which tensors a file has for LoRA on a matrix or on a stack of experts.

stacked     PEFT's own from 0.19.1 on: a stack of experts is two tensors (models/adapters/files.py).
per expert  an ordinary LoRA for each matrix of each expert, `mlp.experts.E.gate_proj.lora_A.weight`. Gate and up have
            one A in a stack, so both get it; each gets its rows of B.

Shapes: E experts, R rank, `in` and `out` features of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.adapters.layouts import PREFIX, peft_shapes, prefixes_of, tensor_names, to_peft
from models.adapters.targets import module_name
from models.blocks.groups import Group
from models.checkpoint.keymap import Key, KeyMap

EXPERTS: Group = "experts"


@dataclass(frozen=True)
class Update:
    """The LoRA of one matrix or stack: scale · B A.

    read() gives A [.., R, in] and B [.., out, R], float32 or bfloat16.
    """

    key: Key
    rank: int
    scale: float
    dtype: torch.dtype
    read: Callable[[], tuple[Tensor, Tensor]]


def folded(updates: Sequence[Update]) -> list[Update]:
    """The same updates with scale 1 and one rank, the largest: B is multiplied by the scale, A and B get zeros.

    So nothing has to be read from a configuration but this rank, which is also alpha. Where the product could be
    rounded (bfloat16, and a scale that is no power of two) it is float32.
    """
    rank = max(update.rank for update in updates)
    return [_folded(update, rank) for update in updates]


def _folded(update: Update, rank: int) -> Update:
    exact = update.dtype == torch.float32 or _is_power_of_two(update.scale)
    dtype = update.dtype if exact else torch.float32

    def read() -> tuple[Tensor, Tensor]:
        a, b = (value.to(dtype) for value in update.read())
        more = rank - update.rank
        zeros_a, zeros_b = a.new_zeros(*a.shape[:-2], more, a.shape[-1]), b.new_zeros(*b.shape[:-1], more)
        return torch.cat((a, zeros_a), -2), torch.cat((b * update.scale, zeros_b), -1)

    return Update(update.key, rank, 1.0, dtype, read)


def _is_power_of_two(number: float) -> bool:
    mantissa, _ = torch.frexp(torch.tensor(number, dtype=torch.float64))
    return mantissa.item() == 0.5


def with_all_stacks(updates: Sequence[Update], key_map: KeyMap) -> list[Update]:
    """The same updates and zeros for the stacks of experts that a layer has beside those that are adapted, in the
    model's order.
    """
    found = {update.key.native: update for update in updates}
    blocks = {_block(update.key): update for update in updates if update.key.group == EXPERTS}
    for key in key_map.keys:
        if key.group == EXPERTS and key.native not in found and _block(key) in blocks:
            found[key.native] = _zeros(key, blocks[_block(key)])
    return [found[key.native] for key in key_map.keys if key.native in found]


def _block(key: Key) -> str:
    return key.native.rpartition(".experts.")[0]


def _zeros(key: Key, like: Update) -> Update:
    *experts, out, into = key.shape

    def read() -> tuple[Tensor, Tensor]:
        return (
            torch.zeros(*experts, like.rank, into, dtype=like.dtype),
            torch.zeros(*experts, out, like.rank, dtype=like.dtype),
        )

    return Update(key, like.rank, 1.0, like.dtype, read)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of an adapter's file, and what makes it. Those of one update follow each other."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    update: Update
    make: Callable[[Tensor, Tensor], Tensor]


def stacked(updates: Sequence[Update]) -> Iterator[FileTensor]:
    """As PEFT has them."""
    prefixes = prefixes_of([update.key for update in updates])
    for update in updates:
        names, shapes = tensor_names(prefixes[update.key.native]), peft_shapes(update.key, update.rank)
        for index in (0, 1):
            yield FileTensor(names[index], shapes[index], update.dtype, update, _of_peft(index))


def _of_peft(index: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: to_peft(a, b)[index]


def per_expert(updates: Sequence[Update], rename: Callable[[str], str] = lambda name: name) -> Iterator[FileTensor]:
    """One LoRA per expert and matrix. rename: of a module's name, for servers that have another."""
    for update in updates:
        *_, out, into = update.key.shape
        for name, expert, rows in update.key.matrices():
            height = len(range(*rows.indices(out)))
            name_a, name_b = tensor_names(f"{PREFIX}{rename(module_name(name))}")
            yield FileTensor(name_a, (update.rank, into), update.dtype, update, _of_expert(expert))
            yield FileTensor(name_b, (height, update.rank), update.dtype, update, _of_expert(expert, rows))


def _of_expert(expert: int | None, rows: slice | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """A of an expert or, with rows, those of its B; None: of a matrix."""

    def make(a: Tensor, b: Tensor) -> Tensor:
        value = a if rows is None else b
        value = value if expert is None else value[expert]
        return value if rows is None else value[rows]

    return make
