"""What every Storage shares: creation, moving and casting, state dicts, messages; and that importing stays quiet."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from quant.common.errors import NibbleError
from quant.fourbit import dynamic_map, import_bitsandbytes
from quant.kinds import new_storage, quantise, storage_tensors
from quant.storage import Storage, StorageSpec

ROOT = Path(__file__).resolve().parents[2]
SPECS = [
    StorageSpec("none"),
    StorageSpec("nf4"),
    StorageSpec("nf4", double_quant=False),
    StorageSpec("fp4"),
    StorageSpec("int8"),
]
QUANTISED = SPECS[1:]


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def stored(spec: StorageSpec, dense: Tensor, dtype: torch.dtype = torch.float32) -> Storage:
    storage = new_storage(spec, tuple(dense.shape), dtype, "cpu", "layer.weight")
    storage.load_dense(dense)
    return storage


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(32, 64), (3, 32, 64)])
def test_tensors_are_plain_frozen_parameters_as_announced(spec, shape):
    storage = new_storage(spec, shape, torch.bfloat16, "cpu", "w")
    announced = storage_tensors(spec, shape, torch.bfloat16, "w")
    found = dict(storage.named_parameters())
    assert {key: (tuple(t.shape), t.dtype) for key, t in found.items()} == announced
    assert all(type(t) is nn.Parameter and not t.requires_grad for t in found.values())
    assert not list(storage.buffers())
    one = quantise(spec, weights(*shape[-2:]), torch.bfloat16)
    assert {key: (tuple(t.shape), t.dtype) for key, t in one.items()} == storage_tensors(
        spec, shape[-2:], torch.bfloat16, "w"
    )
    assert (storage.shape, storage.kind, storage.dtype) == (shape, spec.kind, torch.bfloat16)
    assert storage.numel == torch.Size(shape).numel()


@pytest.mark.parametrize("spec", SPECS)
def test_meta_device_then_real_tensors(spec):
    full = stored(spec, weights(3, 32, 64))
    empty = new_storage(spec, (3, 32, 64), torch.float32, "meta", "w")
    assert all(t.is_meta for t in empty.parameters())
    assert empty.nbytes == full.nbytes
    assigned = new_storage(spec, (3, 32, 64), torch.float32, "meta", "w")
    assigned.load_state_dict(full.state_dict(), assign=True)
    empty.to_empty(device="cpu")
    empty.load_state_dict(full.state_dict())
    for storage in (empty, assigned):
        assert torch.equal(storage.dense(), full.dense())
        assert not any(t.requires_grad for t in storage.parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_the_default_device_does_not_matter(spec):
    dynamic_map.cache_clear()
    dense = weights(3, 32, 64)
    with torch.device("meta"):
        storage = stored(spec, dense)
        values = storage.dense(1)
        empty = new_storage(spec, (3, 32, 64), torch.float32, "meta", "w").dense(1)
    assert torch.equal(values, stored(spec, dense).dense(1))
    assert empty.is_meta
    assert empty.shape == (32, 64)


@pytest.mark.parametrize("spec", SPECS)
def test_state_dict_round_trip_inside_a_model(spec):
    def model(dense: Tensor) -> nn.Module:
        linear = nn.Module()
        linear.weight = stored(spec, dense)
        return linear

    source, target = model(weights(32, 64)), model(torch.zeros(32, 64))
    state = source.state_dict()
    assert set(state) == {f"weight.{key}" for key in storage_tensors(spec, (32, 64), torch.float32, "w")}
    target.load_state_dict(state)
    assert torch.equal(target.weight.dense(), source.weight.dense())


@pytest.mark.parametrize("spec", QUANTISED)
@pytest.mark.parametrize(
    "cast", [lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16), lambda m: m.half().bfloat16()]
)
def test_casting_a_model_never_rounds_scales(spec, cast):
    storage = stored(spec, weights(3, 32, 64))
    before = {key: t.clone() for key, t in storage.named_parameters()}
    values = storage.dense()
    assert cast(nn.Sequential(storage))[0] is storage
    for key, tensor in storage.named_parameters():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key])
    assert storage.dtype == torch.bfloat16
    assert torch.equal(storage.dense(), values.bfloat16())
    assert storage.float().dense().dtype == torch.float32
    assert torch.equal(storage.dense(), values)


def test_dense_storage_follows_a_cast():
    storage = stored(StorageSpec("none"), weights(32, 64))
    values = storage.dense().clone()
    storage.bfloat16()
    assert storage.dtype == storage.dense().dtype == torch.bfloat16
    assert torch.equal(storage.dense(), values.bfloat16())


@pytest.mark.parametrize("spec", QUANTISED)
def test_casting_to_what_cannot_be_given_is_an_error(spec):
    storage = stored(spec, weights(32, 64))
    with pytest.raises(NibbleError, match=rf"layer\.weight: {spec.kind} can't become torch\.float64: choose float32"):
        storage.double()


@pytest.mark.parametrize("spec", QUANTISED)
def test_state_of_another_dtype_is_refused(spec):
    storage = stored(spec, weights(32, 64))
    state = storage.state_dict()
    key = next(key for key, tensor in state.items() if tensor.is_floating_point())
    state[key] = state[key].bfloat16()
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=f"{key} is torch.bfloat16, but {spec.kind} storage keeps torch.float32"):
            storage.load_state_dict(state, assign=assign)


def test_dense_storage_gives_views_and_gradients():
    storage = stored(StorageSpec("none"), weights(3, 32, 64))
    assert storage.dense() is storage.get_parameter("value")
    assert storage.dense(1).data_ptr() == storage.dense()[1].data_ptr()
    assert torch.equal(storage.dense(slice(1, 3)), storage.dense()[1:3])
    assert storage.dense(dtype=torch.bfloat16).dtype == torch.bfloat16
    out = torch.empty(32, 64, dtype=torch.bfloat16)
    assert storage.dense(1, out=out) is out
    assert torch.equal(out, storage.dense(1).bfloat16())
    storage.requires_grad_(True)
    storage.dense(1, dtype=torch.bfloat16).sum().backward()
    grad = storage.get_parameter("value").grad
    assert grad is not None
    assert torch.equal(grad, torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 32, 64))
    storage.load_dense(weights(32, 64) + 1, 2)
    assert torch.equal(storage.dense(2), weights(32, 64) + 1)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("which", [3, -1, slice(0, 4), slice(-1, None), slice(2, 1), slice(0, 3, 2)])
def test_expert_out_of_range(spec, which):
    storage = stored(spec, weights(3, 32, 64))
    with pytest.raises(NibbleError, match=r"layer\.weight: no expert .*: it has experts 0 to 2 \(slices: step 1\)"):
        storage.dense(which)
    if isinstance(which, int):
        with pytest.raises(NibbleError, match=f"no expert {which}: it has experts 0 to 2"):
            storage.load_dense(weights(32, 64), which)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("which", [0, slice(0, 1)])
def test_expert_of_a_single_matrix(spec, which):
    storage = stored(spec, weights(32, 64))
    with pytest.raises(NibbleError, match=r"layer\.weight: no expert .*: it is a single matrix; leave `which` out"):
        storage.dense(which)


@pytest.mark.parametrize("spec", SPECS)
def test_out_that_does_not_fit_is_refused(spec):
    storage = stored(spec, weights(3, 32, 64))
    with pytest.raises(ValueError, match=r"layer\.weight: out is \[32, 32\] torch\.float32, but \[32, 64\]"):
        storage.dense(0, out=torch.empty(32, 32))
    with pytest.raises(ValueError, match=r"out is \[32, 64\] torch\.float32, but \[32, 64\] torch\.bfloat16 is wanted"):
        storage.dense(0, dtype=torch.bfloat16, out=torch.empty(32, 64))
    with pytest.raises(ValueError, match=r"out is \[32, 64\] torch\.int32"):
        storage.dense(0, out=torch.empty(32, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="out must be contiguous and on cpu"):
        storage.dense(0, out=torch.empty(64, 32).t())
    with pytest.raises(ValueError, match="out must be contiguous and on cpu"):
        storage.dense(0, out=torch.empty(32, 64, device="meta"))
    if spec.kind != "none":
        with pytest.raises(ValueError, match=r"can't give torch\.float64"):
            storage.dense(0, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rows_that_do_not_divide_into_blocks(kind):
    message = rf"layers\.0\.down_proj: {kind} stores blocks of 64 values, but the rows of shape \[4, 64, 96\] have 96"
    spec = StorageSpec(kind)
    with pytest.raises(NibbleError, match=message) as raised:
        new_storage(spec, (4, 64, 96), torch.bfloat16, "meta", "layers.0.down_proj")
    assert "Choose storage int8 or none" in str(raised.value)
    with pytest.raises(NibbleError, match=message):
        storage_tensors(spec, (4, 64, 96), torch.bfloat16, "layers.0.down_proj")
    with pytest.raises(NibbleError, match=r"w: .* blocks of 64"):
        quantise(spec, weights(64, 96), torch.bfloat16, name="w")


def test_unknown_kind():
    with pytest.raises(NibbleError, match="unknown storage 'nf5': choose one of none, nf4, fp4, int8"):
        StorageSpec("nf5")  # type: ignore[arg-type]


def test_double_quantisation_is_for_four_bits():
    assert StorageSpec("nf4") == StorageSpec("nf4", True)
    assert StorageSpec("int8", True) == StorageSpec("int8", False)
    assert not StorageSpec("none", True).double_quant


@pytest.mark.parametrize("spec", SPECS)
def test_shapes_and_dtypes_that_cannot_be_kept(spec):
    for shape in ((64,), (2, 2, 2, 64), (0, 64)):
        with pytest.raises(NibbleError, match=r"w: expected a shape \[out, in\] or \[experts, out, in\], got"):
            new_storage(spec, shape, torch.float32, "cpu", "w")
    with pytest.raises(NibbleError, match=rf"w: {spec.kind} storage can't give torch\.int32: choose float32"):
        new_storage(spec, (64, 64), torch.int32, "cpu", "w")


@pytest.mark.parametrize("spec", SPECS)
def test_dense_matrices_that_are_refused(spec):
    storage = stored(spec, weights(3, 32, 64))
    before = storage.dense().clone()
    with pytest.raises(
        NibbleError, match=r"layer\.weight, expert 1: expected a matrix of shape \[32, 64\], got \[64, 32\]"
    ):
        storage.load_dense(weights(64, 32), 1)
    with pytest.raises(NibbleError, match=r"layer\.weight: expected a matrix of shape \[3, 32, 64\], got \[32, 64\]"):
        storage.load_dense(weights(32, 64))
    with pytest.raises(NibbleError, match=r"layer\.weight, expert 1: expected float32, .* got torch\.int64") as raised:
        storage.load_dense(torch.ones(32, 64, dtype=torch.int64), 1)
    assert "already quantised" in str(raised.value)
    with pytest.raises(NibbleError, match=r"matrix: expected one matrix \[out, in\], got shape \[3, 32, 64\]"):
        quantise(spec, weights(3, 32, 64), torch.float32)
    assert torch.equal(storage.dense(), before)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inf_and_nan_are_refused(spec, dtype):
    storage = stored(spec, weights(3, 32, 64))
    before = storage.dense().clone()
    for bad in (torch.inf, -torch.inf, torch.nan):
        matrix = weights(32, 64).to(dtype)
        matrix[7, 9:11] = bad
        with pytest.raises(
            NibbleError, match=r"layer\.weight, expert 2: 2 of its 2048 values are inf or NaN"
        ) as raised:
            storage.load_dense(matrix, 2)
        assert "get it again" in str(raised.value)
    assert torch.equal(storage.dense(), before)


def test_bitsandbytes_is_imported_only_when_it_is_needed_and_prints_nothing():
    code = (
        "import sys\n"
        "import quant.common.errors\n"
        "assert 'torch' not in sys.modules\n"
        "import torch, quant.storage, quant.fourbit, quant.int8\n"
        "from quant.kinds import new_storage\n"
        "from quant.storage import StorageSpec\n"
        "for kind in ('none', 'int8', 'fp4', 'nf4'):\n"
        "    storage = new_storage(StorageSpec(kind), (64, 64), torch.float32, 'cpu', 'w')\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "storage.load_dense(torch.ones(64, 64))\n"
        "assert bool((storage.dense() == 1).all())\n"
        "assert 'bitsandbytes' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_the_advice_to_install_kernels_is_silenced(tmp_path, monkeypatch, caplog):
    """bitsandbytes gives it only on CPUs with AVX512-BF16: a stand-in gives it on any."""
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import logging\n"
        "logger = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "logger.warning('Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please …', 'no kernels')\n"
        "logger.warning('another warning')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        sys.modules.pop("bitsandbytes", None)
        module = import_bitsandbytes.__wrapped__()  # which is otherwise called once
    assert module.__file__ == str(package / "__init__.py")
    assert caplog.messages == ["another warning"]
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").filters
