"""Row-wise int8 against bitsandbytes' int8_vectorwise_quant and int8_vectorwise_dequant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.fourbit import import_bitsandbytes
from quant.kinds import new_storage, quantise, storage_tensors
from quant.storage import Storage, StorageSpec

INT8 = StorageSpec("int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bnb():
    import_bitsandbytes()
    import bitsandbytes.functional

    return bitsandbytes.functional


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian with a row of zeros, an outlier, and a row whose codes lie halfway between integers."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix[..., 1, :] = 0.0
    matrix[..., 2, 3] = 5.0
    matrix[..., 3, :] = torch.arange(shape[-1]) % 127 + 0.5
    matrix[..., 3, 0] = -127.0
    return matrix.to(dtype)


def stored(dense: Tensor, dtype: torch.dtype = torch.bfloat16) -> Storage:
    storage = new_storage(INT8, tuple(dense.shape), dtype, "cpu", "w")
    storage.load_dense(dense)
    return storage


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", [(12, 128), (37, 50)])
def test_bytes(bnb, source, shape):
    stack = weights(3, *shape, dtype=source)
    storage = stored(stack)
    for e in range(3):
        packed, scale, _ = bnb.int8_vectorwise_quant(stack[e].float())
        for tensors in (
            {key: value[e] for key, value in storage.named_parameters()},
            dict(stored(stack[e]).named_parameters()),
            quantise(INT8, stack[e], torch.bfloat16),
        ):
            assert torch.equal(tensors["packed"], packed)
            assert torch.equal(tensors["scale"], scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_equals_bitsandbytes_bit_for_bit(bnb, dtype):
    stack = weights(4, 37, 50)
    storage = stored(stack)
    expected = torch.stack(
        [bnb.int8_vectorwise_dequant(*bnb.int8_vectorwise_quant(matrix)[:2]).to(dtype) for matrix in stack]
    )
    assert torch.equal(storage.dense(dtype=dtype), expected)
    assert torch.equal(stored(stack[1]).dense(dtype=dtype), expected[1])
    for which in (0, 3, slice(1, 3), slice(None), slice(2, 2), None):
        picked = expected if which is None else expected[which]
        assert torch.equal(storage.dense(which, dtype=dtype), picked)
        out = torch.full(picked.shape, torch.nan, dtype=dtype)
        assert storage.dense(which, out=out) is out
        assert torch.equal(out, picked)


def test_working_in_parts_changes_nothing(monkeypatch):
    stack = weights(3, 37, 50)
    whole = stored(stack)
    values = whole.dense()
    monkeypatch.setattr("quant.int8._AT_ONCE_CPU", 7 * 50)
    parts = stored(stack)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert torch.equal(parts.dense(), values)
    assert torch.equal(parts.dense(slice(1, 3), dtype=torch.float32), whole.dense(dtype=torch.float32)[1:3])


def test_rows_too_small_to_scale_become_zero():
    matrix = torch.full((2, 64), 1e-40)
    storage = stored(torch.cat([matrix, torch.ones(1, 64)]), torch.float32)
    assert torch.equal(storage.dense(), torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, 64))


def test_size_and_names():
    storage = new_storage(INT8, (3, 32, 48), torch.bfloat16, "cpu", "w")
    assert storage.nbytes == storage.numel * (1 + 4 / 48)
    assert storage_tensors(INT8, (3, 32, 48), torch.bfloat16, "w") == {
        "packed": ((3, 32, 48), torch.int8),
        "scale": ((3, 32), torch.float32),
    }


def test_bitsandbytes_loads_a_matrix(bnb):
    from bitsandbytes.nn import Linear8bitLt

    storage = stored(weights(32, 64))
    layer = Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).to("cpu")
    packed, scale = storage.get_parameter("packed"), storage.get_parameter("scale")
    layer.load_state_dict({"weight": packed, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)})
    assert torch.equal(
        bnb.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB), storage.dense(dtype=torch.float32)
    )
