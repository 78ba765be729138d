"""RMSNorm with weights of another dtype than its input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.blocks.factory import Factory
from models.blocks.norm import RMSNorm, ZeroCentredRMSNorm
from quant.storage import StorageSpec
from tests.helpers import assert_close


def norm_and_input(kind: type[RMSNorm], dtype: torch.dtype) -> tuple[RMSNorm, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = kind(48, 1e-5, Factory(StorageSpec("none"), torch.float32, "cpu"))
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48, generator=generator))
    x = torch.randn(3, 5, 48, generator=generator).to(dtype)
    x[0, 0] = 0  # divided by the root of eps alone
    return norm, x.requires_grad_(), torch.randn(3, 5, 48, generator=generator).to(dtype)


@pytest.mark.parametrize("kind", [RMSNorm, ZeroCentredRMSNorm])
def test_bfloat16_with_a_float32_weight_is_rounded_once(kind: type[RMSNorm]) -> None:
    norm, x, grad = norm_and_input(kind, torch.bfloat16)
    wide, weight = x.detach().float().requires_grad_(), norm.weight.detach().clone().requires_grad_()
    expected = F.rms_norm(wide, (48,), weight + 1 if kind is ZeroCentredRMSNorm else weight, 1e-5)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected.detach(), 2**-8)
    out.backward(grad)
    expected.backward(grad.float())
    assert x.grad is not None and wide.grad is not None and norm.weight.grad is not None and weight.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert_close(x.grad.float(), wide.grad, 2**-8)
    assert_close(norm.weight.grad, weight.grad)


def test_a_float32_weight_costs_no_float32_copy_of_the_input() -> None:
    norm, x, _ = norm_and_input(RMSNorm, torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert sum(tensor.nbytes for tensor in kept if tensor.dtype == torch.float32) < x.nbytes / 2


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm, x, grad = norm_and_input(RMSNorm, torch.bfloat16)
    norm.weight.requires_grad_(False)
    norm(x).backward(grad)
    assert x.grad is not None and norm.weight.grad is None
