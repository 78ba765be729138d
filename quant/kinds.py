"""Which class keeps which kind of storage, and making one.

Shapes: E experts; out, in: rows and columns of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.fourbit import FourBitStorage
from quant.int8 import Int8Storage
from quant.storage import DenseStorage, Kind, Storage, StorageSpec, TensorSpecs

STORAGES: dict[Kind, type[Storage]] = {
    "none": DenseStorage,
    "nf4": FourBitStorage,
    "fp4": FourBitStorage,
    "int8": Int8Storage,
}


def new_storage(
    spec: StorageSpec, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, name: str
) -> Storage:
    """An empty Storage (`torch.empty` tensors; device may be "meta") for a dense shape [out, in] or [E, out, in].

    name: the matrix's name in messages. Raises NibbleError, naming it, for a shape or dtype that `spec` can't keep.
    """
    storage = STORAGES[spec.kind]
    storage.check(spec, shape, dtype, name)
    return storage(spec, shape, dtype, device, name)


def storage_tensors(spec: StorageSpec, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> TensorSpecs:
    """Name → (shape, dtype) of the tensors of `new_storage` with the same arguments; raises as it does."""
    storage = STORAGES[spec.kind]
    storage.check(spec, shape, dtype, name)
    return storage.tensor_specs(spec, tuple(shape), dtype)


def quantise(spec: StorageSpec, dense: Tensor, dtype: torch.dtype, *, name: str = "matrix") -> dict[str, Tensor]:
    """The tensors of one matrix [out, in], named and shaped as those of `new_storage(spec, dense.shape, dtype, …)`.

    dense: float32, bfloat16, float16 or float64, on any device (the result lies there too). For `none` the result
    may share memory with it. Raises NibbleError, naming `name`, for another dtype or shape and for inf or NaN.
    """
    return STORAGES[spec.kind].quantised(spec, dense, dtype, name)
