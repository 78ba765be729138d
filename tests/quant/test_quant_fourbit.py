"""nf4 and fp4 against bitsandbytes: bytes, scales, dequantised values, size, and loading by bitsandbytes itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quant.fourbit import FourBitStorage, _cpu_kernel, dynamic_map, import_bitsandbytes
from quant.kinds import new_storage, quantise, storage_tensors
from quant.storage import Storage, StorageSpec

KINDS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16)
# 24 blocks (less than one nested block), 300 (one and a bit), 512 (two whole ones).
MATRICES = ((12, 128), (100, 192), (64, 512))
STORAGES = list(itertools.product(KINDS, (True, False)))


@pytest.fixture(scope="module")
def bnb():
    import_bitsandbytes()
    import bitsandbytes.functional

    return bitsandbytes.functional


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gaussian, with what rounding and scaling trip over: a row of zeros, an outlier, a block of equal values."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    matrix[..., 1, :] = 0.0
    matrix[..., 2, 5] = 3.0
    matrix[..., 3, :64] = -0.25
    return matrix.to(dtype)


def stored(kind: str, double: bool, dense: Tensor, dtype: torch.dtype = torch.bfloat16) -> Storage:
    storage = new_storage(StorageSpec(kind, double), tuple(dense.shape), dtype, "cpu", "w")
    storage.load_dense(dense)
    return storage


def reference(bnb, kind: str, double: bool, matrix: Tensor):
    """(packed [out, in/2], QuantState) of one matrix."""
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=double, quant_type=kind)
    return packed.view(matrix.shape[0], -1), state


def dequantised(bnb, kind: str, double: bool, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    packed, state = reference(bnb, kind, double, matrix)
    state.dtype = dtype
    return bnb.dequantize_4bit(packed.view(-1, 1), state)


def assert_same_tensors(tensors: dict[str, Tensor], packed: Tensor, state, double: bool) -> None:
    assert torch.equal(tensors["packed"], packed)
    assert tensors["absmax"].dtype == state.absmax.dtype
    assert torch.equal(tensors["absmax"].reshape(-1), state.absmax)
    if double:
        assert torch.equal(tensors["nested_absmax"], state.state2.absmax)
        assert torch.equal(tensors["nested_offset"], state.offset)
    else:
        assert set(tensors) == {"packed", "absmax"}


@pytest.mark.parametrize(("kind", "double"), STORAGES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_matrix_bytes(bnb, kind, double, source, shape):
    matrix = weights(*shape, dtype=source)
    packed, state = reference(bnb, kind, double, matrix)
    assert_same_tensors(dict(stored(kind, double, matrix).named_parameters()), packed, state, double)
    assert_same_tensors(quantise(StorageSpec(kind, double), matrix, torch.bfloat16), packed, state, double)


@pytest.mark.parametrize(("kind", "double"), STORAGES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", MATRICES)
def test_every_expert_has_the_bytes_of_its_own_matrix(bnb, kind, double, source, shape):
    stack = weights(3, *shape, dtype=source)
    storage = stored(kind, double, stack)
    for e in range(3):
        tensors = {key: value[e] for key, value in storage.named_parameters()}
        assert_same_tensors(tensors, *reference(bnb, kind, double, stack[e]), double)


@pytest.mark.parametrize(("kind", "double"), STORAGES)
@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_dense_equals_bitsandbytes_bit_for_bit(bnb, kind, double, shape, dtype):
    stack = weights(4, *shape, dtype=torch.bfloat16)
    storage = stored(kind, double, stack)
    expected = torch.stack([dequantised(bnb, kind, double, matrix, dtype) for matrix in stack])

    assert torch.equal(storage.dense(dtype=dtype), expected)
    for e in range(4):
        assert torch.equal(storage.dense(e, dtype=dtype), expected[e])
    for part in (slice(1, 3), slice(None, 2), slice(3, None), slice(None), slice(2, 2)):
        assert torch.equal(storage.dense(part, dtype=dtype), expected[part])
        out = torch.full(expected[part].shape, torch.nan, dtype=dtype)
        assert storage.dense(part, out=out) is out
        assert torch.equal(out, expected[part])
    out = torch.full(shape, torch.nan, dtype=dtype)
    assert storage.dense(2, out=out) is out
    assert torch.equal(out, expected[2])
    out = torch.full(expected.shape, torch.nan, dtype=dtype)
    assert torch.equal(storage.dense(dtype=dtype, out=out), expected)

    matrix = stored(kind, double, stack[0])
    out = torch.full(shape, torch.nan, dtype=dtype)
    assert torch.equal(matrix.dense(dtype=dtype), expected[0])
    assert torch.equal(matrix.dense(out=out), expected[0])


@pytest.mark.parametrize(("kind", "double"), STORAGES)
def test_dense_through_the_torch_operators(bnb, kind, double, monkeypatch):
    """The path of a bitsandbytes without its compiled library, and (but for `.out`) of CUDA."""
    stack = weights(3, 100, 192)
    storage = stored(kind, double, stack)
    expected = storage.dense()
    assert _cpu_kernel("cdequantize_blockwise_cpu_fp32") is not None
    assert _cpu_kernel("no_such_kernel") is None
    monkeypatch.setattr("quant.fourbit._cpu_kernel", lambda name: None)
    monkeypatch.setattr("quant.fourbit._DEQUANTISE_AT_ONCE", 7 * 192)
    assert torch.equal(storage.dense(), expected)
    assert torch.equal(storage.dense(1), expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_compiled_functions_are_those_that_are_called_by_address(bnb, kind, dtype):
    """quant/fourbit.py calls them as bitsandbytes' own CPU operators do; nothing but this test would see a change."""
    suffix = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    name, found = f"cdequantize_blockwise_cpu_{kind}_{suffix}", import_bitsandbytes().__version__
    changed = (
        f"bitsandbytes {found}: {name} (or cdequantize_blockwise_cpu_fp32) is gone or works otherwise. Compare "
        "_dequantise and _decode_scales in quant/fourbit.py with the calls in bitsandbytes/backends/cpu/ops.py."
    )
    for symbol in (name, "cdequantize_blockwise_cpu_fp32"):
        kernel = _cpu_kernel(symbol)
        assert kernel is not None and kernel.argtypes is None, changed
    storage, rows, columns = stored(kind, True, weights(100, 192)), 100, 192
    guarded = torch.full((rows + 1, columns), 7.0, dtype=dtype)  # a call with sizes misread writes beyond its rows
    storage.dense(out=guarded[:rows])
    ops, scales = torch.ops.bitsandbytes, storage._scales(None)
    nested = ops.dequantize_blockwise(
        storage.absmax, storage.nested_absmax, dynamic_map(torch.device("cpu")), 256, torch.float32
    )
    assert torch.equal(scales, nested + storage.nested_offset), changed
    public = ops.dequantize_4bit(storage.packed, scales, 64, kind, (rows, columns), dtype)
    assert torch.equal(guarded[:rows], public) and bool((guarded[rows:] == 7.0).all()), changed


