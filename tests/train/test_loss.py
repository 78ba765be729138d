"""The chunked head loss against torch's cross-entropy of the full logits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quant.common.errors import NibbleError
from train.loss import _chunk_shape, label_losses, linear_cross_entropy


def make(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, ignored: float = 0.4
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    head = (torch.randn(vocabulary, width, generator=generator) * 2 * width**-0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, head, labels


def reference(hidden: Tensor, head: Tensor, labels: Tensor, denominator: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float32, whatever the dtype of the inputs."""
    hidden, head = (tensor.detach().float().clone().requires_grad_() for tensor in (hidden, head))
    loss = F.cross_entropy(hidden @ head.T, labels, reduction="sum") / denominator
    d_hidden, d_head = torch.autograd.grad(loss, (hidden, head))
    return loss.detach(), d_hidden, d_head


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).abs().max() / expected.abs().max())


# One chunk; several vocabulary slices; several blocks of rows as well.
CHUNKS = [1 << 24, 210_000, 4_100]


@pytest.mark.parametrize("rows", [None, 60, 83])  # 47 have a label
@pytest.mark.parametrize("chunk_bytes", CHUNKS)
def test_equals_cross_entropy_in_float32(chunk_bytes: int, rows: int | None) -> None:
    hidden, head, labels = make(83, 24, 1111, torch.float32)
    loss, d_hidden, d_head = reference(hidden, head, labels, 37)
    hidden.requires_grad_()
    head.requires_grad_()
    actual = linear_cross_entropy(hidden, head, labels, 37, rows=rows, chunk_bytes=chunk_bytes)
    assert actual.dtype == torch.float32
    assert actual.shape == ()
    got_hidden, got_head = torch.autograd.grad(actual, (hidden, head))
    assert relative(actual.detach(), loss) < 1e-6
    assert relative(got_hidden, d_hidden) < 1e-6
    assert relative(got_head, d_head) < 1e-6
    assert not got_hidden[labels == -100].any()


def test_the_chunk_sizes_of_the_tests_split_both_ways() -> None:
    rows = int((make(83, 24, 1111, torch.float32)[2] != -100).sum())
    shapes = [_chunk_shape(rows, 1111, 0, chunk) for chunk in CHUNKS]
    assert shapes[0] == (rows, 1111)
    assert shapes[1][0] == rows
    assert shapes[1][1] < 1111
    assert shapes[2][0] < rows
    assert shapes[2][1] < 1111


def test_frozen_head_gets_no_gradient_and_upstream_gradient_scales() -> None:
    hidden, head, labels = make(20, 16, 96, torch.float32)
    _, d_hidden, _ = reference(hidden, head, labels, 5)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, head, labels, torch.tensor(5))
    (loss * 3).backward()
    assert head.grad is None
    assert hidden.grad is not None
    assert relative(hidden.grad, 3 * d_hidden) < 1e-6


def test_only_the_head_trains() -> None:
    hidden, head, labels = make(20, 16, 96, torch.float32)
    _, _, d_head = reference(hidden, head, labels, 5)
    head.requires_grad_()
    linear_cross_entropy(hidden, head, labels, 5).backward()
    assert head.grad is not None
    assert relative(head.grad, d_head) < 1e-6


@pytest.mark.parametrize("chunk_bytes", [1 << 24, 180_000, 20_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])  # float16 is multiplied as it is on every CPU
def test_half_precision_within_its_rounding(dtype: torch.dtype, chunk_bytes: int) -> None:
    hidden, head, labels = make(70, 32, 700, dtype)
    loss, d_hidden, d_head = reference(hidden, head, labels, 11)
    hidden.requires_grad_()
    head.requires_grad_()
    actual = linear_cross_entropy(hidden, head, labels, 11, chunk_bytes=chunk_bytes)
    got_hidden, got_head = torch.autograd.grad(actual, (hidden, head))
    assert got_hidden.dtype == got_head.dtype == dtype
    assert relative(actual.detach(), loss) < 2e-3
    assert relative(got_hidden, d_hidden) < 8e-3
    assert relative(got_head, d_head) < 8e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_gradients_of_confident_rows_are_exact(dtype: torch.dtype) -> None:
    """Where the label has probability 1 - 1e-8, p - 1 formed by subtraction would have lost all digits."""
    head = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([7, 3, 60])
    hidden = (head[labels].float() * 1.5).to(dtype)
    with torch.no_grad():
        probabilities = (hidden.float() @ head.float().T).softmax(1)[range(3), labels]
    assert (probabilities == 1).any()
    double = hidden.double().requires_grad_()
    F.cross_entropy(double @ head.double().T, labels, reduction="sum").backward()
    hidden.requires_grad_()
    linear_cross_entropy(hidden, head, labels, 1).backward()
    assert hidden.grad is not None
    assert double.grad is not None
    difference = (hidden.grad.double() - double.grad).abs().amax(1) / double.grad.abs().amax(1)
    assert difference.max() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_no_labels_give_zero_and_not_nan() -> None:
    hidden, head, _ = make(9, 16, 96, torch.float32)
    hidden.requires_grad_()
    head.requires_grad_()
    loss = linear_cross_entropy(hidden, head, torch.full((9,), -100), 0)
    loss.backward()
    assert loss.item() == 0.0
    for tensor in (hidden, head):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_evaluation_does_no_gradient_work() -> None:
    hidden, head, labels = make(33, 16, 96, torch.float32)
    expected = linear_cross_entropy(hidden, head, labels, 4)
    hidden.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, head, labels, 4)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)


