"""The plan: which modules are gathered together, and how every tensor is cut.

It is worked out from the model on the meta device, before anything large is read, so that what can't be cut is known at
the start. parallel/fsdp.py carries it out.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from models.blocks.linear import LoRA
from models.decoder import CausalLM
from parallel.mesh import MeshSizes
from quant.common.errors import NibbleError
from quant.storage import Storage

Over = Literal["all", "owners"]


@dataclass(frozen=True)
class Unit:
    """Modules that are gathered before they compute and freed after it, each by itself.

    modules: their names, * for the number of a layer. over: cut over all processes that hold one copy of the model, or
    over those that own the same experts. kept: it stays gathered from the forward pass until its backward pass.
    backward: its weights are needed there (an embedding's aren't, not even for its own gradient).
    """

    modules: str
    over: Over = "all"
    kept: bool = False
    backward: bool = True


# A unit inside another one comes before it; a unit has the parameters that no unit before it has.
UNITS = (
    Unit("model.embed_tokens", backward=False),
    Unit("model.layers.*.mlp.experts", over="owners"),  # only with parallel.expert > 1
    Unit("model.layers.*"),
    Unit("lm_head", kept=True),  # the backward pass begins where the forward pass ends
    Unit("", kept=True),  # the final norm; with tied embeddings, embedding and head too
)


def units(model: CausalLM, sizes: MeshSizes) -> Iterator[tuple[Unit, nn.Module]]:
    """The units of `model` in the order in which fully_shard has to meet them."""
    tied = model.lm_head.weight.get_parameter("value") is model.model.embed_tokens.weight
    modules = dict(model.named_modules())
    for unit in UNITS:
        if unit.over == "owners" and sizes.expert == 1:
            continue
        if tied and unit.modules in ("model.embed_tokens", "lm_head"):
            continue  # one tensor can't be in two units
        for name in modules:
            # A * stands for one number: deeper modules have more dots.
            if fnmatch.fnmatchcase(name, unit.modules) and name.count(".") == unit.modules.count("."):
                yield unit, modules[name]


@dataclass(frozen=True)
class Rule:
    """Tensors of one kind are cut along `dim`; `evenly`: or not at all. dim None: every process has them whole."""

    kind: str
    dim: int | None
    evenly: bool = False


STACK = Rule("a stack, an expert per index, and LoRA on it", 0, evenly=True)
# A row of a 4-bit matrix is a whole number of blocks, and a row of int8 has its scale: no block is ever cut.
ROWS = Rule("a quantised matrix, by rows", 0, evenly=True)
FIRST = Rule("any other tensor, unevenly if nothing else", 0)
SECOND = Rule("a matrix of which the rows don't divide but the columns do", 1)
WHOLE = Rule("a single number; what is trained in another dtype than its unit", None)


def cuts(model: CausalLM, sizes: MeshSizes) -> dict[str, Rule]:
    """How every parameter of `model` is cut, by name.

    Raises NibbleError naming the first one that has to be cut evenly and can't be.
    """
    other_dtype = _trained_in_another_dtype(model, sizes)
    found: dict[str, Rule] = {}
    evenly: dict[str, int] = {}  # the sizes of what has to be cut so, in words
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if parameter.ndim == 0 or parameter in other_dtype:
                found[name] = WHOLE
                continue
            rule = _rule(module, name, parameter, sizes.parts)
            if rule.evenly:
                size = parameter.shape[0]
                evenly[f"{module_name} has {size} {'experts' if rule is STACK else 'rows'}"] = size
            found.setdefault(name, rule)
    _require_even(evenly, sizes)
    return found


def _rule(module: nn.Module, name: str, parameter: nn.Parameter, parts: int) -> Rule:
    if isinstance(module, Storage | LoRA) and _is_stack(module):
        return STACK
    if isinstance(module, Storage) and module.kind != "none" and not name.endswith(".nested_absmax"):
        return ROWS
    if parameter.shape[0] % parts and parameter.ndim > 1 and parameter.shape[1] % parts == 0:
        return SECOND
    return FIRST


def _is_stack(module: Storage | LoRA) -> bool:
    return len(module.shape if isinstance(module, Storage) else module.A.shape) == 3


def _trained_in_another_dtype(model: CausalLM, sizes: MeshSizes) -> set[nn.Parameter]:
    """FSDP2 reduces the gradients of a unit in one buffer of one dtype. Full fine-tuning in bfloat16 also trains a few
    float32 tensors (routers, some norms): those stay whole, and their gradients are summed on their own."""
    seen: set[nn.Parameter] = set()
    other: set[nn.Parameter] = set()
    for _, module in units(model, sizes):
        trained = [p for p in module.parameters() if p.requires_grad and p not in seen]
        numbers: dict[torch.dtype, int] = {}
        for parameter in trained:
            numbers[parameter.dtype] = numbers.get(parameter.dtype, 0) + parameter.numel()
        most = max(numbers, key=lambda dtype: numbers[dtype], default=None)
        other.update(p for p in trained if p.dtype != most)
        seen.update(module.parameters())
    return other


def _require_even(evenly: dict[str, int], sizes: MeshSizes) -> None:
    parts = sizes.parts
    wrong = [what for what, size in evenly.items() if size % parts]
    if not wrong:
        return
    # Experts first: their number is the user's first thought.
    first = min(wrong, key=lambda what: not what.endswith("experts"))
    common = math.gcd(*evenly.values())
    fit = [str(number) for number in range(1, common + 1) if common % number == 0]
    raise NibbleError(
        f"{first}, which can't be cut into {parts} equal parts (parallel.expert {sizes.expert} × parallel.shard "
        f"{sizes.shard}).\nThis model can be cut into {', '.join(fit)}. More processes are put to use with "
        "parallel.replicate."
    )