@pytest.mark.parametrize(("kind", "double"), STORAGES)
def test_quantising_in_parts_changes_nothing(bnb, kind, double, monkeypatch):
    matrix = weights(100, 192, dtype=torch.bfloat16)
    whole = quantise(StorageSpec(kind, double), matrix, torch.bfloat16)
    monkeypatch.setattr("quant.fourbit._QUANTISE_AT_ONCE", 7 * 192)
    parts = quantise(StorageSpec(kind, double), matrix, torch.bfloat16)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize(("kind", "double"), STORAGES)
def test_a_large_matrix_is_the_same_in_parts(bnb, kind, double):
    """More values than are quantised at once; a mean that torch sums in several threads."""
    matrix = weights(1100, 2048, dtype=torch.bfloat16)
    storage = stored(kind, double, matrix)
    packed, state = reference(bnb, kind, double, matrix)
    assert_same_tensors(dict(storage.named_parameters()), packed, state, double)
    assert torch.equal(storage.dense(), bnb.dequantize_4bit(packed.view(-1, 1), state))


def test_source_layout_and_dtype_do_not_matter():
    matrix = weights(128, 128)
    for spec in (StorageSpec("nf4"), StorageSpec("fp4", False)):
        expected = quantise(spec, matrix, torch.float32)
        strided = torch.empty(128, 256)[:, ::2].copy_(matrix)
        for source in (matrix.double(), strided, matrix.t().contiguous().t()):
            given = quantise(spec, source, torch.float32)
            assert all(torch.equal(given[key], expected[key]) for key in expected)
        rounded = matrix.bfloat16()
        pair = quantise(spec, rounded, torch.float32), quantise(spec, rounded.float(), torch.float32)
        assert all(torch.equal(pair[0][key], pair[1][key]) for key in expected)


