"""Checkpoints: exact, atomic under kill -9 at every point, verified on reading."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.checkpoint.tensorfile import read_header
from quant.common.errors import NibbleError
from tests.checkpoint_helpers import SHARD, names, save, save_checkpoint, tensors_of, weights_of
from train.optim import build_optimizer
from train.state.checkpoint import (
    latest_checkpoint,
    read_checkpoint,
)
from train.state.fingerprint import START_OVER
from train.state.optimizer_state import optimizer_state


def parameters_like(tensors: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros_like(tensor)) for name, tensor in tensors.items()}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "epoch": 2,
        "loss": 0.1 + 0.2,
        "tiny": 5e-324,
        "rows": [1, None, "ü"],
        "fingerprint": {"a.b": 1},
    }
    path = save(tmp_path / "checkpoints", 123, **state)
    assert path == tmp_path / "checkpoints" / "step-000123"
    assert names(path) == ["manifest.json", "optimizer", "state.json", "weights"]
    assert names(path / "weights") == ["shard-00001-model-00001-of-00001.safetensors"]
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.path == path
    assert checkpoint.step == 123
    assert checkpoint.state == {"step": 123, **state}
    parameters = parameters_like(tensors_of(123))
    checkpoint.load_tensors(parameters.items())
    for name, tensor in tensors_of(123).items():
        assert torch.equal(parameters[name], tensor)
    optimizer = checkpoint.optimizer_state()
    assert optimizer.values == {"kind": "test", "steps": {}}
    assert torch.equal(optimizer.tensors["step.layers.0.A"], torch.tensor(123.0))


def test_no_pickle_in_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for file in (file for file in path.rglob("*") if file.is_file()):
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            read_header(file)  # which sees that it is JSON, with the tensors behind it and nothing else


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, name: str) -> None:
    """Weights and optimiser after 5 steps, and after 2 steps, a checkpoint and 3 more."""

    def start() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(1)
        parameters = {"A": nn.Parameter(torch.randn(2, 16, 150)), "b": nn.Parameter(torch.randn(30))}
        return parameters, build_optimizer(name, parameters.items(), 0.01, weight_decay=0.1)

    def run(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    whole, optimizer = start()
    run(whole, optimizer, range(5))

    first, optimizer = start()
    run(first, optimizer, range(2))
    save_checkpoint(tmp_path, 2, first, optimizer_state(optimizer), {}, 2)
    run(first, optimizer, range(2, 3))  # a step that the kill loses

    second, optimizer = start()
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    checkpoint.load_tensors(second.items())
    assert checkpoint.load_optimizer(optimizer) == ()
    run(second, optimizer, range(2, 5))
    for key, parameter in whole.items():
        assert torch.equal(parameter, second[key]), key


def as_older_format(path: Path, version: int) -> None:
    """Turn a checkpoint of one process into what versions before wrote."""
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "rng": {"torch": "AAAA", "cuda": []}}))
    if version == 1:
        for what in ("weights", "optimizer"):
            save_file(load_file(path / what / SHARD), path / f"{what}.safetensors", metadata={"format": "pt"})
            shutil.rmtree(path / what)
    files = {
        str(file.relative_to(path)): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in path.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps({"format": version, "step": state["step"], "files": files}))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_older_formats_are_read(tmp_path: Path, name: str, version: int) -> None:
    parameters = {"A": nn.Parameter(torch.ones(2, 16, 150)), "b": nn.Parameter(torch.ones(30))}
    optimizer = build_optimizer(name, parameters.items(), 0.01)
    for parameter in parameters.values():
        parameter.grad = torch.arange(float(parameter.numel())).view(parameter.shape)
    optimizer.step()
    path = save_checkpoint(tmp_path, 1, parameters, optimizer_state(optimizer), {"rows": 7}, 2)
    as_older_format(path, version)
    assert (path / "weights").is_dir() == (version == 2)

    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (1, {"rows": 7})
    loaded = parameters_like(parameters)
    checkpoint.load_tensors(loaded.items())
    assert all(torch.equal(loaded[key], parameters[key]) for key in parameters)
    other = build_optimizer(name, loaded.items(), 0.01)
    assert checkpoint.load_optimizer(other) == ()
    expected, actual = optimizer_state(optimizer), optimizer_state(other)
    assert actual.values == expected.values
    assert actual.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, actual.tensors[key]) for key, tensor in expected.tensors.items())


def test_an_optimiser_that_has_made_no_step(tmp_path: Path) -> None:
    parameters = {"a": nn.Parameter(torch.ones(3))}
    path = save_checkpoint(
        tmp_path, 0, parameters, optimizer_state(build_optimizer("adamw", parameters.items(), 0.1)), {}, 1
    )
    for _ in range(2):
        assert read_checkpoint(path).load_optimizer(build_optimizer("adamw", parameters.items(), 0.1)) == ()
        shutil.rmtree(path / "optimizer", ignore_errors=True)  # as a copy that leaves out empty folders


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000006", "step-000008"]
    save(tmp_path, 1_000_000, keep=1)
    assert names(tmp_path) == ["step-1000000"]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (2, 4):
        save(tmp_path, step)
    weights_of(tmp_path / "step-000004").unlink()
    save(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000006"]


def test_taken_up_again_from_an_earlier_step(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    save(tmp_path, 3, keep=3)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 2, keep=1, note="old")
    save(tmp_path, 2, keep=1, note="new")
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state["note"] == "new"
    assert names(tmp_path) == ["step-000002"]


def test_no_checkpoints(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "not-there") is None
    (tmp_path / ".partial-step-000003").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_other_tensors(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path, 2))
    parameters = parameters_like(tensors_of(2))
    del parameters["layers.0.B"]
    for i in range(5):
        parameters[f"layers.{i + 1}.A"] = nn.Parameter(torch.zeros(2))
    with pytest.raises(NibbleError) as caught:
        checkpoint.load_tensors(parameters.items())
    assert str(caught.value) == (
        f"{checkpoint.path} belongs to another set of trained tensors:"
        " it lacks layers.1.A, layers.2.A, layers.3.A and 2 more; it has, and this run doesn't train, layers.0.B.\n"
        f"Set adapter and model as they were, or {START_OVER}."
    )


@pytest.mark.parametrize(
    ("other", "shown"), [(torch.zeros(3, 4, 7), "[3, 4, 7] F32"), (torch.zeros(3, 5, 7).half(), "[3, 5, 7] F16")]
)
def test_other_shape_or_dtype(tmp_path: Path, other: Tensor, shown: str) -> None:
    checkpoint = read_checkpoint(save(tmp_path, 2))
    parameters = parameters_like(tensors_of(2))
    parameters["layers.0.A"] = nn.Parameter(other)
    with pytest.raises(NibbleError) as caught:
        checkpoint.load_tensors(parameters.items())
    assert str(caught.value) == (
        f"{checkpoint.path}: layers.0.A is [3, 5, 7] F32, this run's is {shown}.\n"
        f"Set adapter and model as they were, or {START_OVER}."
    )
    assert not parameters["layers.0.B"].any()


def test_other_config(tmp_path: Path) -> None:
    saved = {"train.learning_rate": 2e-4, "train.seed": 0, "adapter.rank": 32}
    checkpoint = read_checkpoint(save(tmp_path, 2, fingerprint=saved))
    checkpoint.require_same_config(dict(saved))
    with pytest.raises(NibbleError) as caught:
        checkpoint.require_same_config({**saved, "train.seed": 1})
    assert str(caught.value) == (
        f"{checkpoint.path} was written by another config: train.seed is 1 now, 0 there.\n"
        f"Set it as before to continue it, or {START_OVER}."
    )
    with pytest.raises(NibbleError, match=r"train.seed is 1 .*; adapter.rank is 8 now, 32 there\.\nSet them as before"):
        checkpoint.require_same_config({**saved, "train.seed": 1, "adapter.rank": 8})


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NibbleError) as caught:
        save(tmp_path / "file" / "checkpoints", 4)
    assert str(caught.value) == (
        f"{tmp_path}/file/checkpoints can't be written: Not a directory.\n"
        "The checkpoint of step 4 was not written; there is no earlier one."
    )


def test_copied_checkpoint_is_read_from_its_new_place(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path / "a", 2), tmp_path / "elsewhere")
    assert read_checkpoint(tmp_path / "elsewhere").step == 2
