"""Safetensors files: the header without the data, tensors as views of a mapped file, and a writer in pieces.

The safetensors library writes a file from whole tensors in memory; here a stack of experts is written one expert at
a time, at its place in the file, so the largest thing in memory is one matrix.
Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant.common.errors import NibbleError
from quant.common.files import PARTIAL, disk_errors, sync_folder
from quant.common.jsonfile import JsonError, kind_of, parse_json
from quant.common.words import shown

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Bits of the format's other dtypes, which nothing here reads: such a tensor can only be left where it is.
_OTHER_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_HEADER = 100_000_000  # the safetensors library's own limit
# What is read of a mapped file counts as memory of this process until it is unmapped. Mapping it again takes 1 ms.
MAPPED_BYTES = 16 * 2**20
_READ_AT_ONCE = 4 * 2**20  # bytes, of what is read back to be hashed


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is. dtype is the format's own name ("BF16"); begin and end are byte offsets in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes, shapes and places of a file's tensors, in file order; no tensor data is read.

    Raises NibbleError where the file can't be read, is no safetensors file, or contradicts its header.
    """
    size = _size(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _MAX_HEADER:
            raise NibbleError(f"{path} is not a safetensors file ({size:,} bytes).\n{_AGAIN}")
        text = file.read(length)
    if len(text) < length:
        raise NibbleError(f"{path} is cut short: {size:,} bytes, its header alone has {8 + length:,}.\n{_AGAIN}")
    try:
        header = parse_json(text)
        if not isinstance(header, dict):
            raise JsonError(f"it is {kind_of(header)}")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise JsonError("its __metadata__ must be texts by name")
        tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in header.items()}
    except JsonError as error:
        raise NibbleError(f"{path} is not a safetensors file: its header can't be read ({error}).\n{_AGAIN}") from error
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 8 + length
    for name, info in tensors.items():
        if info.begin != end:
            how = "share bytes" if info.begin < end else "leave a gap"
            raise NibbleError(
                f"{path} is not a safetensors file: {shown(name)} and the tensor before it {how} at {end:,}.\n{_AGAIN}"
            )
        end = info.end
    if size != end:
        how = "is cut short" if size < end else "is longer than it should be"
        raise NibbleError(f"{path} {how}: {size:,} bytes, its header says {end:,}.\n{_AGAIN}")
    return tensors


def _tensor_info(name: str, entry: Any, start: int) -> TensorInfo:
    """One entry of a header whose data begins at `start`. Raises JsonError where it contradicts itself."""
    if not isinstance(entry, dict):
        raise JsonError(f"{shown(name)} is {kind_of(entry)}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise JsonError(f"{shown(name)} needs a dtype, a shape and two data_offsets of whole numbers")
    bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _OTHER_BITS.get(dtype)
    if bits is None:
        raise JsonError(f"{shown(name)} has the unknown dtype {shown(dtype)}")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * bits:
        wanted = math.prod(shape) * bits // 8
        raise JsonError(f"{shown(name)} has {end - begin:,} bytes, {dtype} {shown(shape)} needs {wanted:,}")
    return TensorInfo(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    """A list of whole numbers, none negative or beyond any file."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**53 for size in value)


_AGAIN = "Fetch or write this file again."


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise NibbleError(f"{path} can't be read: {error.strerror}.") from error


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


class MappedFolder:
    """The files of a folder, of which one is mapped at a time, and not for longer than it takes to read `MAPPED_BYTES`.

    A tensor that is handed out keeps its own mapping for as long as it lives.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name: str | None = None
        self._file: Any = None
        self._read = 0

    def file(self, name: str, nbytes: int) -> Any:
        """The file (safetensors' safe_open), of which the caller reads `nbytes` now."""
        if self._name != name or self._read >= MAPPED_BYTES:
            self.close()
            self._file = safe_open(self._folder / name, framework="pt")
            self._name = name
        self._read += nbytes
        return self._file

    def close(self) -> None:
        """Unmap the file. Reading maps it again."""
        self._name = self._file = None
        self._read = 0


class TensorWriter:
    """Writes one safetensors file from tensors whose shapes and dtypes are known beforehand.

    Every tensor is written whole or, along its dim 0, some rows at a time and in any order. The data goes to
    `path.partial`; `finish` flushes it to the disk and renames it, so a file named `path` is always whole.

    hashed: make the file's sha256 on the way. What is written in the order of `tensors` is never read for that; a
    tensor that is written before the ones that precede it is read back when they are there.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, hashed: bool = False
    ) -> None:
        self.path = path
        self._hash = hashlib.sha256() if hashed else None
        self._whole = 0  # everything before this offset is written (and hashed)
        self._ahead: dict[int, int] = {}  # what is written beyond that: begin to end
        self._partial = path.with_name(path.name + PARTIAL)
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        # Every tensor must be aligned to its own type in the mapped file: after those of a multiple of 8 bytes, which
        # nearly all have, come the others, wide types first.
        odd = {name for name, entry in self._tensors.items() if tensor_bytes(*entry) % 8}
        ordered = sorted(self._tensors, key=lambda name: -self._tensors[name][1].itemsize if name in odd else -9)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in ordered:
            shape, dtype = self._tensors[name]
            end = position + tensor_bytes(shape, dtype)
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            self._offsets[name] = position
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._offsets = {name: start + offset for name, offset in self._offsets.items()}
        self.size = start + position
        with disk_errors(self._partial):
            self._file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, tensor: Tensor, start: int | None = None) -> None:
        """Write tensor `name`: whole, or its rows `start`, `start` + 1 … of dim 0, as many as `tensor` has."""
        shape, dtype = self._tensors[name]
        expected = shape if start is None else (len(tensor), *shape[1:])
        if tuple(tensor.shape) != expected or tensor.dtype != dtype:
            raise ValueError(f"{name}: got {tuple(tensor.shape)} {tensor.dtype}, expected {expected} {dtype}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._write(data, self._offsets[name] + (start or 0) * tensor_bytes(shape[1:], dtype))

    def finish(self) -> str:
        """Flush and rename; returns the file's sha256 in hexadecimal ("" where none was asked for)."""
        if self._whole != self.size:
            gap = next(
                name
                for name, entry in self._tensors.items()
                if self._offsets[name] <= self._whole < self._offsets[name] + tensor_bytes(*entry)
            )
            raise ValueError(f"{self.path}: {gap} is not fully written")
        with disk_errors(self._partial):
            os.fsync(self._file)
        self._close()
        with disk_errors(self.path):
            self._partial.replace(self.path)
        sync_folder(self.path.parent)
        return self._hash.hexdigest() if self._hash is not None else ""

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Without a `finish` that succeeds, what was written is removed."""
        if self._file >= 0:
            self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        os.close(self._file)
        self._file = -1

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view, position = memoryview(data), offset
        if view and (offset < self._whole or offset in self._ahead):
            raise ValueError(f"{self.path}: the bytes at {offset:,} are written twice")
        with disk_errors(self._partial):
            while view:
                written = os.pwrite(self._file, view, position)
                view, position = view[written:], position + written
            if offset == self._whole:
                self._whole = position
                if self._hash is not None:
                    self._hash.update(data)
            elif position > offset:
                self._ahead[offset] = position
            while self._whole in self._ahead:
                end = self._ahead.pop(self._whole)
                while self._hash is not None and self._whole < end:
                    part = os.pread(self._file, min(_READ_AT_ONCE, end - self._whole), self._whole)
                    if not part:
                        raise OSError(errno.EIO, "it was cut short from outside")
                    self._hash.update(part)
                    self._whole += len(part)
                self._whole = end
