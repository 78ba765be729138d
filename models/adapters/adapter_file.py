"""An adapter folder, opened: in any layout that is read, checked against a model's keys, without a model to hold it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.adapters.config_targets import config_targets
from models.adapters.layouts import (
    PREFIX,
    Stored,
    StoredExperts,
    StoredMatrix,
    StoredStack,
    is_swapped,
    prefixes_of,
)
from models.adapters.packing import Packing
from models.adapters.peft_config import CONFIG, PACKING, WEIGHTS, read_config
from models.adapters.targets import Target, module_name
from models.blocks.groups import GROUP_WORDS, TARGET_GROUPS
from models.blocks.linear import scaling
from models.checkpoint.keymap import Key, KeyMap
from models.checkpoint.layout import Layout, Spelling, spelling_of, spellings
from models.checkpoint.tensorfile import DTYPES, MappedFolder, TensorInfo, read_header
from quant.common.errors import NibbleError
from quant.common.jsonfile import flag
from quant.common.words import shown, some
from quant.storage import all_finite

log = logging.getLogger("nibble")

_PACKINGS: dict[str, Packing] = {"rank_major": "peft", "grouped_by_expert": "expert-major"}


@dataclass(frozen=True)
class Pair:
    """The LoRA of one matrix [out, in] or stack [E, out, in], whose update is scaling · B A.

    a: float32 [R, in] or [E, R, in]. b: float32 [out, R] or [E, out, R]. They may be views.
    """

    target: Target
    a: Tensor
    b: Tensor
    scaling: float


def respelled(key_map: KeyMap, to: Spelling) -> KeyMap:
    """The same table with the names that the class of this spelling has for an adapter."""
    return key_map.laid_out(Layout(wrapped=to == "vision-language", fused=True))


def _as_in_file(key_map: KeyMap, tensors: Iterable[str]) -> KeyMap:
    """The same table, with the native names of what the file has under those: vLLM has Trinity's router at `mlp.gate`,
    as other models, where the hub has `mlp.router.gate`.
    """
    there = {tensor.removeprefix(PREFIX).rpartition(".lora_")[0] for tensor in tensors}

    def is_native(key: Key) -> bool:
        names = module_name(key.native), module_name(key.hub)
        return names[0] in there and names[1] not in there and spelling_of(key.native) == spelling_of(key.hub)

    return KeyMap(
        tuple(replace(key, hub=key.native) if is_native(key) else key for key in key_map.keys), key_map.carried
    )


class AdapterFile:
    """An adapter's matrices, whose tensors are read when they are asked for.

    stored: what is adapted, in the model's order, with its names in the file. rslora: of all. dtype: bfloat16 where
    every tensor is, else float32. swapped, packing: how stacks of experts are kept (models/adapters/layouts.py).
    """

    def __init__(
        self, directory: str | Path, key_map: KeyMap, model_type: str, *, layout: Packing | None = None
    ) -> None:
        """key_map: of the model that it is for, on any device. Its names may be those of the text model or of the
        vision-language model, whichever the checkpoint is.
        layout: of a stack's lora_B: `peft`, or `expert-major`, which no shape tells; None is what the config says in
        lora_B_layout, and `peft` where it doesn't.
        Raises NibbleError for a feature that isn't plain LoRA, a target that matches nothing, and tensors that are
        missing, unknown or of the wrong shape.
        """
        self.directory, self._where = Path(directory), str(directory)
        self.config = read_config(self.directory)
        self.packing = packing_of(self.config, layout, self._where)
        self._header = read_header(self.directory / WEIGHTS)
        self._mapped = MappedFolder(self.directory)
        spelt = spellings(self._header)
        if len(spelt) == 1:
            key_map = respelled(key_map, *spelt)
        key_map = _as_in_file(key_map, self._header)
        self.rslora = flag(self.config, "use_rslora", False, self._where)
        self.stored, self.swapped = self._stored(key_map, model_type)
        _check_tensors(self.stored, self._header, key_map, self._where)
        dtypes = {DTYPES[info.dtype] for info in self._header.values()}
        self.dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
        if self.swapped:
            log.warning(
                "%s: the tensors of its experts have the layout of PEFT up to 0.19.0, in and out swapped, and are read "
                "as such",
                self._where,
            )

    @property
    def targets(self) -> list[Target]:
        return [stored.target for stored in self.stored]

    def __iter__(self) -> Iterator[Pair]:
        """Every matrix and stack, in the model's order, one at a time in memory."""
        for stored in self.stored:
            yield self.read(stored)

    def read(self, stored: Stored) -> Pair:
        """Raises NibbleError for inf or NaN, and where the file can't be read."""
        target = stored.target
        a, b = stored.read(self._tensor)
        return Pair(target, a, b, scaling(target.rank, target.alpha, self.rslora))

    def close(self) -> None:
        """Unmap the file. Reading maps it again."""
        self._mapped.close()

    def _tensor(self, name: str) -> Tensor:
        info, path = self._header[name], self.directory / WEIGHTS
        try:
            tensor: Tensor = self._mapped.file(WEIGHTS, info.end - info.begin).get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise NibbleError(f"{path}: {name} can't be read ({error}).") from error
        if not all_finite(tensor):
            raise NibbleError(f"{path}: {name}: some of its values are inf or NaN; the adapter can't be used.")
        return tensor

    def _stored(self, key_map: KeyMap, model_type: str) -> tuple[list[Stored], bool]:
        named = config_targets(self.config, key_map, self._header, self._where, model_type)
        prefixes = prefixes_of([entry.target.key for entry in named if not entry.parts])
        stacks = {
            entry.target.key.native: StoredStack(entry.target, prefixes[entry.target.key.native], self.packing)
            for entry in named
            if len(entry.target.key.shape) == 3 and not entry.parts
        }
        swapped = self._is_swapped(list(stacks.values()))
        stored: list[Stored] = []
        for entry in named:
            native = entry.target.key.native
            if entry.parts:
                stored.append(StoredExperts(entry.target, entry.parts))
            elif native in stacks:
                stored.append(StoredStack(entry.target, prefixes[native], self.packing, swapped))
            else:
                stored.append(StoredMatrix(entry.target, prefixes[native]))
        return stored, swapped

    def _is_swapped(self, stacks: Sequence[StoredStack]) -> bool:
        """By the shapes, and where those fit both layouts, by the version of PEFT that the config names."""
        if not stacks:
            return False
        by_shape = is_swapped(stacks, {name: info.shape for name, info in self._header.items()})
        if by_shape is not None:
            return by_shape
        text = self.config.get("peft_version")
        version = tuple(int(part) for part in re.findall(r"\d{1,9}", str(text or ""))[:3])
        if not version and all(stack.target.key.shape[1] == stack.target.key.shape[2] for stack in stacks):
            raise NibbleError(
                f"{self._where}: the experts' matrices are square, so that no shape tells in which of PEFT's layouts "
                f"their tensors are, and {CONFIG} has no peft_version.\n"
                "Put in the version of PEFT that made it (PEFT up to 0.19.0 swapped in and out)."
            )
        return bool(version) and version < (0, 19, 1)


