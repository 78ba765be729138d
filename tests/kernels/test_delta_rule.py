"""The gated delta rule's kernels against the torch form and against the definition, token by token, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.delta_kernels import delta_rule_in_kernels, uses_kernels
from models.attention.delta_rule import chunked_gated_delta_rule, gated_delta_rule
from models.blocks.documents import Documents
from models.registry import architecture_for
from quant.kernels.choice import KERNELS, using
from quant.storage import StorageSpec
from tests.helpers import assert_close, relative_error
from tests.tiny import TINY

NAMES = ("output", "query", "key", "value", "decay", "beta")


def inputs(
    tokens: int, key_heads: int, heads: int, dk: int, dv: int, decay: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    """The five arguments, and a gradient of the output. decay: scales the log of the decay."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    arguments = [normal(tokens, key_heads, dk), normal(tokens, key_heads, dk), normal(tokens, heads, dv)]
    arguments += [-decay * F.softplus(normal(tokens, heads)), normal(tokens, heads).sigmoid()]
    return arguments, normal(tokens, heads, dv)


def sequential(*arguments: Tensor, lengths: Sequence[int]) -> Tensor:
    """o of every token from the recurrence S ← e^g S; S ← S + β k (v − kᵀ S); o = qᵀ S."""
    query, key, value, decay, beta = arguments
    groups = value.shape[1] // key.shape[1]
    query, key = (
        (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(groups, 1) for x in (query, key)
    )
    query = query * query.shape[2] ** -0.5
    outputs, token = [], 0
    for length in lengths:
        state = value.new_zeros(value.shape[1], key.shape[2], value.shape[2])
        for t in range(token, token + length):
            state = state * decay[t].exp()[:, None, None]
            missing = value[t] - (key[t][:, :, None] * state).sum(1)
            state = state + beta[t][:, None, None] * key[t][:, :, None] * missing[:, None]
            outputs.append((query[t][:, :, None] * state).sum(1))
        token += length
    return torch.stack(outputs)


def with_gradients(
    rule: object, arguments: Sequence[Tensor], grad: Tensor, *rest: object, **named: object
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    out = rule(*leaves, *rest, **named)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


# Lengths, key heads, value heads, their widths, tokens of a chunk, scale of the decay.
CASES = [
    ((70,), 1, 1, 16, 16, 64, 1.0),
    ((5, 20, 1, 1, 9), 1, 2, 16, 24, 32, 1.0),
    ((1, 32, 31), 1, 1, 64, 32, 32, 0.01),
    ((20,), 1, 1, 128, 32, 16, 10.0),
    ((1,), 1, 1, 20, 3, 16, 1.0),
    ((16, 17), 2, 2, 32, 64, 32, 30.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_to_the_definition_and_to_torch(case: tuple[tuple[int, ...], int, int, int, int, int, float]) -> None:
    lengths, key_heads, heads, dk, dv, chunk, decay = case
    documents = Documents.from_lengths(lengths)
    arguments, grad = inputs(sum(lengths), key_heads, heads, dk, dv, decay)
    given = with_gradients(delta_rule_in_kernels, arguments, grad, documents, chunk)
    exact = with_gradients(sequential, [x.double() for x in arguments], grad.double(), lengths=lengths)
    torch_form = with_gradients(chunked_gated_delta_rule, arguments, grad, documents)
    for name, ours, right, theirs in zip(NAMES, given, exact, torch_form, strict=True):
        # What has been overwritten can decay without effect: that gradient is as exact as the one of beta.
        least = 1e-5 * float(exact[-1].abs().max()) if name == "decay" else 0.0
        for other in (right, theirs):
            assert (ours.double() - other.double()).abs().max() <= max(1e-5 * float(other.abs().max()), least), name


@pytest.mark.parametrize("strength", [-50.0, -1e3])
def test_strong_decay_forgets_without_overflow(strength: float) -> None:
    lengths = (50, 14)
    arguments, grad = inputs(64, 1, 1, 16, 16, 0.1)
    arguments[3][10:40] = strength
    arguments[3][::7] = strength
    arguments[1][20:25] = 0.0  # keys without length
    given = with_gradients(delta_rule_in_kernels, arguments, grad, Documents.from_lengths(lengths), 32)
    exact = with_gradients(sequential, [x.double() for x in arguments], grad.double(), lengths=lengths)
    for name, ours, right in zip(NAMES, given, exact, strict=True):
        assert_close(ours.double(), right, what=name)


def test_keys_that_are_alike() -> None:
    """Inside a chunk every token corrects what the others wrote: a series in powers of that matrix would overflow."""
    arguments, grad = inputs(64, 1, 1, 16, 16, 0.001)
    arguments[1][:] = arguments[1][:1] + 0.01 * arguments[1]
    arguments[4][:] = 0.99
    given = with_gradients(delta_rule_in_kernels, arguments, grad, Documents.from_lengths([64]), 64)
    exact = with_gradients(sequential, [x.double() for x in arguments], grad.double(), lengths=[64])
    for name, ours, right in zip(NAMES, given, exact, strict=True):
        assert_close(ours.double(), right, 5e-5, what=name)


def test_another_document_is_not_seen_at_all() -> None:
    documents = Documents.from_lengths((40, 10))
    arguments, grad = inputs(50, 1, 1, 16, 16)
    before = with_gradients(delta_rule_in_kernels, arguments, grad, documents)
    for x in arguments[:3]:
        x[:40] = 1e6 * torch.randn_like(x[:40])
    after = with_gradients(delta_rule_in_kernels, arguments, grad, documents)
    for name, first, second in zip(NAMES, before, after, strict=True):
        assert torch.equal(first[40:], second[40:]), name


def test_columns_of_one_tensor_in_bfloat16() -> None:
    """As a layer gives them: views of one product, and states that are rounded to bfloat16 on their way."""
    (query, key, value, decay, beta), grad = inputs(100, 1, 2, 32, 32)
    mixed = torch.cat((query.flatten(1), key.flatten(1), value.flatten(1)), 1).bfloat16()
    documents = Documents.from_lengths((30, 70))

    def rule(mixed: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        q, k, v = (x.unflatten(1, (-1, 32)) for x in mixed.split((32, 32, 64), 1))
        assert uses_kernels(q, v) or v.dtype == torch.float32
        return gated_delta_rule(q, k, v, decay, beta, documents)

    with using(KERNELS):
        given = with_gradients(rule, (mixed, decay, beta), grad.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            again = with_gradients(rule, (mixed, decay, beta), grad.bfloat16())
    assert all(torch.equal(ours, other) for ours, other in zip(given, again, strict=True))
    right = with_gradients(rule, (mixed.float(), decay, beta), grad.bfloat16().float())
    assert [x.dtype for x in given] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for ours, other in zip(given, right, strict=True):
        assert relative_error(ours, other) < 2e-2


def test_a_model_computes_the_same_with_its_kernels() -> None:
    config = {"model_type": "qwen3_5_moe_text", **TINY["qwen3_5_moe_text"]}
    architecture = architecture_for(config, "tiny")
    model = architecture.build(architecture.parse_config(config, "tiny"), StorageSpec("none"), torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_()
    documents, tokens = Documents.from_lengths((9, 12)), torch.arange(21) % 7

    def gradients() -> list[Tensor]:
        out = model.hidden(tokens, documents)
        linear = [p for name, p in model.named_parameters() if "linear_attn" in name]
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), linear)]

    right = gradients()
    with using([name for name in KERNELS if name.startswith("delta_")]):
        given = gradients()
    assert len(right) > 8
    for ours, other in zip(given, right, strict=True):
        assert_close(ours, other, 2e-5)
    assert not all(torch.equal(ours, other) for ours, other in zip(given, right, strict=True))


def test_what_does_not_fit_is_left_to_torch() -> None:
    wide, double = torch.empty(4, 1, 256), torch.empty(4, 1, 16, dtype=torch.float64)
    assert not uses_kernels(double[:, :, :16].float(), double.float())
    with using(KERNELS):
        assert uses_kernels(double.float(), double.float())
        assert not uses_kernels(wide, wide) and not uses_kernels(double, double)
        assert not uses_kernels(wide.bfloat16(), wide.bfloat16())
