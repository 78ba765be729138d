"""LoRA: which matrices of a model are adapted, with what rank, and what that costs.

Targets are named as people name them on the hub and in PEFT.
Shapes: E experts, R rank, `in` and `out` features of a weight.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import NibbleError
from quant.storage import Storage

from .decoder import CausalLM
from .keymap import TARGET_GROUPS, Key, KeyMap
from .linear import ExpertWeights, Linear, LoRA
from .registry import ARCHITECTURES

_GROUP_WORDS = {
    "attention": "attention projections",
    "experts": "routed experts' tensors",
    "shared_experts": "shared experts' matrices",
    "dense_mlp": "dense layers' matrices",
    "router": "routers' matrices",
    "norm": "norms",
    "embedding": "embedding",
    "head": "output head",
}


@dataclass(frozen=True)
class AdapterSpec:
    """What to adapt, and how strongly.

    targets: groups (attention, experts, shared_experts, dense_mlp, router) or names in the hub's spelling. A name
        matches as in PEFT, as a whole or behind a dot: `o_proj`, `mlp.experts.gate_up_proj`, `mlp.gate.weight`,
        `model.layers.3.self_attn.o_proj`. A name that fits matrices and stacks of experts alike (`down_proj`)
        means the matrices; `experts.down_proj` is the stack.
    rank, alpha: one number, or a number per group; a name in place of a group goes before its group.
    rslora: scale by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732).
    layers: only these layers; None is all.
    dtype: of A and B. float32 trains stably beside bfloat16 weights.
    """

    targets: tuple[str, ...]
    rank: int | Mapping[str, int]
    alpha: float | Mapping[str, float]
    rslora: bool = False
    layers: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Target:
    """One matrix [out, in] or stack [E, out, in] to adapt."""

    key: Key
    rank: int
    alpha: float

    @property
    def module(self) -> str:
        return module_name(self.key.native)


def module_name(name: str) -> str:
    """The module that holds a weight, in the hub's or the native spelling."""
    return name.removesuffix(".weight")


def layer_of(name: str) -> int | None:
    """The layer number in a dotted name, or None outside the layers."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def within_layer(name: str) -> str:
    """A name without the part that counts the layers: `self_attn.o_proj`."""
    return re.sub(r"^(?:.*?\.)?layers\.\d+\.", "", name)


def key_map_of(model: CausalLM) -> KeyMap:
    return ARCHITECTURES[model.model_type].key_map(model.config)


def adaptable(key_map: KeyMap) -> list[Key]:
    """The matrices and stacks that LoRA can adapt, in the model's order."""
    return [key for key in key_map.keys if key.is_storage and key.group in TARGET_GROUPS]


# --- names to matrices


def resolve(key_map: KeyMap, spec: AdapterSpec, model_type: str) -> list[Target]:
    """The matrices that `spec` names, in the model's order.

    Raises NibbleError for a target that matches nothing (in the model, or in `spec.layers`), for layers that the model
    doesn't have, and for a rank or alpha that is missing, spare or not positive.
    """
    if not spec.targets:
        raise NibbleError(f"adapter.targets is empty: nothing to adapt.\nGroups: {', '.join(TARGET_GROUPS)}.")
    layers = _checked_layers(spec.layers, key_map, model_type)
    chosen: set[str] = set()
    for target in spec.targets:
        keys = _matches(target, adaptable(key_map))
        if not keys:
            raise _no_match(target, key_map, model_type)
        inside = [key for key in keys if layers is None or layer_of(key.native) in layers]
        if not inside:
            has = _ranges(layer for key in keys if (layer := layer_of(key.native)) is not None)
            raise NibbleError(
                f"adapter.targets: {target!r} matches nothing in adapter.layers ({_ranges(layers or ())}): in "
                f"{model_type} it is in {has}."
            )
        chosen.update(key.native for key in inside)
    keys = [key for key in adaptable(key_map) if key.native in chosen]
    for field, value in (("rank", spec.rank), ("alpha", spec.alpha)):
        _check_numbers(field, value, keys)
    return [Target(key, int(_number("rank", spec.rank, key)), float(_number("alpha", spec.alpha, key))) for key in keys]


