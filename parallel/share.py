"""Arrays that one process has read, on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from parallel.world import World

Array = NDArray[Any]

_DTYPES = tuple(np.dtype(name) for name in ("bool", "uint8", "int32", "int64", "float32", "float64"))


def share_arrays(world: World, arrays: Sequence[Array] | None, message_bytes: int = 1 << 28) -> list[Array]:
    """The arrays of process 0, on every process: each of one dimension, of bool, uint8, int32, int64 or floats.

    The others pass None. All of them must call it; world.wait before it where process 0 is long in reading. The bytes
    go through host memory (gloo), whatever the device of the run, at most `message_bytes` at a time, so that no length
    needs more than 32 bits. Raises ValueError for other arrays, before anything is sent.
    """
    if world.first:
        if arrays is None or any(array.ndim != 1 or array.dtype not in _DTYPES for array in arrays):
            raise ValueError("process 0 shares arrays of one dimension, of bool, uint8, int32, int64 or floats")
    elif arrays is not None:
        raise ValueError("only process 0 has arrays to share")
    if world.size == 1:
        return list(arrays or ())
    kinds = [(_DTYPES.index(array.dtype), len(array)) for array in arrays or ()]
    count = torch.tensor(len(kinds))
    dist.broadcast(count, 0)
    header = torch.tensor(kinds, dtype=torch.int64) if world.first else torch.zeros(int(count), 2, dtype=torch.int64)
    header = header.view(int(count), 2)
    dist.broadcast(header, 0)
    shared = []
    for index, (kind, length) in enumerate(header.tolist()):
        array = (
            np.require(arrays[index], requirements=["C", "W"])
            if arrays is not None
            else np.empty(length, _DTYPES[kind])
        )
        for part in torch.from_numpy(array.view(np.uint8)).split(message_bytes):
            dist.broadcast(part, 0)
        shared.append(array)
    return shared
