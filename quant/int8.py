"""int8: every row scaled by its largest magnitude, as bitsandbytes does for LLM.int8() (arXiv:2208.07339, section 2.1).

    packed  int8 [.., out, in]      round(value · (127 / scale)), halves to even
    scale   float32 [.., out]       largest magnitude of the row ("SCB" in bitsandbytes' checkpoints)

    value = packed · scale / 127

Equals `functional.int8_vectorwise_quant` of the float32 matrix and `int8_vectorwise_dequant`. All arithmetic is float32
in plain torch operations (bitsandbytes' CUDA kernel takes float16 only), so that the bytes don't depend on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.common.devices import on_cpu
from quant.kernels.choice import uses
from quant.kernels.dequantise import INVERSE_127, dequantise_int8
from quant.storage import Storage, StorageSpec, TensorSpecs

# Float32 workspace, in values: on CPU about what the cache holds; elsewhere few kernels matter more (64 MiB).
_AT_ONCE_CPU = 1 << 19
_AT_ONCE = 1 << 24


class Int8Storage(Storage):
    """Row-wise int8; tensors and formula in the module's docstring."""

    packed: Tensor
    scale: Tensor

    @classmethod
    def tensor_specs(cls, spec: StorageSpec, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpecs:
        return {"packed": (tuple(shape), torch.int8), "scale": (tuple(shape[:-1]), torch.float32)}

    @classmethod
    def encode(cls, spec: StorageSpec, dense: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        rows, columns = dense.shape
        packed = torch.empty(rows, columns, dtype=torch.int8, device=dense.device)
        scale = torch.empty(rows, dtype=torch.float32, device=dense.device)
        step = _rows_at_once(dense)
        for start in range(0, rows, step):
            part = dense[start : start + step].float()
            largest = part.abs().amax(dim=1)
            # A row of zeros (or of values near the smallest float32) has no finite factor: its codes are 0.
            factor = 127.0 / largest
            factor = torch.where(torch.isfinite(factor), factor, 0.0)
            packed[start : start + step] = (part * factor[:, None]).round_()
            scale[start : start + step] = largest
        return {"packed": packed, "scale": scale}

    def dense(
        self, which: int | slice | None = None, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        packed, scale = self.packed, self.scale
        out = self._result(which, dtype, out, packed.device)
        if which is not None:
            packed, scale = packed[which], scale[which]
        if uses(dequantise_int8, out.device):
            dequantise_int8(packed.contiguous(), scale.contiguous(), out=out)
            return out
        columns = self.shape[-1]
        flat, packed, scale = out.view(-1, columns), packed.reshape(-1, columns), scale.reshape(-1, 1)
        rows, step = flat.shape[0], _rows_at_once(flat)
        if rows <= step:
            _dequantise(packed, scale, flat)
            return out
        for start in range(0, rows, step):
            part = slice(start, start + step)
            _dequantise(packed[part], scale[part], flat[part])
        return out


def _dequantise(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """packed · scale · (1/127) → out, in this order, in float32. packed [n, in], scale [n, 1], out [n, in]."""
    work = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    if on_cpu(out.device):
        # A product of mixed dtypes would convert into a second workspace.
        work.copy_(packed).mul_(scale)
    else:
        torch.mul(packed, scale, out=work)
    torch.mul(work, INVERSE_127, out=out)


def _rows_at_once(matrix: Tensor) -> int:
    return max(1, (_AT_ONCE_CPU if on_cpu(matrix.device) else _AT_ONCE) // matrix.shape[-1])
