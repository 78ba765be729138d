"""The experts' block computed by kernels = the plain computation by torch's autograd."""

from __future__ import annotations

import pytest
import torch

from models.blocks.linear import LoRA
from models.experts import kernel_form
from quant.kernels.choice import KERNELS, using
from tests.helpers import assert_close
from tests.models.blocks.test_experts import CHOSEN, EXPERTS, gradients, make_block, make_input, plainly


@pytest.mark.parametrize(
    ("kind", "at_a_time"), [("none", None), pytest.param("int8", 1, marks=pytest.mark.slow), ("nf4", 4)]
)
def test_output_and_gradients_equal_autograd(kind: str, at_a_time: int | None) -> None:
    block = make_block(kind, trained=kind == "none")
    block.experts_at_a_time = at_a_time
    x, chosen, weights = make_input()
    plus = (x + 1, x - 2) if kind == "nf4" else (x + 1, None)  # what a layer adds
    expected = plainly(block, x, chosen, weights) + sum(part for part in plus if part is not None)
    theirs = gradients(block, expected, (x, weights))
    with using(KERNELS):
        assert kernel_form.usable(x.device, chosen.numel(), EXPERTS)
        out = block(x, chosen, weights, *plus)
        ours = gradients(block, out, (x, weights))
    assert_close(out, expected, what="output")
    assert len(ours) == (8 if kind == "none" else 6)
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], what=name)
    assert not ours["gate_up_proj.lora.B"][3].any(), "an expert without tokens has a gradient of zero"


@pytest.mark.parametrize("case", ["as many rows as experts", "all on one expert", "no LoRA", "no tokens"])
def test_at_the_edges(case: str) -> None:
    block = make_block("nf4", lora=case != "no LoRA")
    x, chosen, weights = make_input()
    if case == "as many rows as experts":
        x, chosen, weights = x[:3].detach().requires_grad_(), chosen[:3], weights[:3].detach().requires_grad_()
    elif case == "no tokens":
        x, chosen, weights = x[:0].detach().requires_grad_(), chosen[:0], weights[:0].detach().requires_grad_()
    elif case == "all on one expert":
        chosen = torch.tensor([EXPERTS - 1, 0]).expand(len(x), CHOSEN).contiguous()
    expected = plainly(block, x, chosen, weights)
    theirs = gradients(block, expected, (x, weights))
    with using(KERNELS):
        out = block(x, chosen, weights)
        ours = gradients(block, out, (x, weights))
    if not len(x):
        assert out.shape == x.shape and not any(gradient.any() for gradient in ours.values())
        return
    assert_close(out, expected, what="output")
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], what=name)


def test_untrained_lora_leaves_every_bit_of_the_base() -> None:
    x, chosen, weights = make_input()
    with using(KERNELS):
        base = make_block("nf4", lora=False)(x, chosen, weights)
        block = make_block("nf4", lora=False)
        for projection in (block.gate_up_proj, block.down_proj):
            projection.lora = LoRA(projection.weight.shape, 4, alpha=8.0)
        assert torch.equal(block(x, chosen, weights), base)
