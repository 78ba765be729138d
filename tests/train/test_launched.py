"""What a process among several says of an error, when, and what torchrun reports of it."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from parallel.world import ProcessLostError, World
from quant.common.errors import NibbleError
from train import __main__ as train_command
from train import launched
from train.__main__ import describe
from train.launched import run_launched

BROKEN = NibbleError("data.train: row 7 is broken.\nMend it.")
LOST = ProcessLostError("lost contact with another process: Connection closed")
FIRST, NEIGHBOUR = World(0, 16, 0, 2), World(1, 16, 1, 2)
ELSEWHERE, ITS_NEIGHBOUR = World(8, 16, 0, 2), World(9, 16, 1, 2)


@dataclass
class Left:
    """code: of the process; before, after: what it had said before it waited to be ended, and after that."""

    code: int
    before: str | None
    after: str


class Exit(BaseException):
    pass


def leave(world: World, error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: Any, log: Any = None) -> Left:
    """How a process leaves that isn't ended by torchrun while it waits."""
    before: list[str] = []

    def body() -> NoReturn:
        raise error

    def exit_now(code: int) -> NoReturn:
        raise Exit(code)

    with monkeypatch.context() as patch:
        patch.setattr(launched.time, "sleep", lambda seconds: before.append(capsys.readouterr().err))
        patch.setattr(os, "_exit", exit_now)
        with pytest.raises(Exit) as left:
            run_launched(world, body, functools.partial(describe, log=log))
    return Left(left.value.args[0], before[0] if before else None, capsys.readouterr().err)


@pytest.fixture(autouse=True)
def error_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("faulthandler.enable", lambda **options: None)  # pytest has its own
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def test_without_an_error_the_exit_code_is_that_of_the_body() -> None:
    assert [run_launched(FIRST, lambda code=code: code, describe) for code in (0, 3)] == [0, 3]


def test_one_error_is_said_by_the_first_process_of_a_machine(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The others wait to be ended, and speak if nobody does that: then it was theirs alone."""
    text, host = "error: data.train: row 7 is broken.\n       Mend it.\n", platform.node()
    assert leave(FIRST, BROKEN, monkeypatch, capsys) == Left(2, None, text)
    assert leave(ELSEWHERE, BROKEN, monkeypatch, capsys) == Left(2, None, f"rank 8 on {host}: {text}")
    assert leave(NEIGHBOUR, BROKEN, monkeypatch, capsys) == Left(2, "", f"rank 1 on {host}: {text}")
    assert leave(ITS_NEIGHBOUR, BROKEN, monkeypatch, capsys) == Left(2, "", f"rank 9 on {host}: {text}")


def test_one_that_lost_another_leaves_torchrun_time_to_find_that_first(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text, host = f"error: {LOST}\n", platform.node()
    assert leave(FIRST, LOST, monkeypatch, capsys) == Left(1, text, "")
    assert leave(ELSEWHERE, LOST, monkeypatch, capsys) == Left(1, f"rank 8 on {host}: {text}", "")
    assert leave(NEIGHBOUR, LOST, monkeypatch, capsys) == Left(1, "", f"rank 1 on {host}: {text}")


def test_an_interruption_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert leave(FIRST, KeyboardInterrupt(), monkeypatch, capsys) == Left(130, None, "interrupted\n")
    assert leave(NEIGHBOUR, KeyboardInterrupt(), monkeypatch, capsys) == Left(130, None, "")


def test_an_error_that_nobody_foresaw_is_one_line_and_the_place_of_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    log = tmp_path / "run.log"
    log.touch()
    left = leave(FIRST, ZeroDivisionError("division by zero"), monkeypatch, capsys, log)
    wanted = f"error: ZeroDivisionError: division by zero\n       The traceback is in {log}.\n"
    assert left == Left(1, None, wanted)


@pytest.mark.parametrize("logged", [False, True])
def test_only_a_log_that_this_run_has_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, logged: bool
) -> None:
    log, config = tmp_path / "run.log", tmp_path / "config.yaml"
    log.write_text("of an earlier run\n")
    config.write_text(f"{{model: {{path: x}}, data: {{train: x}}, output: {{dir: {tmp_path}}}}}")

    def fail(*arguments: Any) -> NoReturn:
        if logged:
            with log.open("a") as file:
                file.write("of this one\n")
        raise ZeroDivisionError("division by zero")

    def exit_now(code: int) -> NoReturn:
        raise Exit(code)

    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**variables, "TORCH_CPP_LOG_LEVEL": "ERROR"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train_command, "carry_out", fail)
    monkeypatch.setattr(os, "_exit", exit_now)
    with pytest.raises(Exit):
        train_command.main(["--config", str(config)])
    shown = capsys.readouterr().err
    assert (f"The traceback is in {log}." in shown, "Traceback" in shown) == (logged, not logged)


def test_the_report_of_torchrun_has_the_message_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, error_file: Path
) -> None:
    leave(NEIGHBOUR, BROKEN, monkeypatch, capsys)
    failure = ProcessFailure(local_rank=1, pid=4711, exitcode=2, error_file=str(error_file))
    report = ChildFailedError("train", {1: failure}).format_msg()
    assert "rank      : 1 (local_rank: 1)" in report
    assert "exitcode  : 2 (pid: 4711)" in report
    assert "traceback : data.train: row 7 is broken.\n" in report
    assert "Mend it." in report
    assert "Traceback" not in report