def packing_of(config: Mapping[str, Any], asked: Packing | None, where: str) -> Packing:
    """How an adapter keeps the lora_B of stacks: what was asked for, or what its config says."""
    said = config.get(PACKING)
    if said is None:
        return asked or "peft"
    if not isinstance(said, str) or said not in _PACKINGS:
        raise NibbleError(f"{where}: {PACKING} is {shown(said)}; known are {', '.join(_PACKINGS)}.")
    if asked not in (None, _PACKINGS[said]):
        raise NibbleError(
            f"{where}: its {PACKING} is {said!r}, which is the layout {_PACKINGS[said]}, not {asked}.\n"
            "Leave the layout to it."
        )
    return _PACKINGS[said]


def _check_tensors(stored: Sequence[Stored], header: Mapping[str, TensorInfo], key_map: KeyMap, where: str) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for entry in stored:
        expected |= entry.shapes()
    unknown, missing = sorted(header.keys() - expected.keys()), sorted(expected.keys() - header.keys())
    if unknown:
        hint = "\nThe config and the tensors don't belong together, or the adapter is for another model."
        groups = {module_name(key.hub): key.group for key in key_map.keys if key.group not in TARGET_GROUPS}
        for name in unknown:
            module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
            if module in groups:
                can = ", ".join(TARGET_GROUPS)
                hint = f"\n{module} is of the {GROUP_WORDS[groups[module]]}; LoRA is supported on {can}."
            if re.search(r"\b(visual|vision_tower|vision_model)\b", module):
                hint = "\nIt adapts the vision tower, which isn't computed here: only adapters of the text model load."
        raise NibbleError(f"{where}: {some(unknown, 3)} in {WEIGHTS}, which {CONFIG} doesn't name.{hint}")
    if missing:
        raise NibbleError(f"{where}: {WEIGHTS} lacks {some(missing, 3)}, which {CONFIG} names for this model.")
    for name, shape in expected.items():
        if header[name].shape != shape:
            raise NibbleError(
                f"{where}: {name} is {list(header[name].shape)}; this model and the rank make it {list(shape)}."
            )
        dtype = DTYPES.get(header[name].dtype)
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            raise NibbleError(f"{where}: {name} is {header[name].dtype}; only float32, bfloat16 and float16 are read.")
