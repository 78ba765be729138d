"""nf4 and fp4: 4-bit values in blocks of 64, byte for byte as bitsandbytes makes them.

One matrix [out, in] of n = out·in values (of a stack [E, out, in], each expert is such a matrix):

    packed         uint8 [out, in/2]      two 4-bit codes a byte; the even element is in the high half
    absmax         [out, in/64]           scale of each block. float32, or with double quantisation uint8: an index into
                                          the dynamic map of 256 values (Dettmers, arXiv:1511.04561) …
    nested_absmax  float32 [⌈n/64/256⌉]   … times the scale of its 256 blocks
    nested_offset  float32 []             … plus the mean of the matrix's scales

    value = code[packed] · scale,   scale = absmax   or   map[absmax] · nested_absmax + nested_offset

Equals `functional.quantize_4bit(matrix, blocksize=64)` and `dequantize_4bit` of bitsandbytes. A matrix is handed over
in its own dtype; on CPU bitsandbytes converts it to float32 first, so bfloat16 weights give the same bytes before and
after a cast to float32. The mean is a parallel float32 sum: from 32768 blocks (2 million values) on, its last bit may
depend on the device and the number of threads, in bitsandbytes as here.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quant.common.devices import on_cpu
from quant.common.errors import NibbleError
from quant.kernels.choice import uses
from quant.kernels.dequantise import BLOCK, NESTED_BLOCK, dequantise_four_bit
from quant.storage import Storage, StorageSpec, TensorSpecs

# On CPU bitsandbytes quantises in plain torch, with some 20 bytes of workspace per value. Blocks are independent.
_QUANTISE_AT_ONCE = 1 << 20
# Its CUDA kernels count values in int32.
_DEQUANTISE_AT_ONCE = 1 << 30

_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class FourBitStorage(Storage):
    """nf4 or fp4; tensors and formula in the module's docstring.

    The last dimension is a multiple of 64, so that a block never crosses a row.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor

    @classmethod
    def check(cls, spec: StorageSpec, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
        super().check(spec, shape, dtype, name)
        if shape[-1] % BLOCK:
            raise NibbleError(
                f"{name}: {spec.kind} stores blocks of {BLOCK} values, but the rows of shape {list(shape)} have "
                f"{shape[-1]}\nChoose storage int8 or none."
            )

    @classmethod
    def tensor_specs(cls, spec: StorageSpec, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpecs:
        *experts, rows, columns = shape
        specs: TensorSpecs = {"packed": ((*experts, rows, columns // 2), torch.uint8)}
        scales = (*experts, rows, columns // BLOCK)
        if not spec.double_quant:
            return specs | {"absmax": (scales, torch.float32)}
        nested = math.ceil(rows * columns / BLOCK / NESTED_BLOCK)
        return specs | {
            "absmax": (scales, torch.uint8),
            "nested_absmax": ((*experts, nested), torch.float32),
            "nested_offset": (tuple(experts), torch.float32),
        }

    @classmethod
    def encode(cls, spec: StorageSpec, dense: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        ops = bitsandbytes_ops()
        rows, columns = dense.shape
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=dense.device)
        absmax = torch.empty(rows, columns // BLOCK, dtype=torch.float32, device=dense.device)
        step = max(1, _QUANTISE_AT_ONCE // columns)
        for start in range(0, rows, step):
            part = dense[start : start + step]
            part = part.float() if part.dtype == torch.float64 else part.contiguous()
            codes, scales = ops.quantize_4bit.default(part, BLOCK, spec.kind, torch.uint8)
            packed[start : start + step] = codes.view(-1, columns // 2)
            absmax[start : start + step] = scales.view(-1, columns // BLOCK)
        if not spec.double_quant:
            return {"packed": packed, "absmax": absmax}
        flat = absmax.view(-1)
        offset = flat.mean()
        codes, nested = ops.quantize_blockwise.default(flat - offset, dynamic_map(dense.device), NESTED_BLOCK)
        return {
            "packed": packed,
            "absmax": codes.view(absmax.shape),
            "nested_absmax": nested,
            "nested_offset": offset,
        }

    def dense(
        self, which: int | slice | None = None, *, dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        packed = self.packed
        out = self._result(which, dtype, out, packed.device)
        if not out.numel():
            return out
        if uses(dequantise_four_bit, packed.device):
            self._dense_at_once(which, out)
        else:
            _dequantise(self.kind, packed if which is None else packed[which], self._scales(which), out)
        return out

    def _dense_at_once(self, which: int | slice | None, out: Tensor) -> None:
        """With the kernel that decodes the scales too."""
        stack = len(self.shape) == 3

        def chosen(tensor: Tensor) -> Tensor:
            if not stack:
                return tensor[None]
            part = slice(which, which + 1) if isinstance(which, int) else which
            return (tensor if part is None else tensor[part]).contiguous()

        nested, offset = (
            (chosen(self.nested_absmax), chosen(self.nested_offset)) if self.spec.double_quant else (None, None)
        )
        dequantise_four_bit(
            chosen(self.packed), chosen(self.absmax), nested, offset,
            code(self.kind, out.device), dynamic_map(out.device),
            out=out.view(-1, *self.shape[-2:]),
        )  # fmt: skip

    def _scales(self, which: int | slice | None) -> Tensor:
        """float32 scales of `which`, row by row."""
        absmax = self.absmax if which is None else self.absmax[which]
        if not self.spec.double_quant:
            return absmax
        nested, offset = self.nested_absmax, self.nested_offset
        if which is not None:
            nested, offset = nested[which], offset[which]
        if offset.dim() == 0:
            return _decode_scales(absmax, nested).add_(offset)
        if absmax[0].numel() % NESTED_BLOCK == 0:
            return _decode_scales(absmax, nested).add_(offset[:, None, None])
        # A nested block ends with its expert, so the experts' blocks don't follow one another evenly.
        each = [_decode_scales(*pair) for pair in zip(absmax, nested, strict=True)]
        return torch.stack(each).add_(offset[:, None, None])


def _decode_scales(absmax: Tensor, nested: Tensor) -> Tensor:
    """map[absmax] · nested, float32 of absmax's shape: the first half of undoing double quantisation."""
    code = dynamic_map(absmax.device)
    absmax, nested = absmax.contiguous(), nested.contiguous()
    kernel = _cpu_kernel("cdequantize_blockwise_cpu_fp32") if on_cpu(absmax.device) else None
    if kernel is None:
        ops = bitsandbytes_ops()
        return ops.dequantize_blockwise.default(absmax, nested, code, NESTED_BLOCK, torch.float32)
    scales = torch.empty_like(absmax, dtype=torch.float32)
    kernel(*map(_pointer, (code, absmax, nested, scales)), _long(NESTED_BLOCK), _long(absmax.numel()))
    return scales


def _dequantise(kind: str, packed: Tensor, scales: Tensor, out: Tensor) -> None:
    """code[packed] · scales → out. packed [.., in/2], scales float32 [.., in/64], out contiguous [.., in]."""
    columns = out.shape[-1]
    rows = out.numel() // columns
    packed, scales = packed.contiguous(), scales.contiguous()
    kernel = _cpu_kernel(f"cdequantize_blockwise_cpu_{kind}_{_SUFFIX[out.dtype]}") if on_cpu(out.device) else None
    if kernel is not None:
        kernel(*map(_pointer, (packed, scales, out)), _long(BLOCK), _long(rows), _long(columns))
        return
    ops = bitsandbytes_ops()
    packed, scales, out = packed.view(rows, -1), scales.view(rows, -1), out.view(rows, columns)
    step = max(1, _DEQUANTISE_AT_ONCE // columns)
    for start in range(0, rows, step):
        part = out[start : start + step]
        arguments = (packed[start : start + step], scales[start : start + step], BLOCK, kind, part.shape, part.dtype)
        if on_cpu(out.device):
            part.copy_(ops.dequantize_4bit.default(*arguments))
        elif out.is_meta:
            # Nothing to write. bitsandbytes' `out` form compares a torch.Size with a list on meta, and always raises.
            ops.dequantize_4bit.default(*arguments)
        else:
            ops.dequantize_4bit.out(*arguments, out=part)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


_long = ctypes.c_longlong


@functools.cache
def _cpu_kernel(name: str) -> Callable[..., Any] | None:
    """A function of bitsandbytes' compiled library, or None if it was built without it.

    On CPU its torch operators have no `out=` form and take 1.3 to 3.5 times as long: 11 ms against 4 for an expert of
    [3072, 2048] in float32, 0.11 ms against 0.03 for one of [64, 64]. These are the functions that they call, in the
    way that they call them (bitsandbytes/backends/cpu/ops.py); a test compares the results.
    """
    import_bitsandbytes()
    from bitsandbytes.cextension import lib

    kernel = getattr(lib, name)
    # What isn't there is a Python function that raises when called.
    return kernel if hasattr(kernel, "argtypes") else None


@functools.cache
def code(kind: str, device: torch.device) -> Tensor:
    """The values of the sixteen codes of nf4 or fp4, float32 [16], as bitsandbytes decodes them on this device."""
    pairs = torch.arange(BLOCK // 2, device=device).remainder(8)
    packed = (32 * pairs + 2 * pairs + 1).to(torch.uint8)[None]  # 0x01, 0x23 … 0xEF
    values = torch.empty(1, BLOCK, dtype=torch.float32, device=device)
    _dequantise(kind, packed, torch.ones(1, 1, device=device), values)
    return values[0, :16].clone()


@functools.cache
def dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' signed dynamic 8-bit map, float32 [256], ascending."""
    import_bitsandbytes()
    from bitsandbytes.functional import create_dynamic_map

    with torch.device("cpu"):  # whatever default device the caller has set
        return create_dynamic_map().to(device)


@functools.cache
def bitsandbytes_ops() -> Any:
    """The namespace of bitsandbytes' torch operators."""
    import_bitsandbytes()
    return torch.ops.bitsandbytes


@functools.cache
def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes (slow: only where it is needed) without its advice to install the package `kernels`.

    On CPUs with AVX512-BF16 it logs at import that an optional kernel couldn't be loaded. That kernel is for inference
    (`gemv_4bit`) and is never called here, so the line would only send users looking for a fault. Other messages pass.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def keep(record: logging.LogRecord) -> bool:
        return "gemm_4bit_forward from kernels-community" not in str(record.msg)

    logger.addFilter(keep)
    try:
        import bitsandbytes
    finally:
        logger.removeFilter(keep)
    return bitsandbytes
