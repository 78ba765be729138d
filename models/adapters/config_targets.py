"""Which matrices of a model PEFT's adapter_config.json names, with what rank and alpha.

PEFT finds matrices by the end of their names: modules (target_modules, in the layers of layers_to_transform) and
parameters (target_parameters, in all layers). A rank or alpha is the default or that of the first pattern that fits.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from models.adapters.patterns import Budget, Pattern
from models.adapters.targets import Target, adaptable, groups_of, layer_of, module_name, within_layer
from models.checkpoint.keymap import Key, KeyMap
from quant.common.errors import NibbleError
from quant.common.jsonfile import flag, mapping, number, texts
from quant.common.words import shown, some

log = logging.getLogger("nibble")

_EXPERT = re.compile(r"\bexperts\.\d+\.")


@dataclass(frozen=True)
class Named:
    """What a config adapts: a matrix, a stack, or, with `parts` of its key, the experts of a stack one by one."""

    target: Target
    parts: tuple[str, ...] = ()


def config_targets(
    config: Mapping[str, Any], key_map: KeyMap, tensors: Collection[str], where: str, model_type: str
) -> list[Named]:
    """The matrices that an adapter has, found as PEFT finds them; a name that matches nothing doesn't matter.

    tensors: the names in the adapter's file. They settle what `all-linear` means, whether a stack's experts are there
    one by one, and which kinds of matrices a name means that fits several (`down_proj`): those that have tensors. A
    warning names the others.
    """
    keys, budget = adaptable(key_map), Budget()
    stacks_and_routers = texts(config, "target_parameters", where)
    modules, numbers = _module_filter(config, tensors, where, budget), ranks_and_alphas(config, where, budget)
    one_by_one = any(_EXPERT.search(name) for name in tensors)
    absent = _absent(config, key_map, modules, one_by_one, tensors)
    if absent:
        log.warning(
            "%s: target_modules also fit %s, of which the file has no tensors; they stay the base's",
            where,
            some(absent),
        )

    def meant(module: str) -> bool:
        return _kind(module) not in absent and modules(module)

    names: dict[str, str] = {}
    experts: dict[str, Named] = {}
    for key in keys:
        if any(ends_with(key.hub, target) for target in stacks_and_routers):
            names[key.native] = key.hub
        elif key.parts and one_by_one and (found := _experts(config, key, meant, numbers, where)):
            experts[key.native] = found
        module = module_name(key.hub)
        if not key.parts and meant(module):
            if key.native in names:
                raise NibbleError(f"{where}: target_modules and target_parameters both name {module}.")
            names[key.native] = module
    if not names and not experts:
        modules_given = config.get("target_modules") or []
        given = [modules_given] if isinstance(modules_given, str) else [*modules_given, *stacks_and_routers]
        raise NibbleError(
            f"{where}: target_modules and target_parameters ({some([shown(name) for name in given]) or 'empty'}) match "
            f"nothing that LoRA can adapt in this {model_type} model: {', '.join(groups_of(keys))}."
        )
    return [
        Named(Target(key, *numbers(names[key.native]))) if key.native in names else experts[key.native]
        for key in keys
        if key.native in names or key.native in experts
    ]


def _kind(module: str) -> str:
    """The name of a module within a layer, which for all experts is one."""
    return _EXPERT.sub("experts.", within_layer(module))


def _absent(
    config: Mapping[str, Any],
    key_map: KeyMap,
    modules: Callable[[str], bool],
    one_by_one: bool,
    tensors: Collection[str],
) -> list[str]:
    """The kinds that target_modules fit and of which the file has no tensor in any layer, where each name that fits one
    also means a kind that has tensors. PEFT gives such matrices a LoRA of zeros.

    Files that are made for servers (models/export) have some kinds only. Where a name means nothing that is there, or a
    kind lacks some of its tensors, the file isn't complete.
    """
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return []
    names = (name for key in adaptable(key_map) if one_by_one or not key.parts for name in _first_names(key))
    fitting = list(dict.fromkeys(_kind(name) for name in names if modules(name)))
    there = {_kind(tensor.rpartition(".lora_")[0]) for tensor in tensors}
    filled = [end for end in targets if any(ends_with(kind, end) for kind in there)]
    return [
        kind for kind in fitting if kind not in there and all(end in filled for end in targets if ends_with(kind, end))
    ]


def _first_names(key: Key) -> list[str]:
    """Of a stack, the modules of its first expert."""
    return [module_name(part.format(e=0)) for part in key.parts] or [module_name(key.hub)]


def _experts(
    config: Mapping[str, Any],
    key: Key,
    modules: Callable[[str], bool],
    numbers_of: Callable[[str], tuple[int, float]],
    where: str,
) -> Named | None:
    """The experts of a stack where target_modules names them one by one: one LoRA of all that is adapted of each."""
    parts, numbers = [], set[tuple[int, float]]()
    for part in key.parts:
        every = [module_name(part.format(e=expert)) for expert in range(key.shape[0])]
        named = [name for name in every if modules(name)]
        if named and named != every:
            lacking = next(name for name in every if name not in set(named))
            raise NibbleError(
                f"{where}: target_modules names {named[0]}, not {lacking}.\n"
                "Of a layer's experts, either all are adapted or none."
            )
        if named:
            parts.append(part)
            numbers |= {numbers_of(name) for name in named}
    if not parts:
        return None
    if len(numbers) > 1:
        raise NibbleError(
            f"{where}: the experts of {key.hub} have several ranks or alphas; those of a layer must have one."
        )
    rank, alpha = numbers.pop()
    # Of the sum of the ranks, with the scaling that each part has.
    more = math.sqrt(len(parts)) if flag(config, "use_rslora", False, where) else len(parts)
    return Named(Target(key, rank * len(parts), alpha * more), tuple(parts))


def _module_filter(
    config: Mapping[str, Any], tensors: Collection[str], where: str, budget: Budget
) -> Callable[[str], bool]:
    """Whether target_modules, exclude_modules and layers_to_transform mean a module of this name."""
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else [] if layers is None else layers
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise NibbleError(f"{where}: layers_to_transform must be a list of layers' numbers, got {shown(layers)}.")
    named = _name_filter(config, "target_modules", layers, where, budget)
    excluded = _name_filter(config, "exclude_modules", (), where, budget)
    if config.get("target_modules") == "all-linear":
        # Which modules are linear depends on the class that PEFT had wrapped. The file's tensors tell.
        there = {within_layer(tensor.rpartition(".lora_")[0]) for tensor in tensors}

        def named(name: str) -> bool:
            return within_layer(name) in there

    return lambda name: named(name) and not excluded(name)


def _name_filter(
    config: Mapping[str, Any], field: str, layers: Collection[int], where: str, budget: Budget
) -> Callable[[str], bool]:
    """A pattern for whole names, or a list of names; those that are ends of names hold in `layers`, or everywhere."""
    value = config.get(field)
    if isinstance(value, str):
        return Pattern(value, f"{where}: {field}", budget).fits
    names = texts(config, field, where)

    def fits(name: str) -> bool:
        inside = not layers or layer_of(name) in layers
        return name in names or (inside and any(ends_with(name, end) for end in names))

    return fits


def ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def ranks_and_alphas(config: Mapping[str, Any], where: str, budget: Budget) -> Callable[[str], tuple[int, float]]:
    """Rank and alpha by a matrix's name: those of the first pattern to fit its end, or the defaults, as
    peft.utils.other.get_pattern_key has it.
    """

    def by_name(field: str, patterns: str) -> Callable[[str], float]:
        default, place = number(config, field, 8, where), f"{where}: {patterns}"  # 8: PEFT's
        given = mapping(config, patterns, where)
        table = [(Pattern(text, place, budget, ending=True), number(given, text, 8, place)) for text in given]
        return lambda name: next((value for pattern, value in table if pattern.fits(name)), default)

    rank, alpha = by_name("r", "rank_pattern"), by_name("lora_alpha", "alpha_pattern")

    @functools.cache
    def numbers(name: str) -> tuple[int, float]:
        if rank(name) != int(rank(name)):
            raise NibbleError(f"{where}: {name} has rank {rank(name)!r}, which is no whole number.")
        return int(rank(name)), alpha(name)

    return numbers
