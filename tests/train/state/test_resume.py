"""Stopping a run and going on with it: by signals, kills, other files, other configs."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import train.loop
from models.checkpoint.conversion import convert
from models.checkpoint.fingerprint import sampled_fingerprint
from models.checkpoint.hub import HubCheckpoint
from models.load import open_folder
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import save_tiny_glm
from tests.processes import run_commands
from tests.run_helpers import SIZES, World, curve, error_of, losses, make_world, settings
from train.__main__ import main
from train.config.load import load_config
from train.model import content_fingerprint
from train.output.metrics import read_metrics
from train.state.checkpoint import Checkpoint
from train.state.resume import require_same_base


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


PLAIN = {"model__storage": "none"}  # starts without bitsandbytes, for what does not depend on the storage
RESUMED = {"train__max_steps": 10, "train__save_every": 4, "train__eval_every": 5, "train__gradient_accumulation": 2}


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    dtype = "bfloat16" if request.param == "adamw_8bit" else "float32"  # stochastic rounding goes on too
    changes = {**RESUMED, "train__optimizer": request.param, "adapter__dtype": dtype}
    assert main(settings(world, out, **changes)) == 0
    return changes, curve(out), (out / "adapter" / "adapter_model.safetensors").read_bytes()


def signals_in_step(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Lets the next runs of this process get these signals in the middle of that step. Of signals is told on the file
    descriptor of standard error, not on sys.stderr.
    """
    original = train.loop.clip_gradients

    def interrupted(parameters: Any, max_norm: float | None, now: int, **more: Any) -> float:
        for number in numbers if now == step else ():
            signal.raise_signal(number)
        return original(parameters, max_norm, now, **more)

    monkeypatch.setattr("train.loop.clip_gradients", interrupted)


