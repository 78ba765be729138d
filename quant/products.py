"""Matrix products: which number format a device multiplies fast, and products grouped by expert.

Shapes: n rows sorted by expert, c experts, `in` and `out` features of a weight [c, out, in].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.common.devices import on_cpu


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    features = torch.cpu.get_capabilities()
    return any(features.get(feature) for feature in ("avx512_bf16", "amx_bf16"))


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrices of `dtype` are multiplied on `device`: float32 or `dtype` itself.

    A bfloat16 product is a float32-accumulated product of bfloat16 values, rounded once at the end. A CPU without
    bfloat16 units emulates it 5 to 10 times slower than it multiplies float32, so there the operands are widened
    (exactly) and the result is rounded (once): the same numbers up to the order of summation.
    """
    if on_cpu(device) and dtype == torch.bfloat16 and not _cpu_multiplies_bfloat16():
        return torch.float32
    return dtype


def row_padding(dtype: torch.dtype, device: torch.device) -> int:
    """Row counts that vary from call to call are rounded up to a multiple of this, in products of `dtype`.

    On CPU, oneDNN builds one bfloat16 kernel per distinct shape, and building costs more than multiplying when every
    expert has another number of rows in every layer and step. Sixteen keeps the set of shapes small.
    """
    return 16 if on_cpu(device) and dtype == torch.bfloat16 else 1


P = ParamSpec("P")
R = TypeVar("R")
_has_autocast = functools.cache(torch.amp.is_autocast_available)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with torch.autocast switched off on the device of its first tensor.

    For what chooses the dtypes of its products itself: autocast would change some operands and leave the others.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                device = value.device.type
                if _has_autocast(device) and torch.is_autocast_enabled(device):
                    with torch.autocast(device, enabled=False):
                        return function(*args, **kwargs)
                break
        return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class Groups:
    """Where the rows of c experts, sorted by expert, end.

    ends: cumulative row counts, on the host. offsets: the same as int32 [c] on the rows' device, for grouped kernels;
    given together so that no product has to wait for a copy. One expert alone needs no offsets.
    """

    ends: tuple[int, ...]
    offsets: Tensor | None = None

    def parts(self) -> list[slice]:
        return [slice(start, stop) for start, stop in zip((0, *self.ends), self.ends, strict=False)]


# The three products of a linear layer whose rows are sorted by expert. A single expert is an ordinary product: on CPU,
# where a grouped product is a loop anyway, experts come one by one. Several go through one grouped kernel if it can
# take them: it wants rows of a multiple of 16 bytes.


def grouped_linear(rows: Tensor, weight: Tensor, groups: Groups, *, add_to: Tensor | None = None) -> Tensor:
    """rows [n, in] times each expert's weight [c, out, in] transposed: [n, out]; added to `add_to` when given."""
    return _grouped(rows, weight.transpose(1, 2), groups, add_to)


def grouped_linear_input(grad: Tensor, weight: Tensor, groups: Groups, *, add_to: Tensor | None = None) -> Tensor:
    """The gradient of :func:`grouped_linear` for its rows: grad [n, out] times weight [c, out, in]: [n, in]."""
    return _grouped(grad, weight, groups, add_to)


def grouped_linear_weight(grad: Tensor, rows: Tensor, groups: Groups) -> Tensor:
    """The gradient of :func:`grouped_linear` for its weight: grad [n, out], rows [n, in]: [c, out, in]."""
    if len(groups.ends) == 1:
        return torch.mm(grad.t(), rows).unsqueeze(0)
    if _aligned(grad) and _aligned(rows):
        return F.grouped_mm(grad.t(), rows, offs=groups.offsets)
    return torch.stack([torch.mm(grad[part].t(), rows[part]) for part in groups.parts()])


def _grouped(rows: Tensor, matrices: Tensor, groups: Groups, add_to: Tensor | None) -> Tensor:
    """rows [n, a] times matrices [c, a, b], each expert's rows with its own: [n, b]."""
    if len(groups.ends) == 1:
        return torch.mm(rows, matrices[0]) if add_to is None else add_to.addmm_(rows, matrices[0])
    if _aligned(rows) and matrices.shape[2] * rows.element_size() % 16 == 0:
        product = F.grouped_mm(rows, matrices, offs=groups.offsets)
    else:
        parts = zip(groups.parts(), matrices, strict=True)
        product = torch.cat([torch.mm(rows[part], matrix) for part, matrix in parts])
    return product if add_to is None else add_to.add_(product)


def _aligned(rows: Tensor) -> bool:
    return rows.stride(0) * rows.element_size() % 16 == 0
