"""A device's paths against the CPU reference, on tiny models: `python -m benchmarks.gpu_checks DEVICE`.

One JSON line on standard output for each check, as soon as it is known.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks import gpu_checks_cut, gpu_checks_graph, gpu_checks_models, gpu_checks_optim, gpu_checks_sequence
from benchmarks.gpu_cases import NEEDS_CUDA
from benchmarks.gpu_compare import CPU, DTYPES, Check, Group, compare, random, short
from models.blocks.factory import Factory
from models.blocks.linear import LoRA
from models.experts.block import Experts
from models.use_kernels import use_kernels
from parallel.device import choose_device
from quant.common.errors import in_one_line
from quant.fourbit import BLOCK
from quant.kernels.choice import KERNELS
from quant.kernels.language import AVAILABLE, INTERPRETED
from quant.kinds import new_storage
from quant.storage import DenseStorage, StorageSpec
from train.loss import linear_cross_entropy

SPECS = (
    StorageSpec("nf4", True),
    StorageSpec("nf4", False),
    StorageSpec("fp4", True),
    StorageSpec("fp4", False),
    StorageSpec("int8"),
    StorageSpec("none"),
)
# Of a block's largest value: bitsandbytes writes the edges for CUDA with 6 digits or more (0.583333 is 7/12), and both
# multiply by a rounded reciprocal of the largest value.
EDGE = 1e-6


def groups() -> list[Group]:
    """Every check of this project's CUDA paths."""
    blocks: list[Group] = [
        ("kernels", kernels),
        ("storages", storages),
        ("quantising", quantising),
        ("experts", experts),
        ("loss", loss_in_chunks),
        ("optimisers", gpu_checks_optim.optimisers),
    ]
    last: Group = ("flash-linear-attention", gpu_checks_sequence.flash_linear_attention)
    models = [*gpu_checks_models.groups(), *gpu_checks_cut.groups(), *gpu_checks_graph.groups()]
    # flash-linear-attention tunes its kernels when it is first used, which can take minutes.
    models.sort(key=lambda group: group[0].startswith("qwen3_5"))
    return [*blocks, *gpu_checks_sequence.groups(), *models, last]


def checks(device: torch.device) -> Iterator[Check]:
    """All of them; one that raises is a failure, and the others go on."""
    for name, group in groups():
        try:
            yield from group(device)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is this check's result)
            yield Check(name, in_one_line(error), False)


def kernels(device: torch.device) -> Iterator[Check]:
    """Each of our own against its torch form, on the device."""
    if not AVAILABLE or (device.type == "cpu" and not INTERPRETED):
        yield Check("kernels", "Triton is not here" if not AVAILABLE else NEEDS_CUDA, None)
        return
    for name, kernel in sorted(KERNELS.items()):
        failure = kernel.failure(device)
        yield Check(f"kernel {name}", failure or "as in torch", failure is None)


# ---------------------------------------------------------------------------------------------------------- storages


def storages(device: torch.device) -> Iterator[Check]:
    for spec in SPECS:
        name = spec.kind + (" with double quantisation" if spec.double_quant else "")
        for dtype in (torch.float32, torch.bfloat16):
            differ = total = 0
            for shape in ((192, 256), (20, 96, 128), (3, 33, 64)):
                here = new_storage(spec, shape, dtype, CPU, "matrix")
                here.load_dense(random(shape, 1).mul_(0.02))
                there = copy.deepcopy(here).to(device)
                asked: list[int | slice | None] = [None] if len(shape) == 2 else [None, 1, slice(1, 3)]
                for which in asked:
                    expected, actual = here.dense(which), there.dense(which).to(CPU)
                    differ += int((expected != actual).sum())
                    total += expected.numel()
            yield Check(f"dense() of {name}, {short(dtype)}", f"{differ} of {total:,} values differ", differ == 0)


def quantising(device: torch.device) -> Iterator[Check]:
    """Codes made on the device: others than the CPU's only where a value lies on the edge between two codes.

    FP4 has two codes for zero. For what is nearest to zero, CUDA's kernel takes the one with the value's sign and the
    CPU's the other one: some 1.2 % of the bytes of normal values, with no effect on what they mean.
    """
    for spec in SPECS[:-1]:
        name = spec.kind + (" with double quantisation" if spec.double_quant else "")
        matrix = random((512, 512), 2, torch.bfloat16)
        packed = []
        for on in (CPU, device):
            storage = new_storage(spec, (512, 512), torch.bfloat16, on, "matrix")
            storage.load_dense(matrix.to(on))
            packed.append(dict(storage.named_parameters())["packed"].to(CPU))
        bytes_apart = int((packed[0] != packed[1]).sum())
        meanings, wrong = off_edge(spec.kind, matrix, *packed)
        figure = (
            f"{bytes_apart} of {packed[0].numel():,} bytes differ, {meanings} values, {wrong} of them not on an edge"
        )
        yield Check(f"quantising to {name}", figure, wrong == 0)


