"""--extend-to: a finished run goes on, and what becomes of its learning rate."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import train.loop
from tests.run_helpers import World, curve, error_of, make_world, settings
from train.__main__ import main
from train.output.metrics import read_metrics

WEIGHTS = Path("adapter") / "adapter_model.safetensors"
SHORT = {"model__storage": "none", "train__max_steps": 2, "train__gradient_accumulation": 2}
CONSTANT = {**SHORT, "train__schedule": "constant", "train__warmup_ratio": 0}
COSINE = {**SHORT, "train__schedule": "cosine", "train__warmup_ratio": 0.3}
DONE = "; there is nothing left to do."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def cosine(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, and then three more."""
    out = tmp_path_factory.mktemp("cosine") / "run"
    assert main(settings(world, out, **COSINE)) == 0
    shutil.copytree(out, out.with_name("two-steps"))
    assert main([*settings(world, out, **COSINE), "--extend-to", "5"]) == 0
    return out


@pytest.fixture
def two_steps(cosine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cosine.with_name("two-steps"), tmp_path / "run"))


def test_a_constant_rate_goes_on_as_if_the_run_had_been_that_long(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, out = tmp_path / "long", tmp_path / "run"
    assert main(settings(world, long, **{**CONSTANT, "train__max_steps": 4})) == 0
    arguments = settings(world, out, **CONSTANT)
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--extend-to", "4"]) == 0
    assert "extended from step 2 to 4: the learning rate stays at 0.01 (constant)\n" in capsys.readouterr().err
    # The shorter run was evaluated at its end too.
    assert [entry for entry in curve(out) if entry[:2] != ("eval", 2)] == curve(long)
    assert (out / WEIGHTS).read_bytes() == (long / WEIGHTS).read_bytes()
    theirs, ours = (
        load_file(next((run / "checkpoints" / "step-000004" / "optimizer").iterdir())) for run in (long, out)
    )
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


def test_a_rate_that_had_fallen_rises_and_falls_once_more(cosine: Path) -> None:
    expected = []
    for steps, warmup in ((2, 1), (3, 1)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
        scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        for _ in range(steps):
            expected.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    found = [r["learning_rate"] for r in read_metrics(cosine / "metrics.jsonl") if r["kind"] == "train"]
    assert found == pytest.approx(expected, rel=1e-12)
    said = "the learning rate rises from 0 to 0.01 over 1 of the added steps and falls to 0 at the new end (cosine)"
    assert f"extended from step 2 to 5: {said}\n" in (cosine / "run.log").read_text()
    record = json.loads((cosine / "run.json").read_text())
    assert (record["steps"], record["made_of"]["extended"]) == (5, {"start": 2, "end": 5})


@pytest.mark.parametrize("step", [3, 4], ids=["in its first step", "later"])
def test_an_extension_goes_on_after_a_stop(
    world: World,
    cosine: Path,
    two_steps: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
) -> None:
    original, arguments = train.loop.clip_gradients, settings(world, two_steps, **COSINE)

    def interrupted(parameters: Any, max_norm: float | None, now: int, **more: Any) -> float:
        if now == step:
            signal.raise_signal(signal.SIGTERM)
        return original(parameters, max_norm, now, **more)

    monkeypatch.setattr("train.loop.clip_gradients", interrupted)
    assert main([*arguments, "--extend-to", "5"]) == 0
    monkeypatch.undo()
    shown = capsys.readouterr().out
    assert f"after step {step} of 5;" in shown
    assert shown.endswith(f"--config {two_steps / 'config.yaml'} --extend-to 5\n")
    # The checkpoint knows of the extension, so that the option need not be given again.
    assert main([*arguments, *(["--extend-to", "5"] if step == 3 else [])]) == 0
    assert curve(two_steps) == curve(cosine)
    assert (two_steps / WEIGHTS).read_bytes() == (cosine / WEIGHTS).read_bytes()


def test_an_extended_run_is_through(
    world: World, cosine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.run.load_trainable_model", lambda *a, **k: pytest.fail("the model was loaded"))
    out = Path(shutil.copytree(cosine, tmp_path / "run"))
    arguments = settings(world, out, **COSINE)
    for more in ([], ["--extend-to", "5"]):
        assert main([*arguments, *more]) == 0
        assert DONE in capsys.readouterr().out
    assert error_of([*arguments, "--extend-to", "4"], capsys) == (
        f"error: --extend-to 4: the run in {out} has 5 steps already.\n       Name a larger number.\n"
    )
    shutil.rmtree(out / "checkpoints")
    assert "its checkpoints are gone: it can't go on from step 5 to 9.\n" in error_of(
        [*arguments, "--extend-to", "9"], capsys
    )
    record = json.loads((out / "run.json").read_text())
    record["made_of"]["extended"] = {"start": 5, "end": 2}
    (out / "run.json").write_text(json.dumps(record))
    assert "run.json: extended: from step 5 to 2 is no extension." in error_of(arguments, capsys)


def test_only_a_finished_run_is_extended(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of([*settings(world, tmp_path / "new", **COSINE), "--extend-to", "9"], capsys)
    assert message == (
        f"error: --extend-to 9: there is no run in {tmp_path / 'new'} to be extended.\n"
        "       Set train.max_steps for a new one.\n"
    )
    # With a constant rate train.max_steps may be raised: a run that has two steps of its nine.
    out = tmp_path / "constant"
    assert main(settings(world, out, **CONSTANT)) == 0
    longer = settings(world, out, **{**CONSTANT, "train__max_steps": 9})
    message = error_of([*longer, "--extend-to", "12"], capsys)
    assert message.startswith(f"error: --extend-to 12: the run in {out} is at step 2 of 9, and only one that is\n")


@pytest.mark.parametrize("steps", ["0", "-1", "1.5", "many", "9999999999"])
def test_steps_are_a_number(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--config", "x.yaml", f"--extend-to={steps}"])
    assert f"argument --extend-to: expected a number of steps, got '{steps}'" in capsys.readouterr().err
