"""An adapter, written in the form that a server reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.adapters.adapter_file import AdapterFile, respelled
from models.adapters.files import check_free, write_new_adapter
from models.adapters.layouts import Stored
from models.adapters.packing import Packing
from models.adapters.peft_config import CONFIG, peft_config, read_config
from models.adapters.servers import TITLES, Server, matrix_name, short_name, unserved
from models.adapters.targets import adaptable, layer_of, matches, module_name, within_layer
from models.blocks.linear import LoRA, scaling
from models.checkpoint.hub import read_config as read_model_config
from models.checkpoint.hub_id import local_folder
from models.checkpoint.keymap import KeyMap, key_map_of
from models.checkpoint.layout import Spelling
from models.decoder import CausalLM
from models.export.layouts import FileTensor, Update, folded, per_expert, stacked, with_all_stacks
from models.registry import architecture_for
from quant.common.errors import NibbleError
from quant.common.words import counted, shown, some
from quant.storage import StorageSpec


@dataclass(frozen=True)
class Exported:
    """What was written. base: the model's folder. names: whose names. rank: of every matrix, or the largest."""

    base: Path
    names: Spelling
    stacked: bool
    rank: int
    tensors: int
    dropped: dict[str, int]


def export_adapter(
    adapter: Path,
    out: Path,
    server: Server,
    *,
    model: Path | None = None,
    names: Spelling | None = None,
    layout: Packing | None = None,
    drop: Collection[str] = (),
    keep: Collection[str] = (),
) -> Exported:
    """Write the adapter in `adapter` to the folder `out` in the layout that `server` reads.

    model: the base's folder, of which config.json is read; None: the one that the adapter's configuration names.
    names: those of the text model's class or of the vision-language model's; None: of the class of the base.
    layout: of the adapter, as for `AdapterFile`.
    drop: matrices to leave out. keep: matrices to write although the server can't serve them as it is started usually.
    Nothing is written, and NibbleError raised, for matrices that the server can't serve, and where `out` is neither
    empty nor new.
    """
    check_free(out)
    base, named = base_of(adapter, model)
    meta = _meta_model(base)
    if names and not meta.hub.two_classes:
        raise NibbleError(f"--names {names}: {meta.model_type} has one class, with names of its own. Leave it out.")
    names = names or ("vision-language" if meta.hub.vision_language else "text")
    key_map = respelled(key_map_of(meta), names)
    file = AdapterFile(adapter, key_map, meta.model_type, layout=layout)
    updates = _updates(file, key_map)
    dropped, kept = (_named(option, given, updates) for option, given in (("--drop", drop), ("--keep", keep)))
    updates = [update for update in updates if update.key.native not in dropped]
    if not updates:
        raise NibbleError(f"--drop {' --drop '.join(drop)} leaves nothing of the adapter.")
    _check_served(server, meta.model_type, updates, kept, adapter, base)
    stacks = server == "peft" or (server == "vllm" and names == "vision-language")
    if server != "peft":
        updates = with_all_stacks(folded(updates), key_map)
    if stacks:
        tensors, written = list(stacked(updates)), _config(key_map, updates, named)
    else:
        tensors = list(per_expert(updates, _vllm_name if server == "vllm" else str))
        written = _per_expert_config(_config(key_map, updates, named), key_map, updates)
    shapes = {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors}
    write_new_adapter(out, written, shapes, _values(tensors))
    rank = max(update.rank for update in updates)
    return Exported(base, names, stacks, rank, len(tensors), dict(Counter(dropped.values())))


def _vllm_name(name: str) -> str:
    """vLLM has Trinity's router where other models have theirs."""
    return name.replace(".mlp.router.gate", ".mlp.gate")


def _per_expert_config(config: dict[str, Any], key_map: KeyMap, updates: Sequence[Update]) -> dict[str, Any]:
    """Servers want the last parts of names, which mean more matrices than there are: exclude_modules has the others."""
    leaves = {_leaf(name) for update in updates for name, _, _ in update.key.matrices()}
    return {
        **config,
        "target_parameters": None,
        "target_modules": sorted(leaves),
        "exclude_modules": _others(key_map, updates, leaves),
    }


def _leaf(name: str) -> str:
    return module_name(name).rpartition(".")[2]


