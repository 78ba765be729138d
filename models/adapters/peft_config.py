"""PEFT's adapter_config.json: which matrices an adapter has, in PEFT's terms; and reading the file.

What it names of a model is found in models/adapters/config_targets.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.adapters.targets import AdapterSpec, adaptable, layer_of, module_name, within_layer
from models.blocks.linear import LoRA
from models.checkpoint.keymap import Key, KeyMap
from quant.common.errors import NibbleError
from quant.common.jsonfile import flag, number, read_json, text
from quant.common.words import shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

FIRST_VERSION = "0.19.1"  # of PEFT, with today's layout of expert tensors
PACKING = "lora_B_layout"  # how unsloth says, since September 2026, in which order a stack's lora_B is

Adapted = Sequence[tuple[Key, LoRA]]  # the adapted matrices of a model, in its order


# --- naming a set of matrices


@dataclass(frozen=True)
class _Layout:
    """How a set of adapted matrices is named, by PEFT's config and by an AdapterSpec.

    names: a matrix's native name to its name in the spec and in rank_pattern; matrices may share one.
    """

    target_modules: list[str]
    target_parameters: list[str]
    layers: tuple[int, ...] | None
    names: dict[str, str]


# As PEFT has it (peft.utils.transformers_weight_conversion) for the models whose experts are named like Qwen2-MoE's.
_REWRITTEN = ("gate", "gate_proj", "up_proj", "down_proj")


def _is_parameter(key: Key) -> bool:
    """Whether PEFT must target the parameter rather than its module.

    Stacks are parameters, and most routers' classes are no nn.Linear. Other matrices are nn.Linear, but PEFT takes
    certain module names, wherever they stand, for the fused experts of transformers 5.
    """
    leaf = module_name(key.hub).rpartition(".")[2]
    return _is_stack(key) or key.group == "router" or leaf in _REWRITTEN


def _is_stack(key: Key) -> bool:
    return key.group == "experts"


def _target_name(key: Key) -> str:
    """The name that PEFT compares with a target: of the parameter, or of the module."""
    return key.hub if _is_parameter(key) else module_name(key.hub)


def _layout(key_map: KeyMap, found: Sequence[Key]) -> _Layout:
    chosen = {key.native for key in found}
    alike: dict[str, list[Key]] = {}  # every matrix that could be adapted, by its name within a layer
    for key in adaptable(key_map):
        alike.setdefault(within_layer(_target_name(key)), []).append(key)
    alike = {name: keys for name, keys in alike.items() if any(key.native in chosen for key in keys)}

    every = {layer_of(key.native) for key in key_map.keys} - {None}
    used = {layer_of(key.native) for key in found}
    restricted = any(key.native not in chosen for keys in alike.values() for key in keys) and used != every
    layers = tuple(sorted(layer for layer in used if layer is not None)) if restricted else None

    modules: list[str] = []
    parameters: list[str] = []
    names: dict[str, str] = {}
    for name, keys in alike.items():
        mine = [key for key in keys if key.native in chosen]
        inside = [key for key in keys if layers is None or layer_of(key.native) in layers]
        short = name if _is_parameter(keys[0]) else _leaf(name, key_map)
        for key in mine:
            names[key.native] = short if mine == inside else _target_name(key)
        if _is_parameter(keys[0]):
            # layers_to_transform doesn't apply to parameters, so a part of the layers is named one by one.
            parameters += [name] if mine == keys else [_target_name(key) for key in mine]
        else:
            modules += dict.fromkeys(names[key.native] for key in mine)
    return _Layout(modules, parameters, layers, names)


def _leaf(name: str, key_map: KeyMap) -> str:
    """The last part of a module's name, as people write it, where that means the same matrices."""
    leaf = name.rpartition(".")[2]
    same = {within_layer(module_name(key.hub)) for key in key_map.keys if module_name(key.hub).endswith(f".{leaf}")}
    return leaf if same == {name} else name


# --- writing


def peft_config(key_map: KeyMap, found: Adapted, base: str) -> dict[str, Any]:
    """The entries that describe a plain LoRA; PEFT takes its defaults for all others.

    Written without PEFT, whose import takes seconds and brings transformers; a test compares with its LoraConfig.
    """
    layout = _layout(key_map, [key for key, _ in found])
    rank, rank_pattern = _pattern(found, layout, lambda lora: lora.rank)
    alpha, alpha_pattern = _pattern(found, layout, lambda lora: _whole(lora.alpha))
    return {
        "peft_type": "LORA",
        "peft_version": FIRST_VERSION,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": _is_rslora(lora for _, lora in found),
        "target_modules": sorted(layout.target_modules),
        "target_parameters": layout.target_parameters or None,
        "layers_to_transform": list(layout.layers) if layout.layers is not None else None,
        # PEFT's defaults, written for other programs that read adapters.
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
    }


