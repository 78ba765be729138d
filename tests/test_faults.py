"""What `python -m tests.faults` counts: trials in which something was disturbed; "told" where nothing was lost."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.checkpoint_helpers import save
from tests.faults.__main__ import Trials, damages, disks, kills, moves
from tests.processes import Forked
from tests.run_helpers import World


class Process:
    """One that has ended with `code`, or runs until it is killed."""

    def __init__(self, code: int | None) -> None:
        self.code, self.killed = code, False

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        if self.code is None:
            self.code, self.killed = -9, True

    def wait(self) -> int:
        assert self.code is not None
        return self.code


class Pretended(Trials):
    """Trials of commands that only exit: with these codes, one after the other; `also` is what each does besides."""

    def __init__(self, folder: Path, codes: list[int | None], also: Callable[[Path], Any] = lambda out: None) -> None:
        super().__init__(World(folder, folder, folder), folder, 1, random.Random(0))
        self.codes, self.also, self.started = codes, also, list[Process]()

    def start(self, out: Path, target: str = "", *more: object) -> list[Forked]:
        self.numbers += 1
        self.also(out)
        self.started.append(Process(self.codes[min(len(self.started), len(self.codes) - 1)]))
        return [cast(Forked, self.started[-1])]


@pytest.fixture(autouse=True)
def one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.faults.__main__.result_of", lambda out: "the same")


def test_a_kill_counts_where_there_was_a_process(tmp_path: Path) -> None:
    trials = Pretended(tmp_path, [0, None, 0])
    while not trials.outcomes["killed", "kills"]:  # how often a run is killed is drawn
        kills(trials, 1, "the same", 0.0)
    assert trials.outcomes["killed", "kills"] == sum(process.killed for process in trials.started) == 1
    assert trials.outcomes["killed", "exact"] == 1


@pytest.mark.parametrize(("removed", "outcome"), [((), "told"), ((4,), "lost"), ((2,), "told"), ((2, 4), "lost")])
def test_told_is_what_lost_no_checkpoint(tmp_path: Path, removed: tuple[int, ...], outcome: str) -> None:
    for step in (2, 4):
        save(tmp_path / "run" / "checkpoints", step)

    def remove(out: Path) -> None:
        for step in removed:
            shutil.rmtree(out / "checkpoints" / f"step-{step:06d}", ignore_errors=True)

    trials = Pretended(tmp_path, [2], remove)
    trials.judge("kind", tmp_path / "run", "the same")
    assert trials.outcomes == {("kind", outcome): 1}


def test_what_disturbed_nothing_is_no_trial(tmp_path: Path) -> None:
    trials = Pretended(tmp_path, [0])
    damages(trials, 1, "the same", 0.0)
    disks(trials, 1, "the same")
    moves(trials, 1, "the same", 0.0)
    assert trials.outcomes == {("flipped", "missed"): 1, ("disk full", "missed"): 1, ("moved", "missed"): 1}
