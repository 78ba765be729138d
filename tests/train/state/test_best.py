"""train.keep_best and train.patience: the lowest held-out loss, and a run that ends when there is none any more."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import train.loop
from quant.common.errors import NibbleError
from tests.run_helpers import World, curve, losses, make_world, settings
from train.__main__ import main
from train.state.best import BestResult, Evaluation, evaluations_without_improvement, read_evaluation

WEIGHTS = "adapter_model.safetensors"
# So long a memory of gradients that the held-out loss rises again: the lowest is that after step 4.
KEPT = {
    "model__storage": "none",
    "train__max_steps": 8,
    "train__learning_rate": 0.05,
    "train__betas": [0.98, 0.5],
    "train__schedule": "constant",
    "train__warmup_ratio": 0,
    "train__eval_every": 2,
    "train__keep_best": True,
}
PATIENT = {**KEPT, "train__patience": 1}
DONE = "; there is nothing left to do."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def through(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without patience, with all its checkpoints."""
    out = tmp_path_factory.mktemp("through") / "run"
    assert main(settings(world, out, **KEPT, train__save_every=2, train__keep_checkpoints=9)) == 0
    return out


@pytest.fixture(scope="module")
def early(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("early") / "run"
    assert main(settings(world, out, **PATIENT)) == 0
    return out


def weights(out: Path, name: str) -> bytes:
    return (out / name / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("held_out", "delta", "expected"),
    [
        ([], 0.0, 0),
        ([3.0], 0.0, 0),
        ([3.0, 2.0, 2.0, 2.5], 0.0, 2),
        ([3.0, 2.0, 2.5, 1.9], 0.0, 0),
        ([3.0, 2.95, 2.92, 2.85, 2.85], 0.1, 1),  # small steps add up
        ([3.0, 2.95, 2.95], 0.1, 2),
    ],
)
def test_evaluations_without_improvement(held_out: list[float], delta: float, expected: int) -> None:
    assert evaluations_without_improvement(held_out, delta) == expected


def test_the_lowest_is_kept_beside_the_last(through: Path) -> None:
    held_out = {step: loss for kind, step, loss, _ in curve(through) if kind == "eval"}
    best = min(held_out, key=lambda step: held_out[step])
    assert best == 4 < max(held_out)
    assert read_evaluation(through / "adapter-best") == Evaluation(best, held_out[best])
    kept = load_file(through / "adapter-best" / WEIGHTS)
    # The same tensors as in the checkpoint of that step, which has stacks of experts as the model has them.
    saved = load_file(next((through / "checkpoints" / "step-000004" / "weights").glob("*.safetensors")))
    assert sorted(float(t.double().square().sum()) for t in kept.values()) == pytest.approx(
        sorted(float(t.double().square().sum()) for t in saved.values()), rel=1e-12
    )
    assert weights(through, "adapter-best") != weights(through, "adapter")
    record = json.loads((through / "run.json").read_text())
    assert (record["best"]["step"], record["best"]["loss"], record["best"]["saved"]) == (4, held_out[4], "adapter-best")
    assert f"| of this result | {held_out[4]:.4f} |" in (through / "adapter-best" / "README.md").read_text()


def test_patience_ends_the_run(early: Path, through: Path) -> None:
    assert curve(early) == [entry for entry in curve(through) if entry[1] <= 6]
    assert weights(early, "adapter-best") == weights(through, "adapter-best")
    record = json.loads((early / "run.json").read_text())
    assert (record["steps"], record["stopped_early"]) == (6, {"patience": 1, "patience_delta": 0.0})
    log = (early / "run.log").read_text()
    assert "stopped early after step 6 of 8: 1 evaluation without a lower held-out loss (train.patience: 1)" in log
    assert f"best      {record['best']['loss']:.4f} after step 4 in {early / 'adapter-best'}\n" in log


def test_a_run_that_ended_early_is_through_until_it_gets_more_patience(
    world: World, early: Path, through: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(early, out)
    assert main(settings(world, out, **PATIENT)) == 0
    assert DONE in capsys.readouterr().out

    # What ends a run may change, and then there may be nothing to keep.
    unkept = {key: value for key, value in PATIENT.items() if key != "train__keep_best"}
    assert main(settings(world, out, **unkept)) == 0
    assert DONE in capsys.readouterr().out

    (out / "adapter-best" / WEIGHTS).unlink()  # no checkpoint has it
    assert main(settings(world, out, **PATIENT)) == 0
    shown = capsys.readouterr()
    assert DONE in shown.out
    assert "adapter-best/adapter_model.safetensors is gone or damaged, and can't be written again" in shown.err

    shutil.rmtree(out / "adapter-best")
    shutil.copytree(early / "adapter-best", out / "adapter-best")
    assert main(settings(world, out, **{**PATIENT, "train__patience": 9})) == 0
    assert DONE not in capsys.readouterr().out
    assert curve(out) == curve(through)
    assert weights(out, "adapter") == weights(through, "adapter")
    assert weights(out, "adapter-best") == weights(through, "adapter-best")


@pytest.mark.parametrize("step", [3, 5], ids=["before the best", "after it"])
def test_an_interrupted_run_ends_where_the_other_did(
    world: World, early: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original, out = train.loop.clip_gradients, tmp_path / "run"

    def interrupted(parameters: Any, max_norm: float | None, now: int, **more: Any) -> float:
        if now == step:
            signal.raise_signal(signal.SIGTERM)
        return original(parameters, max_norm, now, **more)

    monkeypatch.setattr("train.loop.clip_gradients", interrupted)
    assert main(settings(world, out, **PATIENT)) == 0
    monkeypatch.undo()
    assert main(settings(world, out, **PATIENT)) == 0
    assert curve(out) == curve(early)
    for name in ("adapter", "adapter-best"):
        assert weights(out, name) == weights(early, name)
    assert (out / "adapter-best" / "README.md").read_text() == (early / "adapter-best" / "README.md").read_text()


def test_killed_between_the_result_and_its_line_in_the_metrics(
    world: World, early: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before the next checkpoint, so that it goes on from before the best."""
    out, arguments = tmp_path / "run", settings(world, tmp_path / "run", **PATIENT, train__save_every=3)
    original = train.loop.MetricsLog.write

    def write(self: Any, record: dict[str, Any]) -> None:
        if (record["kind"], record["step"]) == ("eval", 4):
            raise RuntimeError("killed")
        original(self, record)

    monkeypatch.setattr("train.loop.MetricsLog.write", write)
    with pytest.raises(RuntimeError, match="killed"):
        main(arguments)
    monkeypatch.undo()
    assert read_evaluation(out / "adapter-best") == read_evaluation(early / "adapter-best")
    assert main(arguments) == 0
    assert "adapter-best is of step 4, after this checkpoint" in (out / "run.log").read_text()
    assert curve(out) == curve(early)
    assert weights(out, "adapter-best") == weights(early, "adapter-best")


def test_in_another_folder_the_best_comes_along(
    world: World, through: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    checkpoint = str(through / "checkpoints" / "step-000006")
    assert main(settings(world, out, **PATIENT, train__resume=checkpoint)) == 0
    assert losses(out, "eval") == losses(through, "eval")[:4]  # patience was over there: no further step
    assert weights(out, "adapter-best") == weights(through, "adapter-best")
    # A checkpoint from before the best: it isn't this run's.
    other = tmp_path / "other"
    shutil.copytree(through, tmp_path / "source")
    (tmp_path / "source" / "adapter-best" / "evaluation.json").write_text('{"step": 8, "loss": 1.0}')
    best = BestResult(other / "adapter-best", lambda target, evaluation: None)
    other.mkdir()
    notes: list[str] = []
    best.resume(6, tmp_path / "source", notes.append)
    assert notes == ["adapter-best isn't there: it will hold the best of the evaluations from here on"]
    assert best.evaluation is None and not (other / "adapter-best").exists()


def test_a_save_that_was_cut_short_leaves_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "adapter-best"

    def write(target: Path, evaluation: Evaluation) -> None:
        target.mkdir()
        (target / WEIGHTS).write_text(str(evaluation.step))
        if evaluation.step == 3:
            raise OSError(28, "No space left on device")

    best = BestResult(folder, write)
    assert best.offer(Evaluation(1, 2.0))
    assert not best.offer(Evaluation(2, 2.0))  # no lower
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("somebody's")
    with pytest.raises(NibbleError, match=r"the disk is full: .*adapter-best can't be written"):
        best.offer(Evaluation(3, 1.5))
    assert (folder / WEIGHTS).read_text() == "1"
    assert read_evaluation(folder) == best.evaluation == Evaluation(1, 2.0)

    # The power went between the two renames.
    folder.rename(tmp_path / ".replaced-adapter-best")
    again = BestResult(folder, write)
    again.resume(3, tmp_path, lambda text: pytest.fail(text))
    assert again.evaluation == Evaluation(1, 2.0)
    assert again.offer(Evaluation(4, 1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter-best"]
    assert (folder / WEIGHTS).read_text() == "4"
    assert (folder / "notes" / "mine.txt").read_text() == "somebody's"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not valid JSON"),
        ('{"step": 1}', "loss must be a number, got None"),
        ('{"step": -1, "loss": 1.0}', "step must be an integer of at least 0"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / WEIGHTS).touch()
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(NibbleError, match=said):
        read_evaluation(tmp_path)


def test_the_best_model_of_a_full_fine_tuning(world: World, tmp_path: Path) -> None:
    changes = {**KEPT, "train__max_steps": 2, "train__learning_rate": 1e-3, "adapter__kind": "none"}
    assert main(settings(world, tmp_path / "run", **changes)) == 0
    (best, last) = (tmp_path / "run" / name / "model.safetensors" for name in ("model-best", "model"))
    assert best.read_bytes() == last.read_bytes()
    assert read_evaluation(tmp_path / "run" / "model-best") is not None
