"""How kernels see tensors whose last dimension is computed at once: as rows, some of which a program takes."""

from __future__ import annotations

from torch import Tensor

from quant.kernels.language import power_of_two

VALUES_AT_A_TIME = 2048  # of a program: 16 for each thread of four warps


def rows_of(x: Tensor) -> Tensor:
    """x [..., d] as [rows, d], a view where rows lie at equal distances, with values of a row side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def tile(columns: int) -> tuple[int, int, int]:
    """For whole rows: rows of a program, and columns as a power of two; and how many warps."""
    width = power_of_two(columns, 16)
    return max(1, VALUES_AT_A_TIME // width), width, min(max(4, width // 512), 16)
