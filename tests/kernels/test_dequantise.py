"""The dequantisation kernels against bitsandbytes: the same bits."""

from __future__ import annotations

import pytest
import torch

from quant.fourbit import code, dynamic_map
from quant.kernels.choice import using
from quant.kinds import new_storage, quantise
from quant.storage import Storage, StorageSpec

KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)]


def stored(kind: str, double_quant: bool, shape: tuple[int, ...]) -> Storage:
    spec = StorageSpec(kind, double_quant)  # type: ignore[arg-type]
    storage = new_storage(spec, shape, torch.float32, "cpu", "weight")
    generator = torch.Generator().manual_seed(1)
    matrices = shape[0] if len(shape) == 3 else 1
    for matrix in range(matrices):
        dense = torch.randn(shape[-2:], generator=generator)
        for name, tensor in quantise(spec, dense, torch.float32).items():
            whole = storage.get_parameter(name).data
            (whole[matrix] if len(shape) == 3 else whole).copy_(tensor)
    return storage


@pytest.mark.parametrize(("kind", "double_quant"), KINDS)
@pytest.mark.parametrize("shape", [(3, 40, 192), (24, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bits_of_bitsandbytes(kind: str, double_quant: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    storage = stored(kind, double_quant, shape)
    which = [None] if len(shape) == 2 else [None, 1, slice(1, shape[0]), slice(0, 0)]
    for part in which:
        right = storage.dense(part, dtype=dtype)
        with using(("dequantise_four_bit", "dequantise_int8")):
            given = storage.dense(part, dtype=dtype)
        assert torch.equal(given, right), part


def test_the_codes_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.backends.utils import CODE

    for kind in ("nf4", "fp4"):
        torch.testing.assert_close(code(kind, torch.device("cpu")), CODE[kind].cpu(), rtol=0, atol=1e-4)
    assert dynamic_map(torch.device("cpu")).shape == (256,)
