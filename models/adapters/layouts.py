"""How an adapter's file keeps the A and B of a matrix or of a stack of experts: names, shapes, and back to A and B.

A matrix's tensors are an ordinary LoRA: lora_A [R, in], lora_B [out, R]. A stack of experts is, in PEFT ≥ 0.19.1, two
matrices for all experts:

    lora_A [E·R, in]    the experts' A below one another
    lora_B [out, R·E]   column j·E + e is column j of expert e's B

Where both stacks of a layer are adapted PEFT nests them in the order in which they are defined: gate_up_proj's tensors
are at `experts.base_layer.lora_*`, down_proj's at `experts.lora_*`. A single adapted stack is at the latter. The
file doesn't say which stack a tensor belongs to; the config's target_parameters do.

Other programs have written stacks otherwise:

    swapped         PEFT up to 0.19.0 took the rows of each expert's matrix for its inputs: lora_A [E·R, out],
                    lora_B [in, R·E], the update being their product transposed
    expert-major    unsloth until September 2026 trained with expert e's B at columns e·R to e·R + R - 1. No shape tells
    one by one      transformers 4, vLLM and llama.cpp have an ordinary LoRA per expert and matrix:
                    `experts.7.gate_proj.lora_A` [R, in]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.adapters.packing import Packing
from models.adapters.targets import Target, module_name
from models.checkpoint.keymap import Key

PREFIX = "base_model.model."
Shape = tuple[int, int]


class Stored(Protocol):
    """One adapted matrix or stack as a file has it."""

    @property
    def target(self) -> Target: ...

    def shapes(self) -> dict[str, Shape]:
        """The file's tensors, by name: all As before all Bs."""

    def read(self, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """A [R, in] and B [out, R]; of a stack [E, R, in] and [E, out, R]. get: a tensor of the file by its name."""


def tensor_names(prefix: str) -> tuple[str, str]:
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def prefixes_of(keys: Sequence[Key]) -> dict[str, str]:
    """Where PEFT's layout keeps the A and B of each adapted matrix or stack: native name to prefix."""
    stacks: dict[str, list[str]] = {}
    prefixes = {}
    for key in keys:
        if len(key.shape) == 2:
            prefixes[key.native] = f"{PREFIX}{module_name(key.hub)}"
        else:
            stacks.setdefault(key.hub.rpartition(".")[0], []).append(key.native)
    for module, natives in stacks.items():
        for depth, native in enumerate(reversed(natives)):
            prefixes[native] = f"{PREFIX}{module}" + ".base_layer" * depth
    return prefixes


def peft_shapes(key: Key, rank: int) -> tuple[Shape, Shape]:
    """Of lora_A and lora_B in PEFT's layout."""
    *experts, out_features, in_features = key.shape
    width = rank * (experts[0] if experts else 1)
    return (width, in_features), (out_features, width)


@dataclass(frozen=True)
class StoredMatrix:
    target: Target
    prefix: str

    def shapes(self) -> dict[str, Shape]:
        return dict(zip(tensor_names(self.prefix), peft_shapes(self.target.key, self.target.rank), strict=True))

    def read(self, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        a, b = map(get, tensor_names(self.prefix))
        return a, b


@dataclass(frozen=True)
class StoredStack:
    """swapped: in and out are exchanged, as in PEFT up to 0.19.0."""

    target: Target
    prefix: str
    packing: Packing = "peft"
    swapped: bool = False

    def shapes(self) -> dict[str, Shape]:
        (width, inputs), (outputs, _) = peft_shapes(self.target.key, self.target.rank)
        if self.swapped:
            inputs, outputs = outputs, inputs
        return dict(zip(tensor_names(self.prefix), ((width, inputs), (outputs, width)), strict=True))

    def read(self, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        a, b = map(get, tensor_names(self.prefix))
        experts = self.target.key.shape[0]
        a = a.unflatten(0, (experts, -1))
        if self.packing == "expert-major":
            b = b.unflatten(1, (experts, -1)).permute(1, 0, 2)
        else:
            b = b.unflatten(1, (-1, experts)).permute(2, 0, 1)
        return (b.mT, a.mT) if self.swapped else (a, b)


@dataclass(frozen=True)
class StoredExperts:
    """A stack whose experts are in the file one by one.

    parts: those of the key's that are adapted, all of one rank. Together they are one LoRA of the stack, whose rank is
    the sum of theirs: the parts' A below one another, and their B along a diagonal.
    """

    target: Target
    parts: tuple[str, ...]

    @property
    def rank(self) -> int:
        """Of each part."""
        return self.target.rank // len(self.parts)

    def _names(self, part: str, expert: int) -> tuple[str, str]:
        return tensor_names(f"{PREFIX}{module_name(part.format(e=expert))}")

    def shapes(self) -> dict[str, Shape]:
        experts, out_features, in_features = self.target.key.shape
        height = out_features // len(self.target.key.parts)
        every = [self._names(part, expert) for expert in range(experts) for part in self.parts]
        return dict.fromkeys((a for a, _ in every), (self.rank, in_features)) | dict.fromkeys(
            (b for _, b in every), (height, self.rank)
        )

    def read(self, get: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        experts, out_features, in_features = self.target.key.shape
        height = out_features // len(self.target.key.parts)
        a = torch.zeros(experts, self.target.rank, in_features)
        b = torch.zeros(experts, out_features, self.target.rank)
        for number, part in enumerate(self.parts):
            ranks = slice(number * self.rank, (number + 1) * self.rank)
            row = self.target.key.parts.index(part) * height
            for expert in range(experts):
                a[expert, ranks], b[expert, row : row + height, ranks] = map(get, self._names(part, expert))
        return a, b


def to_peft(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The file's lora_A and lora_B, in PEFT's layout, of A and B as a LoRA has them."""
    return (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)) if b.ndim == 3 else (a, b)


def is_swapped(stacks: Sequence[StoredStack], header: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Whether the shapes in a file are those of PEFT up to 0.19.0; None where they fit both layouts, or neither."""
    found = set()
    for stack in stacks:
        plain, swapped = stack.shapes(), StoredStack(stack.target, stack.prefix, swapped=True).shapes()
        stored = {name: header.get(name) for name in plain}
        if plain != swapped and stored in (plain, swapped):
            found.add(stored == swapped)
    return found.pop() if len(found) == 1 else None
