"""Routers with their kernels = in torch's operations: the same experts, weights and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.blocks.factory import Factory
from models.blocks.router import Router, RoutingRule, SigmoidRouter, SoftmaxRouter
from models.kernels.router import choose
from quant.kernels.choice import KERNELS, using
from quant.kinds import new_storage
from quant.storage import StorageSpec
from tests.helpers import assert_close

FACTORY = Factory(StorageSpec("none"), torch.float32, "cpu")
ROUTERS = {
    "groups": lambda: SigmoidRouter(16, 24, RoutingRule(3, groups=4, chosen_groups=2, scale=1.7), FACTORY),
    "five groups": lambda: SigmoidRouter(16, 15, RoutingRule(6, groups=5, chosen_groups=3, scale=2.0), FACTORY),
    "sigmoid": lambda: SigmoidRouter(16, 9, RoutingRule(8, normalise=False, scale=0.5), FACTORY),
    "one": lambda: SigmoidRouter(16, 1, RoutingRule(1), FACTORY),
    "softmax": lambda: SoftmaxRouter(16, 12, 5, FACTORY),
    "probabilities": lambda: SoftmaxRouter(16, 40, 1, FACTORY, normalise=False),
}


def results(router: Router, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen, weights = router(x)
    generator = torch.Generator().manual_seed(3)
    (gradient,) = torch.autograd.grad((weights * torch.randn(weights.shape, generator=generator)).sum(), x)
    return chosen, weights, gradient


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [1, 21])
def test_routers(name: str, tokens: int) -> None:
    router, generator = ROUTERS[name]().requires_grad_(False), torch.Generator().manual_seed(0)
    for tensor in (*router.parameters(), *router.buffers()):
        torch.nn.init.normal_(tensor, 0.0, 0.3, generator=generator)
    x = torch.randn(tokens, 16, generator=generator, requires_grad=True)
    right = results(router, x)
    with using(KERNELS):
        given = results(router, x)
        seen: list[Tensor] = []
        router.observers.append(lambda chosen, probabilities: seen.extend((chosen, probabilities)))
        router(x)
    assert torch.equal(given[0], right[0]) and torch.equal(seen[0], right[0]) and len(seen) == 2
    assert_close(given[1], right[1])
    if name == "one":  # the weight of the only expert is one whatever its score
        assert given[2].abs().max() < 1e-6
    else:
        assert_close(given[2], right[2])


def test_the_first_of_equals() -> None:
    x, matrices = torch.ones(2, 4), [new_storage(StorageSpec("none"), (n, 4), torch.float32, "cpu", "") for n in (7, 6)]
    for matrix in matrices:
        matrix.load_dense(torch.zeros(matrix.shape))
    assert choose(x, matrices[0], None, 3, normalise=True)[0].tolist() == [[0, 1, 2]] * 2
    grouped = choose(x, matrices[1], torch.zeros(6), 3, groups=3, open_groups=2, normalise=True)
    assert grouped[0].tolist() == [[0, 1, 2]] * 2
