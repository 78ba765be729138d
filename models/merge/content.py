"""A hub checkpoint with an adapter merged into it, whose tensors are made when they are asked for.

Shapes: E experts, R rank; a stack is [E, out, in].
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from models.adapters.adapter_file import AdapterFile, Pair
from models.adapters.packing import Packing
from models.checkpoint.conversion import Content
from models.checkpoint.export import dense_config
from models.checkpoint.fingerprint import fingerprint_of, hash_tensor
from models.checkpoint.hub import HubCheckpoint, meta_model
from models.checkpoint.keymap import Key, key_map_of
from models.checkpoint.side_files import CONFIG
from models.checkpoint.stream import HubReader
from models.checkpoint.tensorfile import tensor_bytes
from models.merge.error import Norms
from quant.common.errors import NibbleError
from quant.common.words import printable
from quant.kinds import new_storage
from quant.storage import StorageSpec, all_finite

log = logging.getLogger("nibble")

# What the update is added to: the checkpoint's weights, or what its quantisation gives back of them.
Onto = Literal["base", "dequantised"]
ONTO: tuple[Onto, ...] = get_args(Onto)

_STACKS_KEPT = 2  # of the adapter: files have an expert's matrices of both stacks side by side


class Merged(Content):
    """W + s · B·A for what the adapter adapts, computed in float32 and rounded once to the checkpoint's dtype.

    trained: how the base was stored when the adapter was trained. norms: what the quantisation changed, and what the
    adapter did, filled as tensors are made. changed: the hub keys whose data isn't the base's.
    """

    def __init__(
        self,
        base: HubCheckpoint,
        name: str,
        adapter: str,
        *,
        trained: StorageSpec,
        onto: Onto = "base",
        layout: Packing | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int, str], None] = lambda done, total, what: None,
    ) -> None:
        """device: where matrices are quantised. progress: of `fingerprint`, in bytes.
        Raises NibbleError where the adapter or the checkpoint doesn't fit.
        """
        super().__init__(base, name)
        self.trained, self.onto, self._device, self._progress = trained, onto, device, progress
        self._fingerprint: str | None = None
        model = meta_model(base.config, base.shapes, str(base.path / CONFIG), trained, torch.float32)
        key_map = key_map_of(model)
        self.adapter = AdapterFile(adapter, key_map, model.model_type, layout=layout)
        self._reader = HubReader(base, key_map)
        self._stored = {stored.target.key.native: stored for stored in self.adapter.stored}
        self._keys = {key.native: key for key in self._reader.keys if self._is_changed(key)}
        self.changed = {name: place for key in self._keys.values() for name, place in _places(key, base)}
        self.norms = Norms(key for key in self._keys.values() if key.native in self._stored)
        self.config = dense_config(base.path)
        for _ in self.adapter:  # all of it can be read, and is finite
            pass
        self._note_other_base()
        self._pairs: dict[str, Pair] = {}
        self._latest: tuple[tuple[str, int], Tensor] | None = None

    def _note_other_base(self) -> None:
        """The same model has other names in other places: the last part of them has to agree."""
        named = self.adapter.config.get("base_model_name_or_path")
        if isinstance(named, str) and named:
            last = Path(named).name.lower()
            here = [part.lower() for part in (*Path(self.name).parts, *self.checkpoint.path.resolve().parts)]
            if not any(part == last or part.endswith(f"--{last}") for part in here):
                log.warning("%s names %s as its base, not %s", self.adapter.directory, printable(named, 120), self.name)

    def _is_changed(self, key: Key) -> bool:
        return key.native in self._stored or (self.onto == "dequantised" and self._is_quantised(key))

    @staticmethod
    def _is_quantised(key: Key) -> bool:
        return key.spec is not None and key.spec.kind != "none"

    # -- tensors

    @torch.no_grad()
    def change(self, key: Key, expert: int | None, dense: Tensor) -> Tensor:
        """See stream.Change. Raises NibbleError where a merged value is beyond the dtype."""
        own = self._keys.get(key.native)
        if own is None:
            return dense
        exact = torch.promote_types(dense.dtype, torch.float32)
        base = dense.to(exact)
        pair = self._pair(key.native)
        quantised = self._is_quantised(own) and (self.onto == "dequantised" or not self.norms.has(own, expert))
        given = self._dequantised(own, dense).to(exact) if quantised else base
        merged = given if self.onto == "dequantised" else base
        if pair is not None:
            a, b = (pair.a, pair.b) if expert is None else (pair.a[expert], pair.b[expert])
            delta = (b.to(exact) @ a.to(exact)).mul_(pair.scaling)
            self.norms.add(own, expert, error=given - base, delta=delta)
            merged = delta.add_(merged)
        rounded = merged.to(dense.dtype)
        if not all_finite(rounded):
            raise NibbleError(
                f"{self.checkpoint.path}: {key.hub}: with the adapter some of its values are inf or NaN in "
                f"{str(dense.dtype).removeprefix('torch.')}.\nThe adapter has diverged, or is for another model."
            )
        return rounded

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The data of a hub tensor in `changed`, piece after piece in the order of the file."""
        key, expert, rows = self.changed[name]
        if not key.parts:
            yield self.change(key, None, self.checkpoint.tensor(name))
        elif expert is None:
            for index in range(key.shape[0]):
                yield self.change(key, index, self._reader.dense(key, index))
        else:
            yield self._expert(key, expert)[rows]

    def _expert(self, key: Key, expert: int) -> Tensor:
        """All parts of an expert's matrix, which files have one after another: the latest is kept."""
        if self._latest is None or self._latest[0] != (key.native, expert):
            made = self.change(key, expert, self._reader.dense(key, expert))
            if len(key.parts) == 1:
                return made
            self._latest = ((key.native, expert), made)
        return self._latest[1]

    def _pair(self, native: str) -> Pair | None:
        stored = self._stored.get(native)
        if stored is None:
            return None
        if native not in self._pairs:
            while len(self._pairs) >= _STACKS_KEPT:
                del self._pairs[next(iter(self._pairs))]
            self._pairs[native] = self.adapter.read(stored)
        return self._pairs[native]

    def _dequantised(self, key: Key, dense: Tensor) -> Tensor:
        """What the storage of the training gives back of a matrix [out, in]: float32, on the CPU."""
        storage = new_storage(
            self.trained, tuple(dense.shape), torch.float32, self._device, f"{self.checkpoint.path}: {key.hub}"
        )
        storage.load_dense(dense.to(self._device))
        return storage.dense().cpu()

    # -- what a conversion asks for

    def fingerprint(self) -> str:
        """Of the merged checkpoint, as it is in the hub's format. Makes every tensor once, on the first call."""
        if self._fingerprint is None:
            self._fingerprint = self._make_fingerprint()
        return self._fingerprint

    def _make_fingerprint(self) -> str:
        tensors = self.checkpoint.places
        total, done = self.checkpoint.nbytes, 0
        hashes = {}
        for key in sorted(tensors, key=lambda key: (tensors[key][0], tensors[key][1].begin)):
            shard, info = tensors[key]
            if key in self.changed:
                digest = hashlib.sha256()
                for piece in self.pieces(key):
                    digest.update(data_of(piece))
                hashes[key] = digest.digest()
            else:
                hashes[key] = hash_tensor(self.checkpoint.path / shard, info)
            done += info.end - info.begin
            self._progress(done, total, shard)
        return fingerprint_of(self.config, tensors, hashes)

    def has_fingerprint(self, recorded: str) -> bool:
        return recorded == self.fingerprint()

    def side_files(self) -> dict[str, bytes]:
        return super().side_files() | {CONFIG: self.config}


# A hub tensor of a key: all of it, or of an expert the rows of one part.
Place = tuple[Key, int | None, slice]


def _places(key: Key, base: HubCheckpoint) -> Iterator[tuple[str, Place]]:
    whole = [(key.hub, None, slice(None))]
    for name, expert, rows in whole if key.hub in base else key.matrices():
        yield name, (key, expert, rows)


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as safetensors files have them."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    assert len(data) == tensor_bytes(tuple(tensor.shape), tensor.dtype)
    return data
