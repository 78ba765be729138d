"""Every process of a run writes to output.dir: it has to be one folder. They all have to have one config."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from parallel.world import ALONE
from quant.common.errors import NibbleError
from tests.processes import run_processes
from train.config.load import Config
from train.output.report import Report
from train.state.resume import find_checkpoint
from train.state.run_folder import RunFolder, last_checkpoint, require_shared, sole_run_in


def test_a_folder_that_is_not_shared_is_named_on_every_process(tmp_path: Path) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    same.mkdir()
    other.mkdir()
    first, second = run_processes(2, "tests.dist_workers.folders:check_all", str(same), str(other))
    assert first == ["", first[1]] and second == ["", second[1]]
    assert first[1] == (
        f"output.dir: {same} is another folder for rank 1 than for rank 0. Every process writes its part of a "
        "checkpoint there.\nName a folder on a file system that all machines share."
    )
    assert second[1] == first[1].replace(str(same), str(other))
    assert not list(same.iterdir()) and not list(other.iterdir())


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert last_checkpoint(folder) == "No checkpoint was written yet (train.save_minutes, train.save_every)."
    for name in ("step-999999", "step-1000000", "step-2000000.old"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert last_checkpoint(folder) == f"The last checkpoint is {folder.checkpoints / 'step-1000000'}."
    config = Config.model_validate(
        {
            "model": {"path": "none"},
            "data": {"train": "none"},
            "train": {"resume": "never"},
            "output": {"dir": str(tmp_path)},
        }
    )
    with Report(tmp_path / "run.log", quiet=True) as report, pytest.raises(NibbleError) as caught:
        find_checkpoint(config, folder, report)
    assert "holds checkpoints (the newest: step-1000000)." in str(caught.value)


def test_one_process_needs_no_other(tmp_path: Path) -> None:
    require_shared(tmp_path, ALONE)
    assert not list(tmp_path.iterdir())


def test_another_config_is_named_on_every_process() -> None:
    first, second = run_processes(2, "tests.dist_workers.folders:check_configs")
    assert first == second
    assert first[0] == first[3] == ""
    assert first[1] == (
        "rank 1 has another config than rank 0: train.max_steps is 7 there, null for rank 0; "
        "train.learning_rate is 0.0002 there, 0.0001 for rank 0.\n"
        "Start all processes with the same config and --set options, on the same kind of device."
    )
    assert 'train.device is "cpu" there, "cuda" for rank 0' in first[2]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(NibbleError) as caught, sole_run_in(tmp_path):
        pass
    assert str(caught.value) == (
        f"output.dir: {tmp_path} can't be locked (No locks available). Name a folder on a file system with locks."
    )
