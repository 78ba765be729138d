"""One optimiser step and the held-out loss, against torch and transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models import load_model
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.blocks.documents import Documents
from models.decoder import CausalLM
from parallel.shards import Shards
from parallel.world import ALONE
from quant.common.errors import NibbleError
from tests.dist_workers.training import saved_steps
from tests.helpers import assert_close, save_tiny_glm
from tests.processes import run_processes
from train import loop
from train.data.batches import IGNORED, Batch, empty_batch
from train.held_out import batch_loss, held_out_loss
from train.loop import StepResult, training_step
from train.optim import NonFiniteError, build_optimizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("loop")
    return folder, save_tiny_glm(folder, num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2)


@pytest.fixture
def model(checkpoint: tuple[Path, Any]) -> CausalLM:
    made = load_model(checkpoint[0], storage="none", dtype=torch.float32)
    add_lora(made, AdapterSpec(("attention", "experts"), 4, 8.0))
    with torch.no_grad():
        for name, parameter in trainable_parameters(made):
            if name.endswith(".B"):  # zero at the start, which would hide A's gradients
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return made


def batch(lengths: Sequence[int], labelled: int, seed: int) -> Batch:
    """Documents of random tokens, of which `labelled` random ones carry loss; the last document is padding."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    padding = -count % 64
    tokens = torch.randint(1, 128, (count,), generator=generator)
    chosen = torch.randperm(count, generator=generator)[:labelled]
    labels = torch.full((count,), IGNORED)
    labels[chosen] = torch.randint(0, 128, (labelled,), generator=generator)
    return Batch(
        torch.cat((tokens, torch.zeros(padding, dtype=torch.int64))),
        torch.cat((labels, torch.full((padding,), IGNORED))),
        Documents.from_lengths([*lengths, *([padding] if padding else [])]),
        count,
        labelled,
    )


def expected_loss(logits_of: Any, batches: Sequence[Batch]) -> Tensor:
    """The mean over all labelled tokens, from the logits of each document alone."""
    total, count = torch.zeros(()), 0
    for one in batches:
        start = 0
        for length in one.documents.lengths:
            logits = logits_of(one.tokens[None, start : start + length])[0]
            labels = one.labels[start : start + length]
            total = total + cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            count += int((labels != IGNORED).sum())
            start += length
    return total / count


def sgd(model: CausalLM, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in trainable_parameters(model)], lr=rate)


def snapshot(model: CausalLM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


BATCHES = (batch((20, 9, 40), 50, seed=1), batch((33,), 3, seed=2), batch((5, 6), 1, seed=3))


def test_a_step_follows_the_gradient_of_the_mean_over_all_labelled_tokens(model: CausalLM) -> None:
    expected = expected_loss(model, BATCHES)
    parameters = trainable_parameters(model)
    gradients = torch.autograd.grad(expected, [parameter for _, parameter in parameters])
    before = snapshot(model)
    result = training_step(Shards(model), sgd(model, 0.5), BATCHES, step=1, max_grad_norm=None, device=CPU)
    assert_close(torch.tensor(result.loss), expected.detach(), what="loss")
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in gradients]))
    assert_close(torch.tensor(result.grad_norm), norm, what="gradient norm")
    assert (result.tokens, result.labelled) == (20 + 9 + 40 + 33 + 5 + 6, 54)
    for (name, parameter), gradient in zip(parameters, gradients, strict=True):
        assert_close((before[name] - parameter.detach()) / 0.5, gradient, 1e-4, what=name)
    trained = {name for name, _ in parameters}
    for name, tensor in snapshot(model).items():
        assert name in trained or torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for _, parameter in parameters)


def test_the_loss_is_that_of_transformers(checkpoint: tuple[Path, Any]) -> None:
    folder, reference = checkpoint
    model = load_model(folder, storage="none", dtype=torch.float32)
    with torch.no_grad():
        expected = expected_loss(lambda tokens: reference(tokens).logits, BATCHES[:1])
        assert_close(batch_loss(model, BATCHES[0], denominator=50), expected)


def test_gradients_are_clipped_to_the_norm(model: CausalLM) -> None:
    before = snapshot(model)
    parameters = trainable_parameters(model)
    result = training_step(Shards(model), sgd(model, 1.0), BATCHES, step=1, max_grad_norm=0.01, device=CPU)
    assert result.grad_norm > 0.02  # as measured before clipping
    moved = torch.cat([(before[name] - parameter.detach()).flatten() for name, parameter in parameters])
    assert_close(torch.linalg.vector_norm(moved), torch.tensor(0.01), 1e-3)


def test_a_micro_batch_without_labels_adds_nothing(model: CausalLM) -> None:
    empty = batch((30,), 0, seed=9)
    with_it = training_step(Shards(model), sgd(model, 0.0), [BATCHES[0], empty], step=1, max_grad_norm=None, device=CPU)
    alone = training_step(Shards(model), sgd(model, 0.0), [BATCHES[0]], step=1, max_grad_norm=None, device=CPU)
    assert (with_it.loss, with_it.grad_norm) == (alone.loss, alone.grad_norm)


def test_a_step_without_labels_is_an_error(model: CausalLM) -> None:
    with pytest.raises(NibbleError, match=r"step 3 has no token to learn"):
        training_step(
            Shards(model),
            sgd(model, 1.0),
            [batch((30,), 0, seed=9)],
            step=3,
            max_grad_norm=1.0,
            device=CPU,
        )


