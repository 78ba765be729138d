"""Expert usage: counts and entropy beside those of transformers' router logits."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.blocks.balance import Balance
from models.blocks.documents import Documents
from models.blocks.usage import ExpertUsage, Usage
from tests.balance_helpers import BATCHES, CPU, SIGMOID, micro_batch, real_documents, save_routed, step, trainable
from tests.tiny import TINY, save_tiny
from train.data.batches import IGNORED
from train.held_out import held_out_loss

# In the second there is nothing to learn; the third is padding for the most part.
UNLEARNT = dataclasses.replace(BATCHES[1], labels=torch.full_like(BATCHES[1].labels, IGNORED), labelled=0)
SEEN = (BATCHES[0], UNLEARNT, micro_batch((5,), seed=3))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    made = save_routed(tmp_path_factory)
    for name in TINY.keys() - made.keys() - {"qwen3_5_moe"}:
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, save_tiny(folder, name, num_hidden_layers=2, num_experts_per_tok=3)
    return made


@torch.no_grad()
def expected_of(reference: Any) -> Usage:
    """By transformers' logits of its routers, each document of `SEEN` alone."""
    routers = {name: m for name, m in reference.named_modules() if name.endswith(("mlp.gate", "mlp.router"))}
    seen: dict[str, list[Tensor]] = {name: [] for name in routers}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        weight = getattr(module, "weight", None)
        weight = module.gate.weight if weight is None else weight
        seen[name].append(inputs[0].reshape(-1, weight.shape[-1]).float() @ weight.T)

    handles = [module.register_forward_hook(functools.partial(keep, name)) for name, module in routers.items()]
    for batch in SEEN:
        for tokens, _ in real_documents(batch):
            reference(input_ids=tokens[None])
    for handle in handles:
        handle.remove()
    layers, counts, entropies = [], [], []
    for name, logits in ((name, torch.cat(found).double()) for name, found in seen.items()):
        mlp = reference.get_submodule(name.rpartition(".")[0])
        bias = next((b for n, b in mlp.named_buffers() if "correction_bias" in n), getattr(mlp, "expert_bias", None))
        scores = logits.softmax(-1) if bias is None else logits.sigmoid()
        chosen = (scores if bias is None else scores + bias).topk(3).indices
        counts.append(torch.bincount(chosen.flatten(), minlength=8).tolist())
        shares = scores / scores.sum(-1, keepdim=True)
        entropies.append(torch.distributions.Categorical(probs=shares).entropy().mean().item())
        layers.append(int(name.split(".")[2]))
    return Usage(layers, counts, entropies, len(torch.cat(next(iter(seen.values())))))


def check(found: Usage | None, expected: Usage) -> None:
    assert found is not None
    assert (found.layers, found.counts, found.tokens) == (expected.layers, expected.counts, expected.tokens)
    assert found.entropy == pytest.approx(expected.entropy, rel=1e-5)


@pytest.mark.parametrize("model_type", sorted(TINY.keys() - {"qwen3_5_moe"}))
def test_what_transformers_would_choose(checkpoints: dict[str, tuple[Path, Any]], model_type: str) -> None:
    folder, reference = checkpoints[model_type]
    model, expected = trainable(folder), expected_of(reference)
    assert expected.tokens == sum(batch.real_tokens for batch in SEEN) == 108
    balance = model.balance = Balance(model)
    usage = model.usage = ExpertUsage(model)
    usage.start()
    assert held_out_loss(model, SEEN, CPU) is not None
    check(usage.stop(), expected)
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        usage.start()
        step(model, SEEN)
        check(usage.stop(), expected)
        assert balance.counts.tolist() == expected.counts
    model.balance = None
    usage.start()
    step(model, SEEN)  # with a micro-batch in which nothing is learnt
    check(usage.stop(), expected)
    usage.start()
    assert usage.stop() is None


def test_nothing_is_counted_or_changed_while_it_is_off(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    folder = checkpoints[SIGMOID][0]
    plain, model = trainable(folder), trainable(folder)
    usage = model.usage = ExpertUsage(model)
    expected = step(plain, rate=0.5)
    usage.start()
    found = step(model, rate=0.5)
    counted = usage.stop()
    assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    step(model)
    usage.start()
    step(model, BATCHES[1:])
    again = usage.stop()
    assert counted is not None and again is not None
    assert (counted.tokens, again.tokens) == (103, 33)


def test_dead_experts(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    model = trainable(checkpoints[SIGMOID][0])
    usage = ExpertUsage(model)
    usage.start()
    usage.begin(Documents.from_lengths([2]))
    for router in usage.routers.values():
        (observe,) = router.observers
        observe(torch.tensor([[0, 1, 2], [0, 1, 5], [7, 7, 7]]), torch.ones(3, 8))  # the last is padding
    found = usage.stop()
    assert found is not None
    assert found.counts == [[2, 2, 1, 0, 0, 1, 0, 0]] * 2
    assert found.dead == [0.5, 0.5]
    assert found.entropy == pytest.approx([torch.tensor(8.0).log().item()] * 2)


def test_a_model_without_routers() -> None:
    with pytest.raises(ValueError, match="no router"):
        ExpertUsage(nn.Linear(2, 2))
