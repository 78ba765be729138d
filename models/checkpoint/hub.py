"""Reading a checkpoint in the hub's format: config.json and memory-mapped safetensors shards.

Nothing in such a folder is ever executed: pickle files (.bin, .pt) are refused, `auto_map` (remote code) is not looked
at.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.checkpoint.fingerprint import full_fingerprint, is_sampled, sampled_fingerprint
from models.checkpoint.hub_id import PICKLES, download_command
from models.checkpoint.side_files import CONFIG
from models.checkpoint.tensorfile import MappedFolder, TensorInfo, read_header
from models.decoder import CausalLM
from models.registry import architecture_for
from quant.common.errors import NibbleError
from quant.common.jsonfile import mapping, read_json
from quant.common.words import some
from quant.storage import StorageSpec

log = logging.getLogger("nibble")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"\blayers\.(\d{1,9})\.")
_EXPERT = re.compile(r"\bexperts\.(\d{1,9})\.")
_STACK = re.compile(r"\bexperts\.\w+$")


class HubCheckpoint:
    """A hub folder, opened: config, and every tensor's shape and dtype. Data is read when asked for.

    headers: of each shard, in the order of its file; a tensor that two shards have is in both.
    Memory holds the tensors handed out, and at most 16 MiB of a mapped shard that were read before.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises NibbleError where the folder, its config or its shards are missing or damaged."""
        self.path = Path(path)
        self.config_bytes, self.config = read_config(self.path)
        self._files: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        self.headers: dict[str, dict[str, TensorInfo]] = {}
        self._mapped = MappedFolder(self.path)
        self._read_headers(_shards(self.path))

    def __enter__(self) -> HubCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, key: object) -> bool:
        return key in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._infos[key].shape

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self._infos.items()}

    def dtype(self, key: str) -> str:
        """The format's name of the dtype: "BF16", "F32", "F8_E4M3" …"""
        return self._infos[key].dtype

    @property
    def nbytes(self) -> int:
        return self.nbytes_of(self._infos)

    def nbytes_of(self, keys: Iterable[str]) -> int:
        return sum(self._infos[key].end - self._infos[key].begin for key in keys)

    def tensor(self, key: str) -> Tensor:
        """The tensor as stored: a view of the mapped file, to be read and not written."""
        with self._damage(key):
            return self._mapped.file(self._files[key], self.nbytes_of([key])).get_tensor(key)

    def row(self, key: str, index: int) -> Tensor:
        """Index `index` along dim 0 of a tensor (one expert of a fused stack), without reading the others."""
        with self._damage(key):
            nbytes = self.nbytes_of([key]) // self.shape(key)[0]
            return self._mapped.file(self._files[key], nbytes).get_slice(key)[index]

    def close(self) -> None:
        """Unmap the shard that is open. Reading maps it again."""
        self._mapped.close()

    def fingerprint(self) -> str:
        """What identifies the content, whatever its files are called: models/checkpoint/fingerprint.py."""
        return full_fingerprint(self.path, self.config_bytes, self.tensors())

    def has_fingerprint(self, recorded: str, renew: str) -> bool:
        """Whether `recorded` is this content's fingerprint.

        renew: what to do about one of an earlier version, which was made of samples and is compared as such.
        """
        if not is_sampled(recorded):
            return recorded == self.fingerprint()
        same = recorded == sampled_fingerprint(self.path, self.config_bytes, self.tensors())
        if same:
            log.warning(
                "%s: taken for the same by samples of its data, all that an earlier version of nibble recorded; a "
                "small change goes unseen. %s",
                self.path,
                renew,
            )
        return same

    def tensors(self) -> dict[str, tuple[str, TensorInfo]]:
        """By key: the shard that counts for it, and where it is there."""
        return {key: (self._files[key], info) for key, info in self._infos.items()}

    def _read_headers(self, shards: dict[str, list[str]]) -> None:
        for shard, indexed in shards.items():
            try:
                header = read_header(self.path / shard)
            except NibbleError as error:
                again = f"Fetch it again: {download_command(self.path, shard)}"
                raise NibbleError(f"{str(error).splitlines()[0]}\n{again}") from error
            absent = [key for key in indexed if key not in header]
            if absent:
                raise NibbleError(
                    f"{self.path}: {INDEX} says that {shard} holds {some(absent)}; it doesn't.\n"
                    f"Index and shards are of different versions. Fetch all: {download_command(self.path)}"
                )
            self.headers[shard] = header
            for key, info in header.items():
                if key in self._infos and key not in indexed:
                    continue  # the index says which of two copies counts
                self._infos[key] = info
                self._files[key] = shard

    @contextlib.contextmanager
    def _damage(self, key: str) -> Iterator[None]:
        name = self._files[key]
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise NibbleError(
                f"{self.path / name}: {key} can't be read ({error}).\n"
                f"Fetch it again: {download_command(self.path, name)}"
            ) from error