@pytest.mark.parametrize("uninterrupted", ["adamw_8bit"], indirect=True)
def test_sigterm_saves_and_the_resumed_run_is_the_same_bit_for_bit(
    world: World,
    tmp_path: Path,
    uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changes, expected, adapter = uninterrupted
    out = tmp_path / "run"
    arguments = settings(world, out, **changes)
    signals_in_step(monkeypatch, 7, signal.SIGTERM)
    assert main(arguments) == 0
    stopped = capfd.readouterr()
    assert "SIGTERM: finishing this step, then saving." in stopped.err
    assert f"stopped   by SIGTERM after step 7 of 10; saved in {out / 'checkpoints'}" in stopped.out
    assert f"resume    python -m train --config {out / 'config.yaml'}\n" in stopped.out
    assert curve(out) == [entry for entry in expected if entry[1] <= 7]
    assert (out / "loss.png").is_file()
    assert not (out / "adapter").exists()

    monkeypatch.undo()
    assert main(["--config", str(out / "config.yaml")]) == 0
    assert "step-000007, after step 7 of 10" in capfd.readouterr().err
    assert curve(out) == expected
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("uninterrupted", ["adamw"], indirect=True)
def test_kill_in_the_middle_of_a_save(world: World, tmp_path: Path, uninterrupted: Any) -> None:
    changes, expected, adapter = uninterrupted
    out = tmp_path / "run"
    arguments = settings(world, out, **changes)
    # The second checkpoint, of step 8: the weights are written, the state is not.
    (killed,) = run_commands(1, "tests.dist_workers.killed:while_it_saves", "step-000008", arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any(path.name != "step-000004" for path in (out / "checkpoints").iterdir())  # something half-written
    assert max(entry[1] for entry in curve(out)) == 8
    assert main(arguments) == 0
    assert curve(out) == expected
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_run_whose_reader_died_goes_on_to_its_end(world: World, tmp_path: Path) -> None:
    """As `python -m train … 2>&1 | tee log` when the tee is killed."""
    arguments = settings(world, tmp_path / "run", train__max_steps=2, **PLAIN)
    (done,) = run_commands(1, "tests.dist_workers.command:without_a_reader", arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    log = (tmp_path / "run" / "run.log").read_text()
    assert "step 2/2" in log
    assert "Traceback" not in log


@pytest.mark.usefixtures("signals_heeded")
def test_a_closed_terminal_stops_as_sigterm_does(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    signals_in_step(monkeypatch, 2, signal.SIGHUP)
    assert main(settings(world, out, **PLAIN)) == 0
    assert "stopped   by SIGHUP after step 2 of 6" in capsys.readouterr().out
    assert (out / "checkpoints" / "step-000002").is_dir()


@pytest.mark.usefixtures("signals_heeded")
def test_a_second_interrupt_stops_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    signals_in_step(monkeypatch, 2, signal.SIGINT, signal.SIGINT)
    assert main(settings(world, out, **PLAIN)) == 130
    stopped = capfd.readouterr().err
    assert "Ctrl-C again stops at once" in stopped
    assert stopped.endswith("interrupted\n")
    assert "Traceback" not in stopped
    assert not (out / "checkpoints").exists()


@pytest.mark.usefixtures("signals_heeded")
def test_a_signal_during_the_first_evaluation_loses_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(settings(world, whole, train__max_steps=2)) == 0
    import train.held_out

    original = train.held_out.batch_loss

    def stopping(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr("train.held_out.batch_loss", stopping)
    arguments = settings(world, out, train__max_steps=2, train__micro_batch_size=1, train__gradient_accumulation=2)
    assert main(arguments) == 0
    assert read_metrics(out / "metrics.jsonl") == []
    stopped = capsys.readouterr().out
    assert f"stopped   by SIGINT after step 0 of 2; saved in {out / 'checkpoints'}\n" in stopped
    assert stopped.endswith(f"resume    python -m train --config {out / 'config.yaml'}\n")
    monkeypatch.undo()
    assert main(arguments) == 0
    assert [entry[:2] for entry in curve(out)] == [entry[:2] for entry in curve(whole)]


def test_a_kill_between_the_last_checkpoint_and_the_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = settings(world, out, train__max_steps=3)
    monkeypatch.setattr("train.loop.Loop._evaluate", lambda self: None if self.progress.step == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(arguments)
    assert "ZeroDivisionError" in (out / "run.log").read_text()
    monkeypatch.undo()
    assert main(arguments) == 0
    assert [entry[:2] for entry in curve(out)] == [("train", 1), ("train", 2), ("train", 3), ("eval", 3)]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_resume_from_a_named_checkpoint_of_another_folder(world: World, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(settings(world, first, train__save_every=4)) == 0
    resume = str(first / "checkpoints" / "step-000004")
    assert main(settings(world, second, train__save_every=4, train__resume=resume)) == 0
    assert curve(second) == curve(first)


def test_resume_never_does_not_overwrite(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(settings(world, out, train__max_steps=2, train__resume="never")) == 0
    arguments = settings(world, out, train__max_steps=2, train__resume="never")
    message = error_of(arguments, capsys)
    assert f"train.resume: never, but {out / 'checkpoints'} holds checkpoints (the newest: step-000002)" in message
    shutil.rmtree(out / "checkpoints")
    assert f"train.resume: never, but a run has finished in {out}.\n" in error_of(arguments, capsys)
    assert main([*arguments, "--restart"]) == 0
    assert [entry[:2] for entry in curve(out)] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]


def test_another_config_in_the_same_folder_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(settings(world, out, train__max_steps=1)) == 0
    message = error_of(settings(world, out, train__max_steps=1, train__seed=5), capsys)
    assert "train.seed is 5 now, 0 there" in message


@pytest.mark.slow
def test_files_may_move_but_not_change(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, out = tmp_path / "moved", tmp_path / "run"
    held_out = tmp_path / "held_out.jsonl"
    shutil.copyfile(world.rows, held_out)
    start = {**RESUMED, "train__max_steps": 5, "train__schedule": "constant", "train__warmup_ratio": 0.0}
    assert main(settings(world, out, **start, data__eval=str(held_out))) == 0

    start["train__max_steps"] = 6
    moved.mkdir()
    shutil.copytree(world.model, moved / "model")
    elsewhere = {
        "model__path": str(moved / "model"),
        "data__train": str(moved / "rows"),
        "data__eval": str(moved / "e"),
    }
    elsewhere = {key: f"{path}.jsonl" if key.startswith("data") else path for key, path in elsewhere.items()}
    shutil.copyfile(world.rows, elsewhere["data__train"])
    shutil.copyfile(held_out, elsewhere["data__eval"])
    arguments = settings(world, out, **start, **elsewhere)

    # Of what is wrong the run hears before the model is loaded.
    with monkeypatch.context() as patch:
        patch.setattr("train.run.load_trainable_model", lambda *a, **k: pytest.fail("the model was loaded"))
        for key in ("data__train", "data__eval"):
            path = Path(elsewhere[key])
            rows = path.read_text()
            path.write_text("".join(rows.splitlines(keepends=True)[1:]))
            message = error_of(arguments, capsys)
            if key == "data__train":
                assert message.startswith("error: the training rows are not those that the run began with (")
            else:
                assert message.startswith(f"error: the held-out rows are not those of {out / 'run.json'}, so that")
                assert "data.eval\n" in message
            path.write_text(rows)

        shutil.rmtree(moved / "model")
        shutil.copytree(world.model, moved / "model")
        save_tiny_glm(moved / "model", seed=1, **SIZES)
        patch.setattr("train.run.load_data", lambda *a, **k: pytest.fail("the rows were read"))
        message = error_of(arguments, capsys)
        assert message == (
            f"error: model.path: {moved / 'model'} is not the model that {out / 'run.json'} was trained on "
            f"({world.model}):\n       config.json or the weights differ. Set model.path to that model, or "
            "start a new run in another output.dir, or with --restart, which moves this one aside.\n"
        )

    shutil.rmtree(moved / "model")
    shutil.copytree(world.model, moved / "model")
    assert main(arguments) == 0
    assert "step-000005, after step 5 of 6" in capsys.readouterr().err


def test_the_base_that_an_earlier_version_recorded(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its fingerprint was made of samples ("sha256:…")."""
    hub = HubCheckpoint(world.model)
    sampled = sampled_fingerprint(world.model, hub.config_bytes, hub.places)
    convert(world.model, tmp_path / "converted", StorageSpec("nf4"), torch.float32)
    config = load_config(settings(world, tmp_path / "run")[1])

    def check(recorded: str, path: Path) -> None:
        state = {"base": {"name": "the base", "fingerprint": recorded}}
        checkpoint = cast(Checkpoint, SimpleNamespace(path=Path("step-000001"), state=state))
        source = open_folder(path)
        require_same_base(checkpoint, {"name": source.name, "fingerprint": content_fingerprint(source)}, config, source)

    for path in (world.model, tmp_path / "converted"):
        check(hub.fingerprint(), path)
    assert caplog.messages == []
    check(sampled, world.model)
    assert caplog.messages[0].endswith("Checkpoints from now on hold a fingerprint of all its data.")
    with pytest.raises(NibbleError, match=r"is not the model that step-000001 was trained on \(the base\)"):
        check(sampled[:-1] + "x", world.model)
    with pytest.raises(NibbleError, match=r"another kind of fingerprint\.\nSet model\.path to the hub's folder \("):
        check(sampled, tmp_path / "converted")

    manifest = json.loads((tmp_path / "converted" / "nibble.json").read_text())
    manifest["source"]["fingerprint"] = sampled
    (tmp_path / "converted" / "nibble.json").write_text(json.dumps(manifest))
    check(sampled, tmp_path / "converted")  # both of the earlier version


def test_a_converted_copy_is_the_same_base(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, constant = tmp_path / "run", {"train__schedule": "constant", "train__warmup_ratio": 0.0}
    assert main(settings(world, out, train__max_steps=1, **constant)) == 0
    convert(world.model, tmp_path / "converted", StorageSpec("nf4"), torch.float32)
    assert main(settings(world, out, train__max_steps=2, model__path=str(tmp_path / "converted"), **constant)) == 0
    assert "step-000001, after step 1 of 2" in capsys.readouterr().err
    assert len(losses(out, "train")) == 2


def test_a_constant_rate_run_can_be_made_longer_but_not_shorter(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, constant = tmp_path / "run", {"train__schedule": "constant", "train__warmup_ratio": 0.0}
    assert main(settings(world, out, train__max_steps=2, **constant)) == 0
    assert main(settings(world, out, train__max_steps=4, **constant)) == 0
    assert len(losses(out, "train")) == 4
    monkeypatch.setattr("train.run.load_trainable_model", lambda *a, **k: pytest.fail("the model was loaded"))
    message = error_of(settings(world, out, train__max_steps=3, **constant), capsys)
    assert "is at step 4, beyond this run's last step, 3" in message


def test_two_runs_in_one_folder_are_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another run is writing to {out}" in error_of(settings(world, out), capsys)