def _others(key_map: KeyMap, updates: Sequence[Update], leaves: Collection[str]) -> str | None:
    """A pattern for those modules with one of the last parts `leaves` that aren't updated."""
    written = {update.key.native for update in updates}
    layers: dict[str, list[str]] = {}  # by the pattern for a name within a layer
    for key in adaptable(key_map):
        for name in key.parts or (key.hub,):
            if key.native not in written and _leaf(name) in leaves:
                within = re.escape(within_layer(module_name(name))).replace(re.escape("{e}"), r"\d+")
                layers.setdefault(within, []).append(str(layer_of(key.native)))
    alike: dict[str, list[str]] = {}
    for within, found in layers.items():
        alike.setdefault("|".join(found), []).append(within)
    patterns = [rf"({numbers})\.({'|'.join(kinds)})" for numbers, kinds in alike.items()]
    return rf".*\.layers\.({'|'.join(patterns)})" if patterns else None


def base_of(adapter: Path, model: Path | None) -> tuple[Path, str]:
    """The base's folder (`model`, or what the adapter names), and what the adapter calls it."""
    where, named = str(adapter / CONFIG), read_config(adapter).get("base_model_name_or_path")
    if not isinstance(named, str | None):
        raise NibbleError(f"{where}: base_model_name_or_path must be text, got {shown(named)}.")
    wanted = str(model) if model is not None else named
    folder = local_folder(wanted) if wanted else None
    if folder is not None:
        return folder, named or str(wanted)
    here = "is not on this machine"
    missing = (
        f"{where} names the base model {named!r}, which {here}" if named else f"{where} doesn't name the base model"
    )
    if model is not None:
        missing = f"--model {model} {here}"
    raise NibbleError(
        f"{missing}.\nOf the base only config.json is needed: give "
        "its folder with --model (hf download ID config.json --local-dir FOLDER fetches it)."
    )


def _meta_model(base: Path) -> CausalLM:
    _, config = read_model_config(base)
    where = str(base / "config.json")
    architecture = architecture_for(config, where)
    return architecture.build(architecture.parse_config(config, where), StorageSpec("none"), torch.float32, "meta")


def _updates(file: AdapterFile, key_map: KeyMap) -> list[Update]:
    keys = {key.native: key for key in key_map.keys}

    def update(stored: Stored) -> Update:
        target = stored.target

        def read() -> tuple[Tensor, Tensor]:
            pair = file.read(stored)
            return pair.a.to(file.dtype), pair.b.to(file.dtype)

        scale = scaling(target.rank, target.alpha, file.rslora)
        return Update(keys[target.key.native], target.rank, scale, file.dtype, read)

    return [update(stored) for stored in file.stored]


def _named(option: str, names: Collection[str], updates: Sequence[Update]) -> dict[str, str]:
    """The native names of the updates that the names of an option mean, each with the first of these names."""
    keys, found = [update.key for update in updates], dict[str, str]()
    for name in names:
        meant = matches(name, keys)
        for key in meant:
            found.setdefault(key.native, name)
        if not meant:
            has = list(dict.fromkeys(matrix_name(key) for key in keys))
            raise NibbleError(f"{option} {name}: the adapter has no such matrix. It has {some(has, 20)}.")
    return found


def _check_served(
    server: Server, model_type: str, updates: Sequence[Update], kept: Collection[str], adapter: Path, base: Path
) -> None:
    keys = [update.key for update in updates if update.key.native not in kept]
    found = unserved(server, model_type, keys)
    if not found:
        return
    lines, lost, ways = [], list[str](), []
    for rule, broken in found:
        names = list(dict.fromkeys(short_name(key) for key in broken))
        layers = counted(len({layer_of(key.native) for key in broken}), "layer")
        lines.append(f"{TITLES[server]} {rule.does} {', '.join(names)}, which {adapter} has in {layers}: {rule.why}.")
        lost += names
        ways += [rule.way] if rule.way else []
    ways.append(f"merge (python -m models.merge {base} {adapter} OUT)")
    ways.append(
        f"leave {'it' if len(lost) == 1 else 'them'} out with {' '.join(f'--drop {name}' for name in lost)}, and see "
        "what that costs with python -m train.evaluate"
    )
    raise NibbleError("\n".join([*lines, f"Ways out: {'; or '.join(ways)}."]))


def _config(key_map: KeyMap, updates: Sequence[Update], base: str) -> dict[str, Any]:
    def described(update: Update) -> LoRA:
        return LoRA(update.key.shape, update.rank, update.scale * update.rank, dtype=update.dtype, device="meta")

    return peft_config(key_map, [(update.key, described(update)) for update in updates], base)


def _values(tensors: Sequence[FileTensor]) -> Iterator[tuple[str, Tensor]]:
    current, pair = None, None
    for tensor in tensors:
        if current is not tensor.update:
            current, pair = tensor.update, tensor.update.read()
        assert pair is not None
        yield tensor.name, tensor.make(*pair)