def test_infinite_and_nan_logits_are_not_hidden() -> None:
    hidden, head, labels = make(8, 16, 96, torch.float32, ignored=0.0)
    hidden[3, 2] = float("nan")
    assert not linear_cross_entropy(hidden, head, labels, 1).isfinite()


@pytest.mark.parametrize("label", [96, -1])
def test_label_outside_the_vocabulary(label: int) -> None:
    hidden, head, labels = make(9, 16, 96, torch.float32)
    labels[4] = label
    with pytest.raises(NibbleError) as caught:
        linear_cross_entropy(hidden, head, labels, 1)
    assert str(caught.value) == (
        f"label {label} at token 4 of the batch lies outside the model's vocabulary of 96.\n"
        "Do tokenizer and model belong together? Labels are 0..95, or -100 for no loss."
    )


def test_shapes_that_do_not_fit() -> None:
    hidden, head, labels = make(9, 16, 96, torch.float32)
    with pytest.raises(ValueError, match=r"hidden \[N, H\] and head \[V, H\] don't fit: \(9, 16\), \(16, 96\)"):
        linear_cross_entropy(hidden, head.T, labels, 1)
    with pytest.raises(ValueError, match=r"labels must be \[N\] = \[9\], not \(8,\)"):
        linear_cross_entropy(hidden, head, labels[:8], 1)


def test_chunks_stay_within_their_bytes() -> None:
    for rows in (1, 40, 512, 4096, 100_000):
        for vocabulary in (600, 8192, 154_880):
            block, columns = _chunk_shape(rows, vocabulary, 2048, 32 << 20)
            assert 1 <= block <= rows
            assert 1 <= columns <= vocabulary
            assert 4 * block * columns <= 32 << 20
            assert 4 * columns * 2048 <= 32 << 20


MEMORY = """
import resource, torch
from train.loss import linear_cross_entropy
torch.manual_seed(0)
N, H, V = 768, 32, 49152
hidden = torch.randn(N, H).requires_grad_()
head = torch.randn(V, H) * H**-0.5
labels = torch.randint(0, V, (N,))
linear_cross_entropy(hidden[:64], head, labels[:64], 1, chunk_bytes=1 << 20).backward()  # warm: thread pools, kernels
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, head, labels, N, chunk_bytes=4 << 20).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_tensor_of_all_logits_exists() -> None:
    """The logits would be 144 MiB; the loss may grow the process by its chunk and its [N, H] gradients only."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=environment, check=True)
    assert int(result.stdout) / 1024 < 24


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_hits_of_single_labels(chunk_bytes: int, dtype: torch.dtype) -> None:
    hidden, head, labels = make(83, 24, 1111, dtype)
    logits = hidden.float() @ head.float().T
    labels[:40] = torch.where(labels[:40] == -100, -100, logits.argmax(1)[:40])
    here = labels != -100
    losses, correct = label_losses(hidden, head, labels, chunk_bytes=chunk_bytes)
    expected = F.cross_entropy(logits, labels, reduction="none")[here]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2  # a CPU without bfloat16 units computes in float32, others not
    assert relative(losses, expected) < tolerance
    assert correct.dtype == torch.bool and 0 < int(correct.sum()) < len(correct)
    if dtype == torch.float32:
        assert correct.tolist() == (logits.argmax(1) == labels)[here].tolist()


def test_of_equal_logits_the_first_is_the_largest_over_all_chunks() -> None:
    hidden, head = torch.ones(5, 4), torch.zeros(200, 4)
    head[[70, 130, 199]] = 1.0
    labels = torch.tensor([70, 130, -100, 199, 70])
    for chunk_bytes in (1 << 20, 16 * 64 * 4):
        _, correct = label_losses(hidden, head, labels, chunk_bytes=chunk_bytes)
        assert correct.tolist() == [True, False, False, True]


def test_no_label_has_no_loss() -> None:
    losses, correct = label_losses(torch.ones(3, 4), torch.ones(7, 4), torch.full((3,), -100))
    assert len(losses) == len(correct) == 0
