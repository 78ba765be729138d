"""train.balance: what it fits, and runs with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import load_model
from models.blocks.balance import Balance, BiasUpdate
from models.load import open_folder
from quant.common.errors import NibbleError
from tests.balance_helpers import (
    COEFFICIENT,
    CPU,
    SIGMOID,
    SOFTMAX,
    biases,
    config_of,
    save_routed,
    trainable,
)
from tests.helpers import assert_close
from tests.run_helpers import World, curve, error_of, make_world, messages, questions, settings, write_tokenizer
from tests.tiny import save_tiny
from train.__main__ import main
from train.model import attach_balance, check_model, load_trainable_model
from train.output.metrics import read_metrics


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    return save_routed(tmp_path_factory)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "train.balance_rate=0.1",
            "train.balance_rate with train.balance: none: there is nothing that it would be the rate of. Set "
            "train.balance_rate: null (or leave it out), or train.balance: aux_loss or bias_update.",
        ),
        (
            "train.balance=bias_update",
            "train.balance: bias_update with adapter.kind: lora: it changes the routers' bias, which an adapter can't "
            "hold, so the saved adapter would not compute what was trained. Set train.balance: none, or adapter.kind: "
            "none.",
        ),
    ],
)
def test_keys_that_do_not_fit_each_other(override: str, expected: str) -> None:
    with pytest.raises(NibbleError) as error:
        config_of(Path("x"), override, "adapter.kind=lora")
    assert str(error.value) == f"--set {override}: {expected}"


def complaint(folder: Path, *overrides: str) -> str:
    with pytest.raises(NibbleError) as error:
        check_model(config_of(folder, *overrides), open_folder(folder), CPU)
    return str(error.value)


def test_methods_that_do_not_fit_the_model(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    sigmoid, softmax = checkpoints[SIGMOID][0], checkpoints[SOFTMAX][0]
    sentence = "train.balance: aux_loss is for softmax routers; those of glm4_moe_lite are sigmoid routers, balanced by"
    assert complaint(sigmoid, "train.balance=aux_loss") == (
        f"{sentence} their bias.\nSet train.balance: bias_update, or none."
    )
    assert complaint(sigmoid, "train.balance=aux_loss", "adapter.kind=lora") == (
        f"{sentence} their bias.\nSet train.balance: bias_update with adapter.kind: none, or none."
    )
    assert complaint(softmax, "train.balance=bias_update") == (
        "train.balance: bias_update is for sigmoid routers; those of qwen3_5_moe_text are softmax routers, without a "
        "bias to update.\nSet train.balance: aux_loss, or none."
    )
    assert complaint(softmax, "train.balance=aux_loss", "adapter.kind=lora", "adapter.targets=[attention, o_proj]") == (
        "train.balance: aux_loss, but no router is trained: adapter.targets has none (attention, o_proj).\n"
        "Add router to adapter.targets, or set train.balance: none."
    )


@pytest.mark.parametrize("target", ["router", "mlp.gate.weight"])
def test_a_router_with_lora_is_trained(checkpoints: dict[str, tuple[Path, Any]], target: str) -> None:
    folder = checkpoints[SOFTMAX][0]
    config = config_of(folder, "train.balance=aux_loss", "adapter.kind=lora", f"adapter.targets=[{target}]")
    check_model(config, open_folder(folder), CPU)


def test_a_model_without_experts(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    values = json.loads((checkpoints[SIGMOID][0] / "config.json").read_text())
    values["mlp_layer_types"] = ["dense"] * 3
    (tmp_path / "config.json").write_text(json.dumps(values))
    folder = open_folder(checkpoints[SIGMOID][0])
    source = type(folder)(tmp_path, folder.name, values, None)
    with pytest.raises(NibbleError, match="bias_update, but no layer of this glm4_moe_lite has experts") as error:
        check_model(config_of(tmp_path, "train.balance=bias_update"), source, CPU)
    assert str(error.value).endswith("Set train.balance: none.")
    with pytest.raises(ValueError, match="no router"):
        Balance(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="only sigmoid routers have a bias"):
        BiasUpdate(trainable(checkpoints[SOFTMAX][0]), 0.1)


def test_the_rate(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    def rate(folder: Path, values: dict[str, Any] | None, *overrides: str) -> float:
        config, source = config_of(folder, *overrides), open_folder(folder)
        source = type(source)(tmp_path, source.name, source.config if values is None else values, None)
        model = load_model(folder, storage="none", dtype=torch.float32).requires_grad_(True)
        attach_balance(model, config, source)
        assert model.balance is not None
        return model.balance.rate

    sigmoid, softmax = checkpoints[SIGMOID][0], checkpoints[SOFTMAX][0]
    auxiliary = "train.balance=aux_loss"
    assert rate(sigmoid, None, "train.balance=bias_update") == 1e-3
    assert rate(sigmoid, None, "train.balance=bias_update", "train.balance_rate=0.5") == 0.5
    assert rate(softmax, None, auxiliary) == COEFFICIENT
    assert rate(softmax, None, auxiliary, "train.balance_rate=0.5") == 0.5
    assert rate(softmax, {}, auxiliary) == 1e-3
    assert rate(softmax, {"text_config": {"router_aux_loss_coef": 0.07}}, auxiliary) == 0.07
    with pytest.raises(NibbleError) as error:
        rate(softmax, {"router_aux_loss_coef": 0.0}, auxiliary)
    assert str(error.value) == (
        f"{tmp_path / 'config.json'}: router_aux_loss_coef must be a positive number, got 0.0.\n"
        "train.balance: aux_loss needs it, or train.balance_rate in its place."
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


FULL = {"model__storage": "none", "adapter__kind": "none", "train__balance": "bias_update", "train__balance_rate": 0.03}


def test_a_resumed_run_goes_on_with_the_biases_and_exports_them(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, changes = tmp_path / "run", {**FULL, "train__save_every": 3, "train__max_steps": 6}
    assert main(settings(world, out, **changes)) == 0
    shown = capsys.readouterr()
    assert "  balance   bias_update, rate 0.03\n" in shown.out
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"]
    assert all(1 <= record["load_imbalance"] <= 2 for record in records)
    assert f"  load_imbalance {records[-1]['load_imbalance']:.3f}  lr " in shown.err
    expected, steps = biases(out / "model"), curve(out)
    before = biases(world.model)
    assert expected.keys() == before.keys()
    for name, bias in expected.items():
        # Every step moved it by one rate or not at all.
        moves = ((bias - before[name]) / 0.03).double()
        assert_close(moves, moves.round(), 1e-4)
        assert 0 < moves.abs().max() < 6.5

    shutil.rmtree(out / "checkpoints" / "step-000006")
    shutil.rmtree(out / "model")
    (out / "run.json").unlink()
    assert main(settings(world, out, **changes)) == 0
    assert "resuming from" in capsys.readouterr().err
    assert curve(out) == steps
    assert all(torch.equal(bias, expected[name]) for name, bias in biases(out / "model").items())

    other = settings(world, out, **{**changes, "train__balance_rate": 0.1, "train__max_steps": 6})
    assert "train.balance_rate is 0.1 now, 0.03 there" in error_of(other, capsys)


def test_router_adapters_with_the_auxiliary_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = questions(64, seed=0)
    folder = tmp_path / "model"
    folder.mkdir()
    size = write_tokenizer(folder, [q + a for q, a in pairs])
    save_tiny(folder, SOFTMAX, vocab_size=size, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    (tmp_path / "rows.jsonl").write_text(messages(pairs))
    changes = {"adapter__targets": ["router"], "train__balance": "aux_loss", "train__max_steps": 12}
    changes |= {"train__balance_rate": 3.0, "train__learning_rate": 5e-2, "train__tensorboard": True}
    out = tmp_path / "run"
    world = World(folder, tmp_path / "rows.jsonl", tmp_path / "rows.jsonl")
    assert main(settings(world, out, **changes)) == 0
    shown = capsys.readouterr()
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"]
    auxiliary = [r["aux_loss"] for r in records]
    assert auxiliary[0] > 2.1  # 2 is even
    assert auxiliary[-1] < 2 + 0.7 * (auxiliary[0] - 2)
    assert f"  aux_loss {auxiliary[-1]:.3f}  load_imbalance {records[-1]['load_imbalance']:.3f}  lr " in shown.err
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    events = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert b"train/aux_loss" in events
    assert b"train/load_imbalance" in events


def test_a_run_loads_what_was_checked(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    folder = checkpoints[SIGMOID][0]
    model = load_trainable_model(config_of(folder, "train.balance=bias_update"), open_folder(folder), CPU).model
    assert isinstance(model.balance, BiasUpdate)
    assert set(model.balance.buffers()) == {n for n, _ in model.named_buffers() if n.endswith("correction_bias")}