def _names(target: str, key: Key) -> bool:
    wanted = module_name(target)
    return any(name == wanted or name.endswith(f".{wanted}") for name in map(module_name, (key.native, key.hub)))


def _matches(target: str, keys: Sequence[Key]) -> list[Key]:
    if target in TARGET_GROUPS:
        return [key for key in keys if key.group == target]
    found = [key for key in keys if _names(target, key)]
    return [key for key in found if len(key.shape) == 2] or found


def _checked_layers(layers: Sequence[int] | None, key_map: KeyMap, model_type: str) -> frozenset[int] | None:
    if layers is None:
        return None
    count = 1 + max((layer for key in key_map.keys if (layer := layer_of(key.native)) is not None), default=-1)
    wrong = sorted({layer for layer in layers if not 0 <= layer < count})
    if wrong:
        raise NibbleError(
            f"adapter.layers: {', '.join(map(str, wrong))} out of range; {model_type} has layers 0 to {count - 1} here."
        )
    if not layers:
        raise NibbleError("adapter.layers is empty: nothing to adapt. Leave it out (null) for all layers.")
    return frozenset(layers)


def _number(field: str, value: float | Mapping[str, float], key: Key) -> float:
    if not isinstance(value, Mapping):
        return value
    names = [name for name in value if name not in TARGET_GROUPS and _names(name, key)]
    if names:
        return value[max(names, key=len)]  # the longest name is the most exact
    if key.group not in value:
        given = ", ".join(value) or "nothing"
        raise NibbleError(
            f"adapter.{field} has no number for {key.group!r}, which adapter.targets adapts (it has {given}).\n"
            f"Add {key.group}: N, or give one number for all."
        )
    return value[key.group]


def _check_numbers(field: str, value: float | Mapping[str, float], keys: Sequence[Key]) -> None:
    entries: Mapping[str, Any] = value if isinstance(value, Mapping) else {"": value}
    for name, number in entries.items():
        where = f"adapter.{field}.{name}" if name else f"adapter.{field}"
        if name and not any(key.group == name or (name not in TARGET_GROUPS and _names(name, key)) for key in keys):
            groups = [group for group in TARGET_GROUPS if any(key.group == group for key in keys)]
            near = difflib.get_close_matches(name, groups, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Adapted here: {', '.join(groups)}."
            raise NibbleError(f"{where}: {name!r} names nothing that adapter.targets adapts. {hint}")
        whole = isinstance(number, int) and not isinstance(number, bool)
        if field == "rank" and not (whole and number > 0):
            raise NibbleError(f"{where} is {number!r}; a rank is a whole number, 1 or more.")
        if not (whole or isinstance(number, float)) or not 0 < number < math.inf:
            raise NibbleError(f"{where} is {number!r}; it must be a positive number.")


def _no_match(target: str, key_map: KeyMap, model_type: str) -> NibbleError:
    """What is wrong with a target that matches nothing, with the nearest names that would match."""
    keys = adaptable(key_map)
    groups = [group for group in TARGET_GROUPS if any(key.group == group for key in keys)]
    where = f"adapter.targets: {target!r}"
    if target in TARGET_GROUPS:
        words = _GROUP_WORDS[target]
        return NibbleError(f"{where}: this {model_type} has no {words}.\nIts groups: {', '.join(groups)}.")
    others = {key.group for key in key_map.keys if key.native not in {k.native for k in keys} and _names(target, key)}
    if target in _GROUP_WORDS or others or module_name(target) == "lm_head":
        return NibbleError(
            f"{where} can't be adapted: LoRA is for the matrices of {', '.join(groups)}, not for norms, biases, "
            "embeddings or the output head."
        )
    names = {name: key.group for key in keys for name in _spellings(key)}
    wanted = module_name(target)
    for name in (wanted, wanted.rpartition(".")[2]):
        near = difflib.get_close_matches(name, [*groups, *names], n=1)
        if near and near[0] in groups:
            return NibbleError(f"{where} matches nothing in {model_type}. Did you mean {near[0]!r}?")
        if near:
            group = names[near[0]]
            return NibbleError(
                f"{where} matches nothing in {model_type}{_kind(keys)}.\n"
                f"Its {_GROUP_WORDS[group]} are {', '.join(group_names(keys, group))}; {group!r} names them all."
            )
    lines = [f"{where} matches nothing in {model_type}{_kind(keys)}. Its groups, and the names in them:"]
    lines += [f"  {group}: {', '.join(group_names(keys, group))}" for group in groups]
    return NibbleError("\n".join(lines))


def group_names(keys: Sequence[Key], group: str) -> list[str]:
    """The names of a group's matrices within a layer, as short as is usual: o_proj, mlp.experts.down_proj, mlp.gate."""
    names = [within_layer(module_name(key.hub)) for key in keys if key.group == group]
    if group == "attention":
        names = [name.rpartition(".")[2] for name in names]
    return list(dict.fromkeys(names))


def _spellings(key: Key) -> list[str]:
    name = within_layer(module_name(key.hub))
    return [name, name.rpartition(".")[2]]


def _kind(keys: Iterable[Key]) -> str:
    latent = any(key.native.endswith(".kv_b_proj.weight") for key in keys)
    return " (multi-head latent attention)" if latent else ""


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 2, 3, 4] as "layers 0, 2 to 4"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"layer{'s' if sum(map(len, runs)) > 1 else ''} {', '.join(texts)}"


