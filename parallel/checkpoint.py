"""Tensors held by one process or several, to files and back, with torch's distributed checkpoint.

Every process writes the parts that it holds into safetensors files of its own; a tensor that all hold whole is written
by one of them. No tensor is gathered. Any number of processes reads the files, each the slices that it needs; an
ordinary safetensors file is read in the same way. Torch's DTensor isn't used: it would bring host tensors to the
mesh's device.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.parts import Cut
from quant.common.errors import NibbleError
from quant.common.files import disk_error

# A file is put together in memory before it is written: a new one is begun when this much would be exceeded.
_FILE_BYTES = 64 * 2**20


def save_parts(
    folder: Path,
    tensors: Mapping[str, Tensor],
    cuts: Mapping[str, Cut],
    group: dist.ProcessGroup | None = None,
) -> dict[str, dict[str, Any]]:
    """Write what this process holds into `folder`, flushed to the disk.

    tensors: by name, on any device; those named in `cuts` are parts, the others are the same on every process. The
    parts of all processes must make up the tensor; an empty one may be left out. All processes of `group` must call it
    (None: all there are; without a process group this one writes everything). Extra memory: a file's size, on the host,
    and as much again where the tensors are on a device; a file holds one tensor or up to 64 MiB of them.

    Returns size (bytes) and sha256 (hexadecimal, of the bytes on their way to the disk) of each file that this process
    wrote, by its name in `folder`. Raises NibbleError, the same on all processes, when one of them can't write.
    """
    held = {name: tensor.detach() for name, tensor in tensors.items() if name not in cuts or tensor.numel()}
    held = {name: tensor if tensor.is_contiguous() else tensor.contiguous() for name, tensor in held.items()}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    writer.fs = files = _HashingFileSystem()
    alone = not dist.is_initialized() or dist.get_world_size(group) == 1
    try:
        with warnings.catch_warnings():
            if alone:
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            planner = _SavePlanner(cuts)
            dcp.save(held, storage_writer=writer, planner=planner, process_group=group, no_dist=alone)
    except CheckpointException as error:
        rank, cause = _first_failure(error)
        if isinstance(cause, OSError):
            where = "" if alone else f"Process {rank} of {dist.get_world_size(group)}: "
            raise NibbleError(f"{where}{disk_error(cause, Path(cause.filename or folder))}") from error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from error
        raise RuntimeError(f"{folder} can't be written (process {rank}): {cause!r}") from error
    return files.written


def load_parts(folder: Path, tensors: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> None:
    """Fill `tensors` from the safetensors files in `folder`, those named in `cuts` with their part, the others whole.

    tensors: by name, of the shapes and dtypes that the files have (`saved_tensors`), on any device. Every process reads
    by itself; none waits for another. Raises NibbleError where a file can't be read.
    """
    held = {name: tensor.detach() for name, tensor in tensors.items() if tensor.numel()}
    if not held:
        return
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(
                held, storage_reader=HuggingFaceStorageReader(str(folder)), planner=_LoadPlanner(cuts), no_dist=True
            )
    except CheckpointException as error:
        raise NibbleError(f"{folder} can't be read: {_first_failure(error)[1]}.") from error


def saved_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every whole tensor in the safetensors files of `folder`, by name.

    An optimiser that has made no step has no tensors; a copy of a checkpoint may lack its empty folder.
    """
    if not folder.is_dir():
        return {}
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: (tuple(info.size), info.properties.dtype)
        for name, info in found.items()
        if isinstance(info, TensorStorageMetadata)
    }


class _HashingFileSystem(FileSystem):
    """Hands torch's writer its files. written: size and sha256 of those that are complete, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _HashedFile(path, mode) as file:
            yield file
        self.written[Path(path).name] = {"size": file.size, "sha256": file.sha256.hexdigest()}


class _HashedFile(io.FileIO):
    """A file that is written from its beginning to its end. Not buffered: torch's writer calls os.fsync on the file's
    number, which would leave out what is in Python's buffer."""

    def __init__(self, path: str | os.PathLike[str], mode: str) -> None:
        super().__init__(path, mode)
        self.size, self.sha256 = 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        while view:
            count = super().write(view)
            self.sha256.update(view[:count])
            self.size, view = self.size + count, view[count:]
        return memoryview(data).nbytes


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1 on, of each tensor. The first process's division counts for all."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > _FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += tensor.nbytes
    return numbers


def _first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    rank = min(error.failures)
    return rank, error.failures[rank][0]


def _chunk(tensor: Tensor, cut: Cut | None) -> tuple[torch.Size, ChunkStorageMetadata]:
    """The shape of the whole tensor, and the offsets of `tensor` in it."""
    offsets, shape = [0] * tensor.dim(), tensor.shape
    if cut is not None:
        offsets[cut.dim], shape = cut.start, torch.Size(cut.shape)
    return shape, ChunkStorageMetadata(torch.Size(offsets), tensor.shape)


class _SavePlanner(dcp.DefaultSavePlanner):
    """Gives every tensor the offsets of this part in the whole."""

    def __init__(self, cuts: Mapping[str, Cut]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._cuts = cuts

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self.state_dict.items():
            shape, chunk = _chunk(tensor, self._cuts.get(name))
            data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), shape)
            kind = WriteItemType.SHARD if name in self._cuts else WriteItemType.TENSOR
            items.append(WriteItem(MetadataIndex(name, chunk.offsets), kind, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn]


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Asks for the part of every tensor that this process holds."""

    def __init__(self, cuts: Mapping[str, Cut]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._cuts = cuts

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, tensor in self.state_dict.items():
            shape, chunk = _chunk(tensor, self._cuts.get(name))
            saved = self.metadata.state_dict_metadata[name]
            if not isinstance(saved, TensorStorageMetadata) or saved.size != shape:
                raise ValueError(f"{name} is saved as {saved}, wanted {list(shape)}")
            items += create_read_items_for_chunk_list(name, saved, [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        tensor = self.state_dict[index.fqn]
        assert isinstance(tensor, Tensor)
        return tensor