def read_config(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """config.json of a hub or converted folder: its bytes, and the object. Raises NibbleError."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "doesn't exist"
        raise NibbleError(f"{folder} {what}. Wanted: a folder with {CONFIG} and *.safetensors.")
    path = folder / CONFIG
    if not path.is_file():
        raise NibbleError(
            f"{folder}: there is no {CONFIG}, so this isn't a checkpoint folder.\n{_what_is_there(folder)}"
        )
    config = read_json(path, dict)
    return path.read_bytes(), config


def _what_is_there(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return f"It holds: {some(names)}." if names else "It is empty."


def _shards(folder: Path) -> dict[str, list[str]]:
    """The folder's shards, with the keys that the index names for each (a lone file has no index)."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        if index.is_file():
            log.warning("%s has %s beside %s; as in transformers, %s is read.", folder, SINGLE, INDEX, SINGLE)
        return {SINGLE: []}
    if not index.is_file():
        raise NibbleError(_no_weights(folder))
    weight_map = mapping(read_json(index, dict), "weight_map", str(index))
    if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise NibbleError(f"{index}: weight_map should name a shard for every key.")
    shards: dict[str, list[str]] = {shard: [] for shard in sorted(set(weight_map.values()))}
    for key, shard in weight_map.items():
        shards[shard].append(key)
    strange = [shard for shard in shards if Path(shard).name != shard]
    if strange:
        raise NibbleError(f"{index} names a file outside the folder: {strange[0]!r}.")
    pickled = [shard for shard in shards if not shard.endswith(".safetensors")]
    if pickled:
        raise NibbleError(_pickle(folder, pickled))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        count = len(shards[missing[0]])
        tensors = f"{count} tensor{'s'[: count != 1]}"
        others = f" {len(missing) - 1} more are missing too." if len(missing) > 1 else ""
        files = missing[0] if len(missing) == 1 else ""
        raise NibbleError(
            f"{folder}: shard {missing[0]} is missing (the index names it for {tensors}).{others}\n"
            f"Fetch it again: {download_command(folder, files)}"
        )
    return shards


def _no_weights(folder: Path) -> str:
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES)
    if pickles:
        return _pickle(folder, pickles)
    stray = sorted(entry.name for entry in folder.glob("*.safetensors"))
    if stray:
        return (
            f"{folder}: {INDEX} is missing; without it {some(stray)} can't be told to be complete.\n"
            f"Fetch it: {download_command(folder, INDEX)}"
        )
    return (
        f"{folder}: there are no weights ({SINGLE}, or {INDEX} and its shards).\nFetch them: {download_command(folder)}"
    )


def _pickle(folder: Path, names: list[str]) -> str:
    return (
        f"{folder}: the weights are pickle files ({some(names)}). Opening one can run any code that is in it, so only "
        f"safetensors are read.\nIf the repository has safetensors, fetch those: {download_command(folder)}\n"
        "If not, load it with transformers where that risk is acceptable: save_pretrained writes safetensors."
    )


def meta_model(
    config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str, spec: StorageSpec, dtype: torch.dtype
) -> CausalLM:
    """The model that a config.json (`where`) describes, on the meta device.

    shapes: as for `check_counts`, which is made before. Raises NibbleError.
    """
    architecture = architecture_for(config, where)
    parsed = architecture.parse_config(config, where)
    check_counts(shapes, parsed.layers, parsed.experts, where)
    return architecture.build(parsed, spec, dtype, "meta")


def check_counts(shapes: Mapping[str, tuple[int, ...]], layers: int, experts: int, where: str) -> None:
    """Raises NibbleError where config.json (`where`) speaks of more layers or experts than the weights have: before a
    model of that many is made.

    shapes: of the weights' tensors by their names, () where it isn't known.
    """
    numbers = [[int(match[1]) for match in map(pattern.search, shapes) if match] for pattern in (_LAYER, _EXPERT)]
    numbers[1] += [shape[0] - 1 for name, shape in shapes.items() if len(shape) == 3 and _STACK.search(name)]
    for what, count, found in zip(
        ("num_hidden_layers", "the number of experts"), (layers, experts), numbers, strict=True
    ):
        if found and count > max(found) + 1:
            raise NibbleError(
                f"{where}: {what} is {count:,}, but the weights are of {max(found) + 1:,}.\n"
                "config.json and the weights are of different models, or the index leaves shards out."
            )