# --- adding and listing


def add_lora(model: CausalLM, spec: AdapterSpec, seed: int = 0) -> None:
    """Freeze every parameter of `model` and give the matrices that `spec` names a LoRA, in place.

    B is zero, so the model computes what it did before, bit for bit. A is drawn as PEFT draws it (Kaiming uniform with
    a = sqrt(5): uniform within ±1/sqrt(in)), from a generator of its own per matrix, so it depends on the seed, the
    name and the shape: not on the device, nor on what else is adapted.
    """
    targets = resolve(key_map_of(model), spec, model.model_type)
    for lora, target in zip(attach_lora(model, targets, spec.rslora, spec.dtype), targets, strict=True):
        if lora.A.is_meta:
            continue
        with torch.no_grad():
            lora.A.copy_(initial_a(tuple(lora.A.shape), target.module, seed))
            lora.B.zero_()


def initial_a(shape: tuple[int, ...], name: str, seed: int) -> Tensor:
    """The starting A of the matrix called `name`: float32 [.., R, in] on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def attach_lora(model: CausalLM, targets: Sequence[Target], rslora: bool, dtype: torch.dtype) -> list[LoRA]:
    """Freeze `model` and put an unset LoRA on every target, on its weight's device. Returns them in order."""
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise NibbleError("this model has an adapter already; load the base model anew to give it another.")
    model.requires_grad_(False)
    loras = []
    for target in targets:
        owner = model.get_submodule(target.module)
        assert isinstance(owner, Linear | ExpertWeights)
        owner.lora = LoRA(
            target.key.shape,
            target.rank,
            target.alpha,
            rslora=rslora,
            dtype=dtype,
            device=next(owner.weight.parameters()).device,
        )
        loras.append(owner.lora)
    return loras


def adapted(model: CausalLM) -> list[tuple[Key, LoRA]]:
    """The matrices of `model` that have a LoRA, in the model's order."""
    found = []
    for key in adaptable(key_map_of(model)):
        lora = getattr(model.get_submodule(module_name(key.native)), "lora", None)
        if lora is not None:
            found.append((key, lora))
    return found


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of all that has a gradient, in the model's order: the order of an optimiser's groups."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


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
    for group in _GROUP_WORDS:
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
    count = held.numel() if isinstance(held, nn.Parameter) else 0
    trained = count if held.requires_grad else 0
    return count, str(held.dtype).removeprefix("torch."), held.numel() * held.element_size(), trained
