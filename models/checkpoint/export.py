"""A dense native model written as a checkpoint in the hub's format, for transformers, vLLM and others to load."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from models.blocks.configjson import text_section
from models.blocks.linear import LoRA
from models.checkpoint.hub import INDEX, SINGLE, HubCheckpoint, read_config
from models.checkpoint.hub_id import local_folder
from models.checkpoint.keymap import HEAD, Key, KeyMap, key_map_of
from models.checkpoint.native import Manifest, dtype_name, is_converted
from models.checkpoint.side_files import CONFIG, SIDE_FILES, TEMPLATES, side_files
from models.checkpoint.stream import is_carried, layout_of, sum_up
from models.checkpoint.tensorfile import DTYPES, TensorWriter, tensor_bytes
from models.decoder import CausalLM
from quant.common.errors import NibbleError
from quant.common.files import PARTIAL, write_atomically
from quant.storage import DenseStorage, Storage

log = logging.getLogger("nibble")

_QUANTISED = "quantization_config"
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

# Makes one tensor of a parameter that may be cut into parts.
Gather = Callable[[Tensor], Tensor]


def local_value(parameter: Tensor) -> Tensor:
    return parameter.detach()


@dataclass(frozen=True)
class _Item:
    """One hub tensor to be written; `read` gives it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.shape, self.dtype)


