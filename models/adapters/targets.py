"""Which matrices of a model an adapter's targets name, with what rank and alpha.

Targets are named as people name them on the hub and in PEFT.
Shapes: E experts, `in` and `out` features of a weight.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from models.blocks.groups import GROUP_WORDS, TARGET_GROUPS, Group
from models.checkpoint.keymap import Key, KeyMap
from quant.choices import named_dtype
from quant.common.errors import NibbleError


@dataclass(frozen=True)
class AdapterSpec:
    """What to adapt, and how strongly.

    targets: groups (attention, linear_attention, experts, shared_experts, dense_mlp, router) or names in the hub's
        spelling. A name matches as in PEFT, as a whole or after a dot: `o_proj`, `mlp.experts.gate_up_proj`,
        `mlp.gate.weight`, `model.layers.3.self_attn.o_proj`. A name that fits matrices and stacks of experts alike
        (`down_proj`) means the matrices; `experts.down_proj` is the stack.
    rank, alpha: one number, or a number per group; a name in place of a group goes before its group.
    rslora: scale by alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732).
    layers: only these layers; None is all.
    dtype: of A and B, float32 or bfloat16. float32 trains stably beside bfloat16 weights.
    """

    targets: tuple[str, ...]
    rank: int | Mapping[str, int]
    alpha: float | Mapping[str, float]
    rslora: bool = False
    layers: tuple[int, ...] | None = None
    dtype: torch.dtype | str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", named_dtype(self.dtype))


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


def adaptable(key_map: KeyMap) -> list[Key]:
    """The matrices and stacks that LoRA can adapt, in the model's order."""
    return [key for key in key_map.keys if key.spec is not None and key.group in TARGET_GROUPS]


def groups_of(keys: Iterable[Key]) -> list[Group]:
    """The groups that LoRA can adapt among `keys`, in the order of tables."""
    present = {key.group for key in keys}
    return [group for group in TARGET_GROUPS if group in present]


# --- names to matrices


def resolve(key_map: KeyMap, spec: AdapterSpec, model_type: str) -> list[Target]:
    """The matrices that `spec` names, in the model's order.

    Raises NibbleError for a target that matches nothing (in the model, or in `spec.layers`), for layers that the model
    doesn't have, and for a rank or alpha that is missing, spare or not positive.
    """
    if not spec.targets:
        raise NibbleError(
            f"adapter.targets is empty: nothing to adapt.\nGroups: {', '.join(groups_of(adaptable(key_map)))}."
        )
    layers = _checked_layers(spec.layers, key_map, model_type)
    chosen: set[str] = set()
    for target in spec.targets:
        keys = matches(target, adaptable(key_map))
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


def matches(target: str, keys: Sequence[Key]) -> list[Key]:
    """Those of `keys` that a target means, a group or a name."""
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
            groups = groups_of(keys)
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
    groups = groups_of(keys)
    where = f"adapter.targets: {target!r}"
    present = {key.group for key in key_map.keys}
    words = GROUP_WORDS.get(cast(Group, target))
    if words is not None and target not in present and target != "head":  # a tied head has no key of its own
        return NibbleError(f"{where}: this {model_type} has no {words}.\nIts groups: {', '.join(groups)}.")
    others = {key.group for key in key_map.keys if target == key.group or _names(target, key)}
    if "indexer" in others:
        return NibbleError(
            f"{where} can't be adapted: the indexer only chooses which keys a query sees, and a choice has no "
            f"gradient.\nLoRA is for the matrices of {', '.join(groups)}."
        )
    if others or module_name(target) in ("head", "lm_head"):
        return NibbleError(
            f"{where} can't be adapted: LoRA is for the matrices of {', '.join(groups)}, not for norms, biases, "
            "convolutions, embeddings or the output head."
        )
    names = {name: key.group for key in keys for name in _spellings(key)}
    wanted = module_name(target)
    for name in (wanted, wanted.rpartition(".")[2]):
        # The usual cutoff of 0.6 takes DeltaNet's in_proj_qkv for down_proj.
        near = difflib.get_close_matches(name, [*groups, *names], n=1, cutoff=0.65)
        if near and near[0] in groups:
            return NibbleError(f"{where} matches nothing in {model_type}. Did you mean {near[0]!r}?")
        if near:
            group = names[near[0]]
            return NibbleError(
                f"{where} matches nothing in {model_type}{_kind(keys)}.\n"
                f"Its {GROUP_WORDS[group]} are {', '.join(group_names(keys, group))}; {group!r} names them all."
            )
    lines = [f"{where} matches nothing in {model_type}{_kind(keys)}. Its groups, and the names in them:"]
    lines += [f"  {group}: {', '.join(group_names(keys, group))}" for group in groups]
    return NibbleError("\n".join(lines))


def group_names(keys: Sequence[Key], group: Group) -> list[str]:
    """The names of a group's matrices within a layer, as short as is usual: o_proj, mlp.experts.down_proj, mlp.gate.

    Attention's are shortened where nothing else ends like them: Trinity's is `self_attn.gate_proj`.
    """
    names = {key.native: within_layer(module_name(key.hub)) for key in keys}
    ends: dict[str, set[str]] = {}
    for name in names.values():
        ends.setdefault(name.rpartition(".")[2], set()).add(name)
    found = [names[key.native] for key in keys if key.group == group]
    if group in ("attention", "linear_attention"):
        found = [end if len(ends[end := name.rpartition(".")[2]]) == 1 else name for name in found]
    return list(dict.fromkeys(found))


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
