"""Storage: one frozen matrix [out, in], or a stack of experts' matrices [E, out, in], as plain tensors.

The tensors of a Storage are ordinary `nn.Parameter(requires_grad=False)` whose dim 0 is the expert (of a stack) or the
row (of a matrix), so that they are saved, loaded, moved and sharded like any other parameter. For every expert they
hold exactly the bytes that bitsandbytes makes of that expert's matrix (quant/fourbit.py, quant/int8.py).

Shapes: E experts; out, in: rows and columns of a matrix, as in `torch.nn.functional.linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from quant.common.errors import NibbleError

Kind = Literal["none", "nf4", "fp4", "int8"]
TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]

# What bitsandbytes' kernels read and write.
QUANTISABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE_DTYPES = (*QUANTISABLE_DTYPES, torch.float64)


@dataclass(frozen=True)
class StorageSpec:
    """How frozen matrices are kept.

    kind: none (dense, in the model's dtype), nf4, fp4 or int8; another one raises NibbleError. double_quant: the scales
    of nf4 and fp4 are themselves kept in 8 bits (QLoRA, arXiv:2305.14314, section 3); always False for none and int8.
    """

    kind: Kind = "none"
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise NibbleError(f"unknown storage {self.kind!r}: choose one of {', '.join(get_args(Kind))}")
        if self.kind in ("none", "int8"):
            object.__setattr__(self, "double_quant", False)


class Storage(nn.Module):
    """One matrix [out, in] or stack of matrices [E, out, in]; see the module's docstring. `quant.kinds` makes them.

    spec, kind: how it is kept. shape: the dense shape. dtype: of `dense()` unless told otherwise.
    name: for messages; a model gives each of its storages the name of its module.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = QUANTISABLE_DTYPES

    def __init__(
        self,
        spec: StorageSpec,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        name: str = "weight",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.shape = tuple(shape)
        self.name = name
        self._dtype = dtype
        for key, (size, kept) in self.tensor_specs(spec, self.shape, dtype).items():
            tensor = torch.empty(size, dtype=kept, device=device)
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))

    # -- what a kind of storage defines

    @classmethod
    def tensor_specs(cls, spec: StorageSpec, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpecs:
        """Name → (shape, dtype) of the tensors that keep a dense `shape`, for writers that never build the module."""
        raise NotImplementedError

    @classmethod
    def encode(cls, spec: StorageSpec, dense: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of one checked matrix [out, in], on its device (they may share memory with it)."""
        raise NotImplementedError

    def dense(
        self, which: int | slice | None = None, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The dense values: all of them ([out, in] or [E, out, in]), expert `which` ([out, in]) or a slice of c experts
        ([c, out, in], step 1).

        dtype: float32, bfloat16 or float16; by default that of `out`, else of the storage. The products are made in
        float32 and rounded once. `out`: a contiguous tensor of that shape and dtype to write into (ValueError if it
        isn't). NibbleError when `which` is out of range. Never waits for the device.
        """
        raise NotImplementedError

    # -- what they share

    @classmethod
    def check(cls, spec: StorageSpec, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
        """Raises NibbleError, naming the matrix, for a shape or a dtype of `dense()` that this kind can't keep."""
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise NibbleError(f"{name}: expected a shape [out, in] or [experts, out, in], got {list(shape)}")
        if dtype not in cls.dtypes:
            raise NibbleError(f"{name}: {spec.kind} storage can't give {dtype}: choose float32, bfloat16 or float16")

    @classmethod
    @torch.no_grad()
    def quantised(cls, spec: StorageSpec, dense: Tensor, dtype: torch.dtype, name: str) -> dict[str, Tensor]:
        """`encode` of a matrix that is checked first; see `quant.kinds.quantise`."""
        if dense.dim() != 2:
            raise NibbleError(f"{name}: expected one matrix [out, in], got shape {list(dense.shape)}")
        if dense.dtype not in DENSE_DTYPES:
            raise NibbleError(
                f"{name}: expected float32, bfloat16, float16 or float64, got {dense.dtype}\n"
                "Weights that are already quantised must be turned into a floating dtype first."
            )
        cls.check(spec, tuple(dense.shape), dtype, name)
        if not all_finite(dense):
            count = int((~torch.isfinite(dense)).sum())
            raise NibbleError(
                f"{name}: {count} of its {dense.numel()} values are inf or NaN and would spoil their neighbours' "
                "scales\nThe checkpoint is damaged or overflowed when it was saved: get it again."
            )
        return cls.encode(spec, dense, dtype)

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def numel(self) -> int:
        """Number of dense parameters."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.parameters())

    @torch.no_grad()
    def load_dense(self, dense: Tensor, which: int | None = None) -> None:
        """Replace, in place, expert `which` of a stack (dense [out, in]) or everything (dense of this storage's shape).

        Quantised on the device where `dense` lies, one matrix at a time, then copied over. dense: float32, bfloat16,
        float16 or float64. NibbleError for another shape or dtype, inf or NaN, or `which` out of range.
        """
        expected = self._picked_shape(which)
        if isinstance(which, slice) or tuple(dense.shape) != expected:
            whole = self.name if which is None else f"{self.name}, expert {which}"
            raise NibbleError(f"{whole}: expected a matrix of shape {list(expected)}, got {list(dense.shape)}")
        if which is None and len(self.shape) == 3:
            for expert in range(self.shape[0]):
                self._replace(dense[expert], expert)
        else:
            self._replace(dense, which)

    def _replace(self, matrix: Tensor, which: int | None) -> None:
        name = self.name if which is None else f"{self.name}, expert {which}"
        for key, tensor in self.quantised(self.spec, matrix, self.dtype, name).items():
            target = self.get_parameter(key)
            (target if which is None else target[which]).copy_(tensor)

    def _picked_shape(self, which: int | slice | None) -> tuple[int, ...]:
        """The dense shape of `which`. Indices that Python would wrap or clamp are errors."""
        shape = self.shape
        if which is None:
            return shape
        if len(shape) == 3:
            if isinstance(which, slice):
                start = 0 if which.start is None else which.start
                stop = shape[0] if which.stop is None else which.stop
                if which.step in (None, 1) and 0 <= start <= stop <= shape[0]:
                    return (stop - start, *shape[1:])
            elif 0 <= which < shape[0]:
                return shape[1:]
            raise NibbleError(f"{self.name}: no expert {which}: it has experts 0 to {shape[0] - 1} (slices: step 1)")
        raise NibbleError(f"{self.name}: no expert {which}: it is a single matrix; leave `which` out")

    def _result(
        self, which: int | slice | None, dtype: torch.dtype | None, out: Tensor | None, device: torch.device
    ) -> Tensor:
        """The tensor that `dense` fills: `out`, checked because it is written through a raw pointer, or a new one."""
        shape = self._picked_shape(which)
        if out is None:
            dtype = self.dtype if dtype is None else dtype
            if dtype not in self.dtypes:
                raise ValueError(f"{self.name}: can't give {dtype}")
            return torch.empty(shape, dtype=dtype, device=device)
        if out.shape != shape or (dtype is not None and dtype != out.dtype) or out.dtype not in self.dtypes:
            wanted = f"{list(shape)} {self.dtype if dtype is None else dtype}"
            raise ValueError(f"{self.name}: out is {list(out.shape)} {out.dtype}, but {wanted} is wanted")
        if out.device != device or not out.is_contiguous():
            raise ValueError(f"{self.name}: out must be contiguous and on {device}")
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Storage:
        """`to`, `bfloat16`, `cuda` … of a module end here. They may move packed tensors and scales but must not cast
        them: a scale rounded to bfloat16 would silently be another weight. A cast changes the dtype of `dense()`.
        """
        dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        if dtype not in self.dtypes:
            raise NibbleError(f"{self.name}: {self.kind} can't become {dtype}: choose float32, bfloat16 or float16")

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        self._dtype = dtype
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        # `copy_` would cast, and assigning would take any dtype: both would load other weights without a word.
        for key, parameter in self._parameters.items():
            given = state_dict.get(prefix + key)
            if (
                parameter is not None
                and isinstance(given, Tensor)
                and given.dtype not in self._loadable(parameter.dtype)
            ):
                lists[-1].append(f"{prefix}{key} is {given.dtype}, but {self.kind} storage keeps {parameter.dtype}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _loadable(self, kept: torch.dtype) -> tuple[torch.dtype, ...]:
        return (kept,)

    def extra_repr(self) -> str:
        double = ", double_quant" if self.spec.double_quant else ""
        return f"{self.kind}{double}, {list(self.shape)}, {self.dtype}"


class DenseStorage(Storage):
    """Not quantised. Tensor: value [.., out, in]. `requires_grad` may be switched on (full fine-tune).

    Without `out`, `dense` returns the parameter or a view of it when the dtype is the same: don't write into it.
    """

    dtypes = DENSE_DTYPES
    value: nn.Parameter

    @classmethod
    def tensor_specs(cls, spec: StorageSpec, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpecs:
        return {"value": (tuple(shape), dtype)}

    @classmethod
    def encode(cls, spec: StorageSpec, dense: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"value": dense.to(dtype)}

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def dense(
        self, which: int | slice | None = None, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        value = self.value
        if out is not None:
            return self._result(which, dtype, out, value.device).copy_(value if which is None else value[which])
        self._picked_shape(which)
        picked = value if which is None else value[which]
        return picked if dtype is None else picked.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Storage:
        return nn.Module._apply(self, fn, recurse)

    def _loadable(self, kept: torch.dtype) -> tuple[torch.dtype, ...]:
        return DENSE_DTYPES


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is inf or NaN. Makes no mask: `isfinite` needs 2.5 times an embedding's bfloat16 bytes."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