def _pattern(found: Adapted, layout: _Layout, number: Callable[[LoRA], Any]) -> tuple[Any, dict[str, Any]]:
    """A number per matrix as PEFT has it: a default, and the exceptions by pattern."""
    # PEFT warns of patterns that fit no target *module* although it applies them to parameters all the same. With the
    # parameters' usual number as the default, most adapters have no such pattern.
    usual = [(key, lora) for key, lora in found if _is_parameter(key)] or found
    default = Counter(number(lora) for _, lora in usual).most_common(1)[0][0]
    numbers: dict[str, set[Any]] = {}
    for key, lora in found:
        numbers.setdefault(layout.names[key.native], set()).add(number(lora))
    pattern = {}
    for key, lora in found:
        shared = numbers[layout.names[key.native]]
        # A full name also ends with the short one, so matrices of one name and several numbers all get their own entry.
        name = layout.names[key.native] if len(shared) == 1 else _target_name(key)
        if shared != {default}:
            pattern[re.escape(name)] = number(lora)
    return default, pattern


def _is_rslora(loras: Iterable[LoRA]) -> bool:
    return any(lora.rslora for lora in loras)


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def describe(key_map: KeyMap, found: Adapted) -> AdapterSpec:
    """The spec that adapts these matrices, in the shortest terms that `resolve` understands."""
    layout = _layout(key_map, [key for key, _ in found])
    return AdapterSpec(
        targets=tuple(dict.fromkeys(layout.names[key.native] for key, _ in found)),
        rank=_collapse([(key, lora.rank) for key, lora in found], layout),
        alpha=_collapse([(key, lora.alpha) for key, lora in found], layout),
        rslora=_is_rslora(lora for _, lora in found),
        layers=layout.layers,
        dtype=found[0][1].A.dtype,
    )


def _collapse(numbers: Sequence[tuple[Key, Any]], layout: _Layout) -> Any:
    """One number, or one per group, or one per name, or one per matrix: the first that says it all."""
    ways: tuple[Callable[[Key], str], ...] = (
        lambda key: "",
        lambda key: key.group,
        lambda key: layout.names[key.native],
        lambda key: _target_name(key),
    )
    by_name: dict[str, set[Any]] = {}
    for way in ways:
        by_name = {}
        for key, value in numbers:
            by_name.setdefault(way(key), set()).add(value)
        if all(len(values) == 1 for values in by_name.values()):
            break
    single = {name: next(iter(values)) for name, values in by_name.items()}
    return single.get("", single)


# --- reading


# Entries of a config that say nothing about the computation, or whose effect is over once an adapter is trained.
# fmt: off
_IGNORED = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "peft_version", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "init_lora_weights",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "ensure_weight_tying", "runtime_config", PACKING,
}
# fmt: on
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base weights


def read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise NibbleError(f"{directory} is no adapter: it has no {CONFIG}.\nAn adapter is {CONFIG} and {WEIGHTS}.")
    config = read_json(path, dict)
    if config.get("peft_type") != "LORA":
        raise NibbleError(f"{path}: peft_type is {shown(config.get('peft_type'))}; only LORA adapters can be loaded.")
    for name, value in config.items():
        off = value in (None, False, "none", "") or value == [] or value == {}
        if name not in _IGNORED and not off:
            raise NibbleError(
                f"{path}: {name} is {shown(value)}, which is not supported; only plain LoRA can be loaded."
            )
    given, where = {name: value for name, value in config.items() if value is not None}, str(path)
    flag(given, "use_rslora", False, where)
    text(given, "peft_version", "", where)
    if given.get("lora_dropout", 0) != 0:
        number(given, "lora_dropout", 0, where)
    if config.get("init_lora_weights", True) not in _PLAIN_INIT:
        raise NibbleError(
            f"{path}: init_lora_weights is {shown(config['init_lora_weights'])}, which changes the base weights too.\n"
            "Save it as an ordinary LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if config.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
        raise NibbleError(f"{path}: layers_pattern is {shown(config['layers_pattern'])}; only 'layers' is supported.")
    if not (directory / WEIGHTS).is_file():
        also = " adapter_model.bin is a pickle and is not read." if (directory / "adapter_model.bin").exists() else ""
        raise NibbleError(f"{directory} is no adapter: it has no {WEIGHTS}.{also}")
    return config