def off_edge(kind: str, matrix: Tensor, one: Tensor, other: Tensor) -> tuple[int, int]:
    """How many codes of `matrix` [out, in] mean different values in two packed tensors; in how many the value isn't
    half-way between the two meanings, where rounding decides.
    """
    block = matrix.shape[1] if kind == "int8" else BLOCK
    values = matrix.double().view(-1, block)
    values = (values / values.abs().amax(1, keepdim=True)).flatten()
    a, b = (_meanings(kind, packed) for packed in (one, other))
    differ = a != b
    wrong = differ & ((values - (a + b) / 2).abs() > EDGE)
    return int(differ.sum()), int(wrong.sum())


def _meanings(kind: str, packed: Tensor) -> Tensor:
    """float64, flat: what the codes stand for, between -1 and 1."""
    if kind == "int8":
        return packed.double().flatten() / 127
    from bitsandbytes.functional import get_4bit_type

    codes = torch.stack((packed >> 4, packed & 15), -1).flatten().int()
    meanings: Tensor = get_4bit_type(kind, device="cpu").double()[codes]
    return meanings


# ------------------------------------------------------------------------------------------------------------ experts


def experts(device: torch.device) -> Iterator[Check]:
    count, hidden, width, tokens, chosen = 24, 128, 64, 80, 3
    for spec in (SPECS[0], SPECS[4], SPECS[5]):
        reference = Experts(count, hidden, width, Factory(spec, torch.float32, CPU))
        _fill_block(reference, spec)
        x, upstream = random((tokens, hidden), 3), random((tokens, hidden), 4)
        scores = random((tokens, count), 5)
        scores[:, 7] = -10.0  # no token chooses this one
        picked = scores.topk(chosen, dim=-1)
        weights = picked.values.softmax(-1)
        expected = _run_block(reference, x, picked.indices, weights, upstream)
        for dtype, tolerance in DTYPES:
            block = Experts(count, hidden, width, Factory(spec, dtype, CPU))
            _fill_block(block, spec)
            block.to(device)
            actual = _run_block(
                block, x.to(device, dtype), picked.indices.to(device), weights.to(device), upstream.to(device, dtype)
            )
            name = f"experts forward and backward, {spec.kind}, {short(dtype)}"
            yield compare(name, list(zip(actual, expected, strict=True)), tolerance)


def _fill_block(block: Experts, spec: StorageSpec) -> None:
    for number, projection in enumerate((block.gate_up_proj, block.down_proj)):
        shape = projection.weight.shape
        projection.weight.load_dense(random(shape, 10 + number).mul_(shape[-1] ** -0.5))
        projection.lora = LoRA(shape, 8, 16.0)
        with torch.no_grad():
            projection.lora.A.copy_(random(tuple(projection.lora.A.shape), 20 + number).mul_(shape[-1] ** -0.5))
            projection.lora.B.copy_(random(tuple(projection.lora.B.shape), 30 + number).mul_(0.1))
        if isinstance(projection.weight, DenseStorage):
            projection.weight.value.requires_grad_()


def _run_block(block: Experts, x: Tensor, chosen: Tensor, weights: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = block(x, chosen, weights)
    y.backward(upstream)
    gradients = [tensor.grad for tensor in (x, weights, *block.parameters()) if tensor.requires_grad]
    return [y, *(gradient for gradient in gradients if gradient is not None)]


# ----------------------------------------------------------------------------------------------------------- the loss


def loss_in_chunks(device: torch.device) -> Iterator[Check]:
    tokens, hidden, vocabulary = 200, 128, 1000
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(50))
    labels[::3] = -100
    labelled = int((labels != -100).sum())
    x, head = random((tokens, hidden), 51), random((vocabulary, hidden), 52).mul_(0.1)

    def run(on: torch.device, dtype: torch.dtype, wide: torch.dtype | None = None) -> list[Tensor]:
        # The reference gets the same values in float32. A copy in any case: .to gives back what needs no change.
        h, w = (t.to(dtype).to(on, wide or dtype, copy=True).requires_grad_() for t in (x, head))
        loss = linear_cross_entropy(h, w, labels.to(on), labelled, labelled=labelled, chunk_bytes=1 << 17)
        loss.backward()
        assert h.grad is not None and w.grad is not None
        return [loss, h.grad, w.grad]

    for dtype, tolerance in DTYPES:
        pairs = list(zip(run(device, dtype), run(CPU, dtype, torch.float32), strict=True))
        yield compare(f"loss in chunks, {short(dtype)}", pairs, tolerance)


def main(device_name: str, wanted: str) -> None:
    """wanted: as train.kernels."""
    device = choose_device(device_name)
    use_kernels(device, wanted)
    for check in checks(device):
        print(json.dumps(asdict(check)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
