"""SwiGLU and output gates with their kernels = in torch's operations: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.blocks.factory import Factory
from models.blocks.mlp import SwiGLU, times_sigmoid, times_silu
from quant.kernels.choice import KERNELS, using
from quant.storage import StorageSpec
from tests.helpers import assert_close


@pytest.mark.parametrize("function", [times_silu, times_sigmoid])
@pytest.mark.parametrize("shape", [(5, 40), (1, 1100), (3, 4, 16)], ids=str)
def test_gates(function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
    """The two lie beside each other, as Qwen3.5's queries and gates do."""
    both = torch.randn(*shape[:-1], 2, shape[-1], generator=torch.Generator().manual_seed(0), requires_grad=True)
    grad = torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(1))[..., ::2]
    right = function(*both.unbind(-2))
    with using(KERNELS):
        given = function(*both.unbind(-2))
    assert_close(given, right)
    expected, ours = (torch.autograd.grad(out, both, grad)[0] for out in (right, given))
    assert_close(ours, expected)


@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (1, 2100)])
def test_a_gate_for_each_row(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(rows, width, generator=generator, requires_grad=True) for width in (columns, 1))
    right = times_sigmoid(x, gate)
    with using(KERNELS):
        given = times_sigmoid(x, gate)
    assert_close(given, right)
    pairs = zip(*(torch.autograd.grad(out.square().sum(), (x, gate)) for out in (given, right)), strict=True)
    for ours, expected in pairs:
        assert_close(ours, expected)


def test_the_feed_forward_layer() -> None:
    layer = SwiGLU(24, 40, "dense_mlp", Factory(StorageSpec("none"), torch.float32, "cpu"))
    for number, parameter in enumerate(layer.requires_grad_(True).parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(9), requires_grad=True)
    right = layer(x)
    with using(KERNELS):
        given = layer(x)
    assert_close(given, right)
    inputs = (x, *layer.parameters())
    pairs = zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (given, right)), strict=True)
    for ours, expected in pairs:
        assert_close(ours, expected)