@pytest.mark.parametrize("optimizer_name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_leaves_weights_and_optimiser_alone(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, what: str, optimizer_name: str
) -> None:
    parameters = trainable_parameters(model)
    optimizer = build_optimizer(optimizer_name, parameters, 1e-3)
    training_step(Shards(model), optimizer, BATCHES, step=1, max_grad_norm=1.0, device=CPU)
    before = snapshot(model)
    state = [{k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)} for _, p in parameters]
    victim = parameters[3]

    def spoilt(*args: Any, **kwargs: Any) -> Tensor:
        loss = batch_loss(*args, **kwargs)
        # The root of 0 is 0, and its derivative infinite.
        return loss * float("nan") if what == "loss" else loss + (victim[1].sum() * 0).sqrt()

    monkeypatch.setattr(loop, "batch_loss", spoilt)
    named = "the loss" if what == "loss" else f"the gradient of {victim[0]}"
    with pytest.raises(NonFiniteError, match=rf"step 2: {named} is not finite \(nan\)\. No weight was changed"):
        training_step(Shards(model), optimizer, BATCHES, step=2, max_grad_norm=1.0, device=CPU)
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, before[name]), name
    for (name, parameter), old in zip(parameters, state, strict=True):
        for key, value in old.items():
            assert torch.equal(optimizer.state[parameter][key], value), (name, key)


def test_bfloat16_gradients_are_measured_in_float32(checkpoint: tuple[Path, Any]) -> None:
    model = load_model(checkpoint[0], storage="none", dtype=torch.bfloat16)
    model.requires_grad_(True)  # bfloat16, but for float32 routers
    parameters: list[tuple[str, nn.Parameter]] = trainable_parameters(model)
    part = batch_loss(model, BATCHES[0], 50)
    part.backward()
    expected = sum(parameter.grad.double().pow(2).sum() for _, parameter in parameters if parameter.grad is not None)
    for _, parameter in parameters:
        parameter.grad = None
    result = training_step(Shards(model), sgd(model, 0.0), BATCHES[:1], step=1, max_grad_norm=1.0, device=CPU)
    assert_close(torch.tensor(result.grad_norm), torch.as_tensor(expected).sqrt().float())


# --- held-out loss


@pytest.mark.parametrize("training", [True, False])
def test_held_out_loss_is_the_mean_over_labelled_tokens(model: CausalLM, training: bool) -> None:
    model.train(training)
    model.activation_checkpointing = True
    done: list[int] = []
    loss = held_out_loss(model, BATCHES, CPU, progress=done.append)
    assert model.training is training
    assert done == [0, 1, 2]
    assert loss is not None
    with torch.no_grad():
        assert_close(torch.tensor(loss), expected_loss(model, BATCHES))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_empty_batch_has_no_loss_and_zero_gradients(model: CausalLM) -> None:
    loss = batch_loss(model, empty_batch(), 7)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in trainable_parameters(model):
        assert parameter.grad is not None, name  # or the processes would not exchange the same gradients
        assert not parameter.grad.any(), name
    assert held_out_loss(model, [*BATCHES, empty_batch()], CPU) == held_out_loss(model, BATCHES, CPU)


def test_held_out_loss_can_be_stopped(model: CausalLM) -> None:
    assert held_out_loss(model, BATCHES, CPU, stop=lambda: True) is None


def test_held_out_rows_without_labels_are_an_error(model: CausalLM) -> None:
    with pytest.raises(NibbleError, match="held-out rows have no token to learn"):
        held_out_loss(model, [batch((30,), 0, seed=9)], CPU)


def test_a_held_out_loss_that_is_not_finite_is_an_error(model: CausalLM) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NibbleError, match="the held-out loss is nan"):
        held_out_loss(model, BATCHES, CPU)


# --- checkpoints by the clock


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [4, 8, 10]),  # ten minutes
        ({"save_minutes": 3.5}, [2, 4, 6, 8, 10]),
        ({"save_minutes": None}, [10]),
        ({"save_minutes": None, "save_every": 7}, [7, 10]),
        ({"save_every": 3}, [3, 6, 9, 10]),  # with every checkpoint the ten minutes begin anew
    ],
)
def test_checkpoints_by_the_clock(
    checkpoint: tuple[Path, Any], tmp_path: Path, settings: dict[str, Any], expected: list[int]
) -> None:
    assert saved_steps(ALONE, str(checkpoint[0]), str(tmp_path), [150.0], settings) == expected


def test_the_first_processs_clock_decides_for_all(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    for others in (0.0, 1000.0):
        arguments = str(checkpoint[0]), str(tmp_path), [150.0, others], {}
        assert run_processes(2, "tests.dist_workers.training:saved_steps", *arguments) == [[4, 8, 10]] * 2


def test_window_measures_between_lines() -> None:
    window = loop._Window()
    window.add(StepResult(loss=4.0, grad_norm=1.0, tokens=100, labelled=10, balance={"aux_loss": 1.0}), seconds=0.5)
    window.add(StepResult(loss=1.0, grad_norm=3.0, tokens=300, labelled=90, balance={"aux_loss": 2.0}), seconds=0.5)
    assert window.tokens_per_second == pytest.approx(400)
    assert window.mean() == StepResult(1.3, 2.0, 400, 100, {"aux_loss": 1.5})  # (4 · 10 + 1 · 90) / 100
    window.start_line()
    window.add(StepResult(loss=7.0, grad_norm=5.0, tokens=50, labelled=5), seconds=2.0)
    assert window.tokens_per_second == pytest.approx(25)
    assert window.mean() == StepResult(7.0, 5.0, 50, 5)
    assert window.seconds_per_step == pytest.approx(1.0)
