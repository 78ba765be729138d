"""Balance of trained routers: what is counted, the auxiliary loss beside transformers', the update of biases, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.adapters.lora import trainable_parameters
from models.blocks.balance import AuxiliaryLoss, Balance, BiasUpdate
from models.blocks.documents import Documents
from models.blocks.router import Router, SigmoidRouter
from models.checkpoint.export import export_hub
from models.decoder import CausalLM
from models.load import open_folder
from tests.balance_helpers import (
    BATCHES,
    COEFFICIENT,
    CPU,
    NOT_NORMALISED,
    SIGMOID,
    SOFTMAX,
    biases,
    config_of,
    micro_batch,
    real_documents,
    save_routed,
    step,
    trainable,
)
from tests.helpers import assert_close
from tests.tiny import save_tiny
from train.data.batches import IGNORED, Batch, empty_batch
from train.held_out import batch_loss, held_out_loss
from train.model import attach_balance
from train.optim import clip_gradients


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    return save_routed(tmp_path_factory)


def gradients(model: CausalLM, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """The loss of one micro-batch as it is trained on, and its gradients."""
    assert model.balance is not None
    model.zero_grad()
    model.balance.begin_step()
    loss = batch_loss(model, batch, batch.labelled)
    extra = model.balance.collect(1.0)
    loss = loss if extra is None else loss + extra
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def glm_choices(model: CausalLM, tokens: Tensor) -> Tensor:
    """int64 [L, E]: what the routers choose in a document alone, from scores computed here."""
    documents = Documents.from_lengths([len(tokens)])
    tables, x, counts = model.model.rope.tables(documents.positions), model.model.embed_tokens(tokens), []
    for layer in model.model.layers:
        if isinstance(router := getattr(layer.mlp, "gate", None), SigmoidRouter):
            attended = x + layer.self_attn(layer.input_layernorm(x), documents, tables)  # type: ignore[operator]
            scores = (layer.post_attention_layernorm(attended) @ router.weight.value.T).sigmoid()  # type: ignore[operator, union-attr]
            chosen = (scores + router.e_score_correction_bias).topk(router.rule.chosen).indices
            counts.append(torch.bincount(chosen.flatten(), minlength=router.out_features))
        x = layer(x, documents, tables)
    return torch.stack(counts)


def qwen_logits(reference: Any, batch: Batch) -> list[Tensor]:
    """Router logits [real tokens, E] of each layer, by transformers, each document alone."""
    outputs = [reference(input_ids=tokens[None], output_router_logits=True) for tokens, _ in real_documents(batch)]
    return [torch.cat(layer) for layer in zip(*(output.router_logits for output in outputs), strict=True)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model_type", [SOFTMAX, NOT_NORMALISED, SIGMOID])
@torch.no_grad()
def test_counts_are_the_choices_of_all_real_tokens(
    checkpoints: dict[str, tuple[Path, Any]], model_type: str, recompute: bool
) -> None:
    folder, reference = checkpoints[model_type]
    model = trainable(folder)
    model.activation_checkpointing = recompute
    expected = torch.zeros(2, 8, dtype=torch.int64)
    for batch in BATCHES:
        if model_type == SIGMOID:
            expected += sum(glm_choices(model, tokens) for tokens, _ in real_documents(batch))
        else:
            chosen = [logits.topk(3).indices.flatten() for logits in qwen_logits(reference, batch)]
            expected += torch.stack([torch.bincount(flat, minlength=8) for flat in chosen])
    assert expected.sum() == 2 * 3 * (20 + 9 + 41 + 33)

    model.balance = Balance(model)
    with torch.enable_grad():
        result = step(model)
    assert torch.equal(model.balance.counts, expected)
    imbalance = (expected.max(-1).values / expected.double().mean(-1)).mean().item()
    assert result.balance == {"load_imbalance": pytest.approx(imbalance)}
    assert imbalance > 1.2

    with torch.enable_grad():
        step(model)  # anew
    assert torch.equal(model.balance.counts, expected)
    held_out_loss(model, BATCHES, CPU)
    assert torch.equal(model.balance.counts, expected)


@pytest.mark.parametrize("method", [AuxiliaryLoss, BiasUpdate])
def test_padding_changes_nothing(checkpoints: dict[str, tuple[Path, Any]], method: type[Balance]) -> None:
    model = trainable(checkpoints[SOFTMAX if method is AuxiliaryLoss else SIGMOID][0])
    model.balance = method(model, 0.3)
    padded, plain = micro_batch((20, 9), seed=4), micro_batch((20, 9), seed=4, multiple=1)
    assert (len(padded.tokens), len(plain.tokens)) == (64, 29)
    loss, found = gradients(model, padded)
    counts = model.balance.counts.clone()
    expected_loss, expected = gradients(model, plain)
    assert torch.equal(counts, model.balance.counts)
    assert counts.sum() == 2 * 3 * 29
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for name, gradient in expected.items():
        assert_close(found[name], gradient, what=name)


@pytest.mark.parametrize("method", [AuxiliaryLoss, BiasUpdate])
def test_recomputation_changes_nothing(checkpoints: dict[str, tuple[Path, Any]], method: type[Balance]) -> None:
    results = []
    for recompute in (False, True):
        model = trainable(checkpoints[SOFTMAX if method is AuxiliaryLoss else SIGMOID][0])
        model.activation_checkpointing = recompute
        model.balance = method(model, 0.3)
        results.append((*gradients(model, BATCHES[0]), model.balance.counts, model.balance.end_step()))
    (loss, found, counts, logged), (expected_loss, expected, expected_counts, expected_logged) = results
    assert (loss, logged) == (expected_loss, expected_logged)
    assert torch.equal(counts, expected_counts)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_only_the_first_computation_of_a_pass_with_gradients_counts(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    model, batch = trainable(checkpoints[SIGMOID][0]), BATCHES[0]
    model.activation_checkpointing = True
    balance = model.balance = Balance(model)
    batch_loss(model, batch, 1.0).backward()  # computes the layers again, before the pass is collected
    balance.collect(1.0)
    assert balance.counts.sum() == 2 * 3 * batch.real_tokens
    with torch.no_grad():
        batch_loss(model, batch, 1.0)
    balance.collect(1.0)
    assert balance.counts.sum() == 2 * 3 * batch.real_tokens


def test_a_micro_batch_without_labels_is_counted_and_changes_no_gradient(
    checkpoints: dict[str, tuple[Path, Any]],
) -> None:
    model = trainable(checkpoints[SIGMOID][0])
    model.balance = Balance(model)
    empty = micro_batch((30,), seed=9)
    empty = Batch(empty.tokens, torch.full_like(empty.labels, IGNORED), empty.documents, 30, 0)
    norm = step(model, BATCHES).grad_norm
    assert model.balance.counts.sum() == 2 * 3 * (20 + 9 + 41 + 33)
    result = step(model, (*BATCHES, empty))
    assert model.balance.counts.sum() == 2 * 3 * (20 + 9 + 41 + 33 + 30)
    assert result.grad_norm == norm


@pytest.mark.parametrize("method", [AuxiliaryLoss, BiasUpdate])
def test_a_micro_batch_of_padding_changes_nothing(
    checkpoints: dict[str, tuple[Path, Any]], method: type[Balance]
) -> None:
    results = []
    for batches in (BATCHES, (empty_batch(), *BATCHES, empty_batch())):
        model = trainable(checkpoints[SOFTMAX if method is AuxiliaryLoss else SIGMOID][0])
        model.balance = method(model, 0.3)
        results.append((step(model, batches, rate=0.5), model.balance.counts, model.state_dict()))
    (expected, expected_counts, expected_tensors), (found, counts, tensors) = results
    assert found == expected  # all of them finite
    assert torch.equal(counts, expected_counts)
    for name, tensor in expected_tensors.items():
        assert torch.equal(tensors[name], tensor), name


def test_the_load_is_that_of_all_processes(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    model = trainable(checkpoints[SIGMOID][0])
    balance = model.balance = BiasUpdate(model, 0.5)
    for bias in balance.buffers().values():
        bias.zero_()
    theirs = torch.zeros(2, 8, dtype=torch.int64)
    theirs[0, 7] = 10**6  # of the first layer, the other process's choices outnumber ours
    balance.reduce = lambda ours: ours.add_(theirs)
    step(model)
    assert balance.counts.sum() == 2 * 3 * (20 + 9 + 41 + 33) + 10**6
    first, second = balance.buffers().values()
    assert first.tolist() == [0.5] * 7 + [-0.5]
    assert second.tolist() != first.tolist()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model_type", [SOFTMAX, NOT_NORMALISED])
def test_loss_and_gradients_are_those_of_transformers(
    checkpoints: dict[str, tuple[Path, Any]], model_type: str, recompute: bool
) -> None:
    folder, reference = checkpoints[model_type]
    model = trainable(folder)
    model.activation_checkpointing = recompute
    model.balance = AuxiliaryLoss(model, COEFFICIENT)
    tokens = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    labels = torch.cat((tokens[:, 1:], tokens.new_full((2, 1), IGNORED)), 1)
    documents = Documents.from_lengths([32, 32])

    loss, found = gradients(model, Batch(tokens.flatten(), labels.flatten(), documents, 64, 62))
    reference.zero_grad()
    expected = reference(input_ids=tokens, labels=tokens, output_router_logits=True)
    expected.loss.backward()
    assert_close(torch.tensor(loss), expected.loss.detach(), what="loss")
    assert_close(torch.tensor(model.balance.end_step()["aux_loss"]), expected.aux_loss.detach(), what="auxiliary loss")
    routers = 0
    theirs = dict(reference.named_parameters())
    for name, gradient in found.items():
        hub = name.removesuffix(".value")
        hub = hub.removesuffix(".weight") if ".experts." in hub else hub
        assert_close(gradient, theirs[hub].grad, what=name)
        routers += hub.endswith("mlp.gate.weight")
    assert routers == 2
    assert len(found) == len(theirs)


def test_a_micro_batch_weighs_as_many_tokens_as_it_has(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

    folder, reference = checkpoints[SOFTMAX]
    reference.zero_grad()
    labelled, real = sum(b.labelled for b in BATCHES), sum(b.real_tokens for b in BATCHES)
    assert BATCHES[0].real_tokens != BATCHES[1].real_tokens
    loss, auxiliary = torch.zeros(()), torch.zeros(())
    for batch in BATCHES:
        for tokens, labels in real_documents(batch):
            logits = reference(input_ids=tokens[None]).logits[0]
            loss = loss + nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labelled
        one = load_balancing_loss_func(tuple(qwen_logits(reference, batch)), 8, 3)
        assert isinstance(one, Tensor)
        auxiliary = auxiliary + batch.real_tokens / real * one
    (loss + COEFFICIENT * auxiliary).backward()

    model = trainable(folder)
    model.balance = AuxiliaryLoss(model, COEFFICIENT)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # A large rate, so that what was added to a parameter has digits left in the difference.
    result = step(model, rate=256.0)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)  # the cross-entropy alone
    assert result.balance["aux_loss"] == pytest.approx(auxiliary.item(), rel=1e-5)
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            assert_close((before[name] - parameter.detach()) / 256, theirs[name.removesuffix(".value")].grad, what=name)


def test_an_even_load_costs_as_much_as_experts_are_chosen(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    model = trainable(checkpoints[SOFTMAX][0])
    balance = AuxiliaryLoss(model, 1.0)
    balance.begin(Documents.from_lengths([8]))
    for router in balance.routers.values():
        (observe,) = router.observers
        observe(torch.arange(24).view(8, 3) % 8, torch.full((8, 8), 1 / 8))
    assert balance.collect(1.0).item() == pytest.approx(3)
    assert balance.end_step() == {"aux_loss": pytest.approx(3), "load_imbalance": 1.0}


def test_biases_move_against_the_load_of_the_whole_step_and_nothing_else_does(
    checkpoints: dict[str, tuple[Path, Any]],
) -> None:
    plain, model = (trainable(checkpoints[SIGMOID][0]) for _ in range(2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.balance = BiasUpdate(model, 0.02)
    result, expected = step(model, rate=0.5), step(plain, rate=0.5)
    assert (result.loss, result.grad_norm, expected.balance) == (expected.loss, expected.grad_norm, {})
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    counts = model.balance.counts
    moved = 0
    for layer, (name, bias) in enumerate(model.balance.buffers().items()):
        load = counts[layer].double()
        assert torch.equal(bias, before[name] + 0.02 * (load.mean() - load).sign().float()), name
        moved += int((bias != before[name]).sum())
    assert moved >= 14


def test_an_expert_at_the_mean_keeps_its_bias(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    model = trainable(checkpoints[SIGMOID][0])
    balance = BiasUpdate(model, 0.5)
    for bias in balance.buffers().values():
        bias.zero_()
    balance.begin(Documents.from_lengths([8]))
    for router in balance.routers.values():
        (observe,) = router.observers
        observe(torch.tensor([[0, 0, 1, 2, 3, 4, 5, 6]]), torch.zeros(1, 8))
    assert balance.collect(1.0) is None
    assert balance.end_step() == {"load_imbalance": 2.0}
    for bias in balance.buffers().values():
        assert bias.tolist() == [-0.5, 0, 0, 0, 0, 0, 0, 0.5]


def test_biases_even_out_the_load(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    model = trainable(checkpoints[SIGMOID][0])
    model.balance = BiasUpdate(model, 0.02)
    imbalance = [step(model, BATCHES[:1]).balance["load_imbalance"] for _ in range(30)]
    assert imbalance[0] > 2.5
    assert imbalance[-1] < 1.35


@pytest.mark.parametrize("model_type", ["glm4_moe", "glm_moe_dsa", "afmoe"])
def test_moved_biases_are_exported_under_the_names_of_the_hub(tmp_path: Path, model_type: str) -> None:
    save_tiny(tmp_path / "hub", model_type, num_hidden_layers=2)
    model = trainable(tmp_path / "hub")
    model.balance = BiasUpdate(model, 0.25)
    step(model, BATCHES[:1])
    export_hub(model, tmp_path / "out", tmp_path / "hub")
    before, after = biases(tmp_path / "hub"), biases(tmp_path / "out")
    assert len(before) == len(model.balance.routers) == 1
    assert before.keys() == after.keys()
    for name, bias in after.items():
        assert bias.dtype == torch.float32
        assert set(((bias - before[name]) / 0.25).round(decimals=4).tolist()) <= {-1.0, 0.0, 1.0}
        assert not torch.equal(bias, before[name])


def test_without_balance_a_step_is_what_it_was(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    model, by_hand = (trainable(checkpoints[SIGMOID][0]) for _ in range(2))
    config = config_of(checkpoints[SIGMOID][0])
    assert config.train.balance == "none"
    attach_balance(model, config, open_folder(checkpoints[SIGMOID][0]))
    assert model.balance is None
    assert all(not module.observers for module in model.modules() if isinstance(module, Router))
    assert step(model, rate=0.5).balance == {}
    parameters = trainable_parameters(by_hand)
    for batch in BATCHES:
        batch_loss(by_hand, batch, sum(b.labelled for b in BATCHES)).backward()
    clip_gradients(parameters, None, 1)
    torch.optim.SGD([parameter for _, parameter in parameters], lr=0.5).step()
    for (name, ours), (_, expected) in zip(model.state_dict().items(), by_hand.state_dict().items(), strict=True):
        assert torch.equal(ours, expected), name
