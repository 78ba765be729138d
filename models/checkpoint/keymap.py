"""The table between a hub checkpoint's keys and the tensors of a model, read off the model's modules.

Shapes, dtypes, storages and groups are the modules' own. Names are alike on both sides but for the exceptions that an
architecture declares (models.decoder.HubForm) and for stacks of experts. The same table loads, converts and exports,
and names what LoRA can adapt. A hub key that it neither names nor knows as carried is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from models.blocks.groups import Group
from models.blocks.linear import ExpertWeights, LoRA
from models.checkpoint.layout import Layout, respell
from models.decoder import CausalLM
from quant.kinds import storage_tensors
from quant.storage import Storage, StorageSpec

# Of a model with tied embeddings only some files have it, as a copy of the embedding, by which it is implied.
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Key:
    """One native tensor, and the hub's key or keys for it.

    native: dotted name in the model of a Parameter or buffer, or of a Storage module.
    hub: the hub's key. For stacked experts, the fused key.
    shape: the dense shape, the same on both sides; stacked experts are [E, out, in], E all experts of the layer.
    dtype: of the tensor, or of what the storage gives. spec: of a Storage; None for a plain tensor.
    parts: stacked experts only: the per-expert keys with `{e}` for the expert, whose matrices are concatenated
        along their first dimension (gate above up).
    fused: stacked experts only: an export writes the fused key rather than the parts. Both can be read.
    counted: among the parameters that are counted, as transformers counts them (GLM's correction biases are not).
    """

    native: str
    hub: str
    group: Group
    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: StorageSpec | None = None
    parts: tuple[str, ...] = ()
    fused: bool = False
    counted: bool = True

    def matrices(self) -> Iterator[tuple[str, int | None, slice]]:
        """Of stacked experts each matrix: its key when unfused, its expert and its rows; otherwise (hub, None, all)."""
        if not self.parts:
            yield self.hub, None, slice(None)
            return
        height = self.shape[1] // len(self.parts)
        for expert in range(self.shape[0]):
            for index, part in enumerate(self.parts):
                yield part.format(e=expert), expert, slice(index * height, (index + 1) * height)

    def part_keys(self) -> Iterator[str]:
        """The keys under which the hub may hold this tensor unfused: one, or E × parts for stacked experts."""
        return (name for name, _, _ in self.matrices())

    def hub_keys(self) -> Iterator[str]:
        """The keys that an export writes."""
        if self.fused:
            yield self.hub
        else:
            yield from self.part_keys()

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Names, shapes and dtypes of the native tensors."""
        if self.spec is None:
            return {self.native: (self.shape, self.dtype)}
        kept = storage_tensors(self.spec, self.shape, self.dtype, self.native)
        return {f"{self.native}.{name}": entry for name, entry in kept.items()}


@dataclass(frozen=True)
class KeyMap:
    """All tensors of a model in the order of its modules.

    carried: patterns (full match) of hub keys that this model does not compute with (multi-token prediction layers,
        vision towers). They are named when a checkpoint is read, and an export can carry them through.
    """

    keys: tuple[Key, ...]
    carried: tuple[str, ...] = ()

    def is_carried(self, hub_key: str) -> bool:
        return any(re.fullmatch(pattern, hub_key) for pattern in self.carried)

    def laid_out(self, layout: Layout) -> KeyMap:
        """The same table, with the hub's keys as `layout` has them."""
        return KeyMap(tuple(_laid_out(key, layout) for key in self.keys), self.carried)


def key_map_of(model: CausalLM) -> KeyMap:
    """The table of `model`, which may be on the meta device or cut into parts: sizes are those of whole tensors."""
    keys = tuple(_keys(model, "", None, model, set()))
    tied = not any(key.native == HEAD for key in keys)
    key_map = KeyMap(keys, (*model.hub.carried, *([re.escape(HEAD)] if tied else ())))
    form = model.hub.vision_language
    return key_map.laid_out(Layout(wrapped=form, fused=form))


def _keys(module: nn.Module, name: str, group: Group | None, model: CausalLM, seen: set[int]) -> Iterator[Key]:
    """seen: the id() of parameters that have a key already; a tied head is the embedding."""
    if isinstance(module, LoRA):
        return
    group = getattr(module, "group", group)
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if isinstance(child, Storage):
            if not seen.intersection(map(id, child.parameters())):
                yield _storage_key(full, child, module, _known(group, full), model)
        else:
            yield from _keys(child, full, group, model, seen)
    for tensor_name, tensor in (*module.named_parameters(name, recurse=False), *module.named_buffers(name, False)):
        seen.add(id(tensor))
        counted = isinstance(tensor, nn.Parameter) or tensor_name.endswith(model.hub.counted_buffers)
        hub = _hub_name(tensor_name, model)
        yield Key(tensor_name, hub, _known(group, tensor_name), tuple(tensor.shape), tensor.dtype, counted=counted)


def _storage_key(name: str, storage: Storage, owner: nn.Module, group: Group, model: CausalLM) -> Key:
    if not isinstance(owner, ExpertWeights):
        return Key(name, _hub_name(name, model), group, storage.shape, storage.dtype, storage.spec)
    fused = _hub_name(name.removesuffix(".weight"), model)
    experts = fused.rpartition(".")[0]
    parts = tuple(f"{experts}.{{e}}.{part}.weight" for part in owner.parts)
    return Key(name, fused, group, owner.shape, storage.dtype, storage.spec, parts)


def _hub_name(name: str, model: CausalLM) -> str:
    for ending, hub in model.hub.renamed.items():
        if name.endswith(f".{ending}"):
            return name.removesuffix(ending) + hub
    return name


def _known(group: Group | None, name: str) -> Group:
    if group is None:
        raise TypeError(f"{name} belongs to no group: its module, or one around it, needs a `group`")
    return group


def _laid_out(key: Key, layout: Layout) -> Key:
    spelling = layout.spelling
    return Key(
        key.native,
        respell(key.hub, spelling),
        key.group,
        key.shape,
        key.dtype,
        key.spec,
        tuple(respell(part, spelling) for part in key.parts),
        layout.fused and bool(key.parts),
        key.counted,
    )