def export_hub(
    model: CausalLM,
    directory: str | Path,
    source: str | Path,
    *,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    gather: Gather = local_value,
    writes: bool = True,
) -> Path:
    """Write `model`, whose storage is none, to `directory`: weights in shards, index, config, tokenizer.

    source: the folder (hub format or converted) that the model was loaded from. config.json, tokenizer and chat
        template are taken from it; in config.json only the dtype is set to the model's. Keys are as the source has
        them, fused experts or a matrix per expert. Tensors that the architecture doesn't compute with (multi-token
        prediction, vision tower) are carried through as they are, from the hub folder that `source` is or was
        converted from; where that is gone, a warning says what is left out. A copy of a tied head is not written.
    max_shard_bytes: a tensor larger than that gets a shard of its own.
    overwrite: replace a checkpoint that is there already; files that are not a checkpoint's stay.
    gather, writes: as for `models.adapters.files.save_adapter`, where the model is cut into parts on several processes.

    Everything is written in the model's dtype, except what the model keeps in float32 all the same (routers, their
    biases, Trinity's norms, DeltaNet's decay): that is float32, unless the source has it in the model's dtype and
    nothing is lost by that. So no digit that was trained is rounded off, and an untrained model comes back unchanged.

    The folder appears when it is whole. Memory: the model, and one tensor. Returns `directory`.
    Raises NibbleError for another storage, for a model with an adapter, or where the folder exists.
    """
    directory, source = Path(directory), Path(source)
    if model.spec.kind != "none":
        raise NibbleError(
            f"a checkpoint in the hub's format is dense, and this model's storage is {model.spec.kind}.\n"
            "Load it with storage none; an adapter alone is saved as it is, without the model."
        )
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise NibbleError(
            "this model has an adapter, and an export writes the base weights alone.\nSave the adapter: save_adapter."
        )
    config = dense_config(source, model.dtype)
    if not writes:
        _gather_only(model, source, gather)
        return directory
    if directory.exists() and not (overwrite and (directory / CONFIG).is_file()):
        raise NibbleError(f"{directory} exists already. Name a folder that doesn't.")
    partial = directory.with_name(directory.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        manifest = Manifest.load(source) if is_converted(source) else None
        with _origin(source, manifest) or contextlib.nullcontext() as origin:
            key_map = _layout(key_map_of(model), origin, manifest)
            items = list(_items(model, key_map, origin, gather))
            if origin is not None:
                items += _carried(key_map, origin)
            _write_shards(items, partial, max_shard_bytes)
        write_atomically(partial / CONFIG, config)
        for name, data in side_files(source).items():
            if name != CONFIG:
                (partial / name).parent.mkdir(exist_ok=True)
                write_atomically(partial / name, data)
        _swap(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def _gather_only(model: CausalLM, source: Path, gather: Gather) -> None:
    """What a process does while another one writes: give its parts, in the order in which they are written."""
    manifest = Manifest.load(source) if is_converted(source) else None
    with _origin(source, manifest) or contextlib.nullcontext() as origin:
        key_map = _layout(key_map_of(model), origin, manifest)
        for item in list(_items(model, key_map, origin, gather)):
            item.read()


def _items(model: CausalLM, key_map: KeyMap, origin: HubCheckpoint | None, gather: Gather) -> Iterator[_Item]:
    """Hub tensors in the key map's order; stacks are split into experts and their parts where the hub has them so."""
    for key in key_map.keys:
        value = _Gathered(_value(model, key), gather)
        dtype = _written(key, value, model.dtype, origin)
        if not key.parts or key.fused:
            yield _Item(key.hub, key.shape, dtype, lambda value=value, dtype=dtype: value.take().to(dtype))  # type: ignore[misc]
            continue
        experts, rows, columns = key.shape
        height, last = rows // len(key.parts), (experts - 1, len(key.parts) - 1)
        for expert in range(experts):
            for index, part in enumerate(key.parts):

                def block(
                    value: _Gathered = value, expert: int = expert, index: int = index, height: int = height,
                    last: tuple[int, int] = last,
                ) -> Tensor:  # fmt: skip
                    stack = value.take() if (expert, index) == last else value.get()
                    return stack[expert, index * height : (index + 1) * height]

                yield _Item(part.format(e=expert), (height, columns), dtype, block)


class _Gathered:
    """A parameter, gathered when it is first asked for and kept until its last use."""

    def __init__(self, parameter: Tensor, gather: Gather) -> None:
        self.parameter, self._gather = parameter, gather
        self._made: Tensor | None = None

    def get(self) -> Tensor:
        if self._made is None:
            self._made = self._gather(self.parameter)
        return self._made

    def take(self) -> Tensor:
        """As `get`, and keep it no longer."""
        made, self._made = self.get(), None
        return made


def _written(key: Key, value: _Gathered, dtype: torch.dtype, origin: HubCheckpoint | None) -> torch.dtype:
    """The dtype to write a tensor in: see `export_hub` for those that are float32 in a model of another dtype."""
    has = value.parameter.dtype
    if has == dtype:
        return dtype
    whole = value.take()  # in any case: all processes make it whole together, and the origin may be there for one only
    if origin is None or key.hub not in origin or DTYPES.get(origin.dtype(key.hub)) != dtype:
        return has
    return dtype if torch.equal(whole.to(dtype).to(has), whole) else has


def _value(model: CausalLM, key: Key) -> Tensor:
    if key.spec is None:
        owner, _, name = key.native.rpartition(".")
        value = getattr(model.get_submodule(owner), name)
    else:
        storage = model.get_submodule(key.native)
        assert isinstance(storage, Storage)
        if not isinstance(storage, DenseStorage):
            raise NibbleError(f"{key.native} is stored as {storage.kind}; only dense weights can be exported.")
        value = storage.value
    return cast(Tensor, value)


def _origin(source: Path, manifest: Manifest | None) -> HubCheckpoint | None:
    """The hub checkpoint that `source` is or was made from, where it is still there and the same."""
    if manifest is None:
        return HubCheckpoint(source) if (source / SINGLE).is_file() or (source / INDEX).is_file() else None
    folder = local_folder(manifest.source)
    if folder is not None:
        with contextlib.suppress(NibbleError):
            checkpoint = HubCheckpoint(folder)
            if checkpoint.has_fingerprint(manifest.fingerprint, f"To be sure, convert {source} again with --force."):
                return checkpoint
    missed = [name for name in manifest.carried if name != HEAD]
    if missed:
        log.warning(
            "not exported, as the converted checkpoint doesn't hold them and what it was made from, %s, is no longer "
            "there or has changed: %s",
            manifest.source,
            sum_up(missed),
        )
    return None


def _layout(key_map: KeyMap, origin: HubCheckpoint | None, manifest: Manifest | None) -> KeyMap:
    """The key map with the hub's keys as the source has them; where that isn't known, as the architecture says."""
    if origin is not None:
        return key_map.laid_out(layout_of(key_map, origin))
    return key_map.laid_out(manifest.layout) if manifest is not None and manifest.layout is not None else key_map


def _carried(key_map: KeyMap, checkpoint: HubCheckpoint) -> Iterator[_Item]:
    wanted = {hub for key in key_map.keys for hub in (key.hub, *key.part_keys())}
    for name in checkpoint:
        # A copy of a tied head would contradict the trained embedding.
        if name not in wanted and is_carried(name, key_map, checkpoint) and name != HEAD:
            dtype = DTYPES.get(checkpoint.dtype(name))
            if dtype is None:
                raise NibbleError(
                    f"{checkpoint.path}: {name} has a dtype that can't be written: {checkpoint.dtype(name)}."
                )
            yield _Item(name, checkpoint.shape(name), dtype, lambda name=name: checkpoint.tensor(name))  # type: ignore[misc]


def _write_shards(items: list[_Item], folder: Path, limit: float) -> None:
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    weight_map = {}
    for name, shard in zip(names, shards, strict=True):
        with TensorWriter(folder / name, {item.name: (item.shape, item.dtype) for item in shard}) as writer:
            for item in shard:
                writer.write(item.name, item.read())
                weight_map[item.name] = name
            writer.finish()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(item.nbytes for item in items)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_atomically(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")


def dense_config(source: Path, dtype: torch.dtype | None = None) -> bytes:
    """The source's config.json, to the byte where its dtype is `dtype` and nothing says that it is quantised.

    The weights that are written are dense: a quantization_config would make others decode them. The dtype (None: as it
    is) is set where the file has one: in its outermost section, in that of the text model, or in both.
    """
    data, config = read_config(source)
    sections = [config] if text_section(config) is config else [config, text_section(config)]
    spelled = [(section, key) for section in sections for key in ("dtype", "torch_dtype") if key in section]
    if dtype is None:
        spelled, name = [], ""
    else:
        spelled, name = spelled or [(config, "dtype")], dtype_name(dtype)
    if all(section.get(key) == name for section, key in spelled) and not any(_QUANTISED in part for part in sections):
        return data
    for section in sections:
        section.pop(_QUANTISED, None)
    for section, key in spelled:
        section[key] = name
    return json.dumps(config, indent=2).encode() + b"\n"


def _swap(partial: Path, directory: Path) -> None:
    """Put what is written in the place of an older export; what else is in its folder stays there."""
    if not directory.exists():
        partial.rename(directory)
        return
    old = directory.with_name(directory.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    directory.rename(old)
    partial.rename(directory)
    for path in old.iterdir():
        if not (_SHARD.fullmatch(path.name) or path.name in (INDEX, TEMPLATES, *SIDE_FILES)):
            path.rename(directory / path.name)
    shutil.rmtree(old)