def test_load_dense_replaces_one_expert():
    stack = weights(3, 64, 128)
    storage = stored("nf4", True, stack)
    before = storage.dense().clone()
    pointers = [parameter.data_ptr() for parameter in storage.parameters()]
    other = weights(64, 128, seed=1)
    storage.load_dense(other, 1)
    assert [parameter.data_ptr() for parameter in storage.parameters()] == pointers
    assert torch.equal(storage.dense(1), stored("nf4", True, other).dense())
    assert torch.equal(storage.dense(0), before[0])
    assert torch.equal(storage.dense(2), before[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [None, 5])
def test_bytes_per_parameter(kind, experts):
    lead = () if experts is None else (experts,)
    count = experts or 1
    double = new_storage(StorageSpec(kind), (*lead, 256, 512), torch.bfloat16, "cpu", "w")
    assert double.numel == count * 256 * 512
    assert double.nbytes == double.numel * (0.5 + 1 / 64 + 4 / (64 * 256)) + 4 * count
    single = new_storage(StorageSpec(kind, False), (*lead, 256, 512), torch.bfloat16, "cpu", "w")
    assert single.nbytes == single.numel * (0.5 + 4 / 64)


def test_tensor_names_and_shapes():
    assert storage_tensors(StorageSpec("nf4"), (3, 100, 192), torch.bfloat16, "w") == {
        "packed": ((3, 100, 96), torch.uint8),
        "absmax": ((3, 100, 3), torch.uint8),
        "nested_absmax": ((3, 2), torch.float32),
        "nested_offset": ((3,), torch.float32),
    }
    assert storage_tensors(StorageSpec("fp4"), (100, 192), torch.bfloat16, "w") == {
        "packed": ((100, 96), torch.uint8),
        "absmax": ((100, 3), torch.uint8),
        "nested_absmax": ((2,), torch.float32),
        "nested_offset": ((), torch.float32),
    }
    assert storage_tensors(StorageSpec("fp4", False), (3, 100, 192), torch.bfloat16, "w") == {
        "packed": ((3, 100, 96), torch.uint8),
        "absmax": ((3, 100, 3), torch.float32),
    }


@pytest.mark.parametrize(("kind", "double"), STORAGES)
@pytest.mark.parametrize("shape", MATRICES)
def test_bitsandbytes_loads_an_expert(bnb, kind, double, shape):
    """Our tensors, under the names of bitsandbytes' checkpoints, through its own loader and layer."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    storage = stored(kind, double, weights(2, *shape))
    assert isinstance(storage, FourBitStorage)
    state = {
        "absmax": storage.absmax[1].reshape(-1),
        "quant_map": bnb.get_4bit_type(kind, device="cpu"),
        "quant_type": kind,
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": shape,
    }
    if double:
        state |= {
            "nested_absmax": storage.nested_absmax[1],
            "nested_quant_map": bnb.create_dynamic_map(),
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": storage.nested_offset[1].item(),
        }
    packed = storage.packed[1].reshape(-1, 1)
    loaded = bnb.QuantState.from_dict(dict(state), device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(packed, loaded), storage.dense(1))

    file = bnb.QuantState.from_dict(dict(state), device=torch.device("cpu")).as_dict(packed=True)
    layer = Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.float32, quant_type=kind)
    layer.weight = Params4bit.from_prequantized(packed, file, device="cpu")
    inputs = torch.randn(5, shape[1])
    assert torch.equal(layer(inputs), inputs @ storage.dense(1, dtype=torch.float32).t())
