"""The LoRA pairs in an adapter's file, told by names and shapes alone: no base model is needed to look at an adapter.

What is of one matrix of the base belongs together, however a file divides it: a matrix has an A [R, in] and a B
[out, R]; a stack of E experts has an A [E·R, in] and a B [out, R·E], or as many pairs as experts
(`experts.7.gate_proj`). PEFT before 0.19.1 swaps `in` and `out` of stacks, which changes no norm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.adapters.config_targets import ends_with, ranks_and_alphas
from models.adapters.packing import Packing
from models.adapters.patterns import Budget
from models.adapters.peft_config import CONFIG, WEIGHTS
from models.adapters.targets import layer_of, within_layer
from models.blocks.linear import scaling
from models.checkpoint.tensorfile import TensorInfo, read_header
from quant.common.errors import NibbleError
from quant.common.jsonfile import texts
from quant.common.words import some

_LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_EXPERT = re.compile(r"(.*\bexperts)\.(\d{1,6})\.(\w+)")


@dataclass(frozen=True)
class Adapted:
    """A matrix, or a stack of experts, with its pairs.

    name: the base's, `model.layers.1.mlp.experts.gate_up_proj`. rank: of a matrix or of one expert. inside, outside:
    features of A and of B. stacked: how many experts A and B hold, None where they are of one matrix. pairs: each with
    the expert whose it is (None: of all, or of a matrix) and the names of A and B.
    """

    name: str
    rank: int
    alpha: float
    rslora: bool
    inside: int
    outside: int
    stacked: int | None
    pairs: tuple[tuple[int | None, tuple[str, str]], ...]

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def kind(self) -> str:
        return within_layer(self.name)

    @property
    def scale(self) -> float:
        return scaling(self.rank, self.alpha, self.rslora)

    @property
    def experts(self) -> int | None:
        """How many there are, None of a matrix; of a file that has them one by one, up to the last."""
        last = self.pairs[-1][0]
        return self.stacked if last is None else last + 1

    def norms(self, get: Callable[[str], Tensor], packing: Packing = "peft") -> list[float]:
        """The Frobenius norm of scale · B·A of each expert, 0 for one without a pair, or of the one matrix.

        get: a tensor of the file by its name. packing: of a stack's B, column j·E + e is column j of expert e's or
        ("expert-major") column e·R + j. ‖BA‖² = tr(AᵀBᵀBA) = tr((BᵀB)(AAᵀ)), so that nothing larger than A and B is
        made. In float64.
        """
        found = [0.0] * (self.experts or 1)
        for expert, names in self.pairs:
            a, b = (get(name).double() for name in names)
            a = a.unflatten(0, (self.stacked or 1, -1))
            if packing == "expert-major":
                b = b.unflatten(1, (self.stacked or 1, -1)).permute(1, 0, 2)
            else:
                b = b.unflatten(1, (-1, self.stacked or 1)).permute(2, 0, 1)
            squares = ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp(min=0)
            first = expert or 0
            found[first : first + len(squares)] = (self.scale * squares.sqrt()).tolist()
        return found


def read_pairs(folder: Path, config: Mapping[str, Any]) -> tuple[list[Adapted], list[str]]:
    """What the adapter in `folder` adapts, by layers, and the names of tensors that are no LoRA's. config: its
    adapter_config.json.

    Raises NibbleError for a pair that lacks A or B, and for shapes that don't fit each other or the rank.
    """
    header = read_header(folder / WEIGHTS)
    found: dict[str, dict[str, str]] = {}
    others = []
    for tensor in header:
        match = _LORA.fullmatch(tensor)
        if match is None:
            others.append(tensor)
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    single = [
        f"{module} has no lora_{'AB'[len(pair.keys() & {'A'})]}" for module, pair in found.items() if len(pair) < 2
    ]
    if single:
        raise NibbleError(f"{folder / WEIGHTS}: {some(single, 3)}. The file isn't complete.")
    grouped: dict[str, list[tuple[int | None, tuple[str, str]]]] = {}
    for module, pair in found.items():
        expert = _EXPERT.fullmatch(module)
        name = f"{expert[1]}.{expert[3]}" if expert else _stack_name(module, found, config, str(folder / CONFIG))
        grouped.setdefault(name, []).append((int(expert[2]) if expert else None, (pair["A"], pair["B"])))
    numbers = ranks_and_alphas(config, str(folder / CONFIG), Budget())
    adapted = [_adapted(name, pairs, header, config, numbers, folder) for name, pairs in grouped.items()]
    return sorted(adapted, key=lambda one: (one.layer is None, one.layer or 0, one.kind)), others


def _stack_name(module: str, found: Mapping[str, Any], config: Mapping[str, Any], where: str) -> str:
    """The base's name of what a module's tensors adapt: PEFT nests the stacks of a layer (models/adapters/files.py)."""
    if module.endswith(".experts.base_layer"):
        return f"{module.removesuffix('.base_layer')}.gate_up_proj"
    if not module.endswith(".experts"):
        return module
    if f"{module}.base_layer" in found:
        return f"{module}.down_proj"
    given = texts(config, "target_parameters", where)
    fitting = {target.rpartition(".")[2] for target in given} & {"gate_up_proj", "down_proj"}
    if len(fitting) != 1:
        raise NibbleError(f"{where}: target_parameters don't tell which stack of {module} is adapted ({some(given)}).")
    return f"{module}.{fitting.pop()}"


def _adapted(
    name: str,
    pairs: list[tuple[int | None, tuple[str, str]]],
    header: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    numbers: Callable[[str], tuple[int, float]],
    folder: Path,
) -> Adapted:
    shapes = {tuple(header[tensor].shape for tensor in names) for _, names in pairs}
    (a, b), *more = shapes
    if more or len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        given = some([" and ".join(str(list(shape)) for shape in pair) for pair in shapes], 3)
        raise NibbleError(f"{folder / WEIGHTS}: lora_A and lora_B of {name} don't fit each other: {given}.")
    where, stack = str(folder / CONFIG), pairs[0][0] is None and re.search(r"\bexperts\.\w+$", name) is not None
    parameters = texts(config, "target_parameters", where)
    if any(ends_with(f"{name}.weight", target) for target in parameters):
        by_config = numbers(f"{name}.weight")
    else:
        by_config = numbers(name if stack else _module(pairs[0][1][0]))
    # A stack's rank can't be told from its rows alone.
    rank = by_config[0] if stack else a[0]
    if a[0] % rank:
        raise NibbleError(f"{folder / WEIGHTS}: lora_A of {name} has {a[0]:,} rows, no multiple of its rank, {rank}.")
    return Adapted(
        name=name,
        rank=rank,
        alpha=by_config[1],
        rslora=bool(config.get("use_rslora")),
        inside=a[1],
        outside=b[0],
        stacked=a[0] // rank if stack else None,
        pairs=tuple(sorted(pairs, key=lambda pair: pair[0] or 0)),
    )


def _module(tensor: str) -> str:
    match = _LORA.fullmatch(tensor)
    assert match is not None
    return match[1]
