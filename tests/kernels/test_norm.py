"""RMSNorm with its kernels = in torch's operations, through the module: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.blocks.factory import Factory
from models.blocks.norm import RMSNorm, ZeroCentredRMSNorm
from quant.kernels.choice import KERNELS, using
from quant.storage import StorageSpec
from tests.helpers import assert_close

FACTORY = Factory(StorageSpec("none"), torch.float32, "cpu")


def norm_of(kind: type[RMSNorm], size: int) -> RMSNorm:
    norm = kind(size, 1e-5, FACTORY)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    return norm


def results(norm: RMSNorm, x: Tensor, update: Tensor | None, both: bool) -> list[Tensor]:
    """The sum where there is one, the norm, and the gradients of everything."""
    leaves = [tensor.clone().requires_grad_() for tensor in ((x,) if update is None else (x, update))]
    # A slice of a wider tensor, as latent attention has it.
    inputs = [leaf[..., : norm.weight.numel()] for leaf in leaves]
    norm.weight.grad = None
    outputs = list(norm.after(*inputs)) if both else [norm(inputs[0])]
    generator = torch.Generator().manual_seed(2)
    sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs).backward()  # type: ignore[union-attr]
    assert norm.weight.grad is not None
    return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None), norm.weight.grad]


@pytest.mark.parametrize("kind", [RMSNorm, ZeroCentredRMSNorm])
@pytest.mark.parametrize(
    ("shape", "size"), [((9, 64), 64), ((1, 96), 40), ((3, 5, 32), 32), ((5, 2100), 2100)], ids=str
)
@pytest.mark.parametrize("use", ["norm", "first", "sum"])
def test_norm(kind: type[RMSNorm], shape: tuple[int, ...], size: int, use: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, update = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    norm = norm_of(kind, size)
    arguments = (norm, x, update if use == "sum" else None, use != "norm")
    right = results(*arguments)
    with using(KERNELS):
        given = results(*arguments)
    assert len(given) == len(right)
    for number, (ours, theirs) in enumerate(zip(given, right, strict=True)):
        assert_close(ours, theirs, what=str(number))


def test_heads_of_every_second_place_are_not_copied() -> None:
    """Qwen3.5's queries lie beside their gates; the frozen weight gets no gradient."""
    norm = norm_of(RMSNorm, 32).requires_grad_(False)
    x = torch.randn(6, 8, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    right = norm(x[:, 0::2])
    with using(KERNELS):
        given = norm(x[:, 0::2])
    assert_close(given, right)
    expected, ours = (torch.autograd.grad(out.square().sum(), x)[0] for out in (right, given))
    assert_close(ours, expected)


@pytest.mark.parametrize("used", [(0, 1, 2, 3), (1, 3), ()], ids=str)
def test_copies(used: tuple[int, ...]) -> None:
    """The gradients of those that are used are summed; of none, the sum's alone is left."""
    norm = norm_of(RMSNorm, 40).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, update, *factors = torch.randn(6, 7, 40, generator=generator).requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        total, *copies = norm.after(x, update, copies=4)
        assert len(copies) == 4
        loss = total.sin().sum() + sum((copies[i] * factors[i].detach()).sum() for i in used)
        return torch.autograd.grad(loss, (x, update))

    right = gradients()
    with using(KERNELS):
        given = gradients()
    for ours, theirs in zip(given, right, strict=True):
        assert_close(ours, theirs)
