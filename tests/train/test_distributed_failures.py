"""`torchrun -m train` when a process, a machine or the run itself is ended, and what a user reads of errors then.

The processes are real ones, killed from outside. When each of them says what: tests/train/test_launched.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.processes import free_port
from tests.run_helpers import ROOT, World, forked, in_processes, losses, make_world, settings, torchrun
from train.__main__ import main

STEPS, SAVE_EVERY = 20, 4
CHANGES: dict[str, Any] = {
    "model__storage": "none",
    "train__max_steps": STEPS,
    "train__save_every": SAVE_EVERY,
    "train__learning_rate": 1e-3,
    "train__eps": 1e-3,
}
DEADLINE = 600.0  # seconds, of what takes a few on an idle machine: only to end a test that hangs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(settings(world, out, **CHANGES)) == 0
    return out


class Launched:
    """A torchrun that works in the background, and its processes."""

    def __init__(self, arguments: list[str], processes: int, *options: str, folder: Path, kills: str = "") -> None:
        """kills: which processes die, and when (tests/dist_workers/killed.py)."""
        self._mark = uuid.uuid4().hex  # in the environment of all of them
        self._said = folder / f"{self._mark}.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LAUNCHED_AS": self._mark}
        environment |= {"KILLS": kills, "KILLS_DONE": str(folder)}
        with self._said.open("wb") as said:
            module = "tests.dist_workers.killed" if kills else "train"
            command = torchrun(arguments, processes, *options, module=module)
            self.agent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)

    @property
    def said(self) -> str:
        """Standard output and standard error of torchrun and of all its processes, up to now."""
        return self._said.read_text(errors="replace")

    def workers(self) -> dict[int, int]:
        """The numbers of the processes that run now, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
            except (OSError, UnicodeDecodeError):  # it has ended; another user's
                continue
            if variables.get("LAUNCHED_AS") == self._mark and "RANK" in variables:
                found[int(variables["RANK"])] = int(folder.name)
        return found

    def wait(self, seconds: float = DEADLINE) -> int:
        try:
            return self.agent.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun still runs after {seconds} s; it said:\n{self.said}") from None

    def end(self) -> None:
        self.agent.kill()
        self.agent.wait()
        for pid in self.workers().values():
            kill(pid)


Launch = Callable[..., Launched]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """`Launched`; whatever still runs when the test is over is killed."""
    started: list[Launched] = []

    def start(arguments: list[str], processes: int, *options: str, kills: str = "") -> Launched:
        started.append(Launched(arguments, processes, *(options or ("--standalone",)), folder=tmp_path, kills=kills))
        return started[-1]

    yield start
    for one in started:
        one.end()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def until(condition: Callable[[], Any], run: Launched) -> Any:
    """What the condition is once it is true. The processes must be there to make it so."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert run.agent.poll() is None, f"torchrun has ended:\n{run.said}"
        assert time.monotonic() < deadline, f"it never came to this:\n{run.said}"
        time.sleep(0.002)
    return value


def last_step(out: Path) -> int:
    """The last step in metrics.jsonl, whose last line may be half written."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((record["step"] for record in records if record["kind"] == "train"), default=0)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step-*"))


def resumed_from(out: Path) -> list[int]:
    return [int(step) for step in re.findall(r"resuming from .*step-(\d+),", (out / "run.log").read_text())]


def worst_loss(out: Path, other: Path, steps: int = STEPS) -> float:
    """The largest relative difference between the losses of two runs' first steps."""
    ours, theirs = losses(out, "train"), losses(other, "train")[:steps]
    assert len(ours) == steps
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def worst_weight(out: Path, other: Path) -> float:
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (out, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max() / second[name].abs().max()) for name in first)


def killed(pid: int) -> str:
    """In torchrun's report of the failures."""
    return f"exitcode  : -9 (pid: {pid})  (SIGKILL)"


# --- one process is killed


@pytest.mark.slow
def test_one_killed_in_a_step_ends_all_and_the_same_command_goes_on(
    world: World, undisturbed: Path, launch: Launch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = settings(world, out, **CHANGES)
    run = launch(arguments, 2, kills=f"1:{SAVE_EVERY + 2}")
    assert run.wait() == 1
    assert not run.workers()
    assert checkpoints(out)[-1] == f"step-{SAVE_EVERY:06d}"
    assert re.search(r"rank +: 1 .*\n +exitcode  : -9 \(pid: \d+\)  \(SIGKILL\)", run.said), run.said
    assert last_step(out) == SAVE_EVERY + 1

    again = forked(arguments, 2)
    assert [process.returncode for process in again] == [0, 0], again
    assert resumed_from(out) == [SAVE_EVERY]
    assert worst_loss(out, undisturbed) < 1e-6
    assert worst_weight(out, undisturbed) < 1e-5


@pytest.mark.slow
def test_torchrun_starts_again_from_the_checkpoint_before_each_kill(
    world: World, undisturbed: Path, launch: Launch, tmp_path: Path
) -> None:
    """One command, three kills: in a step, and during saves that of a process which only writes its part, and that of
    the first one, which puts the checkpoint in its place, says what happened and holds the folder's lock."""
    out = tmp_path / "out"
    run = launch(settings(world, out, **CHANGES), 2, "--standalone", "--max-restarts", "3")
    wanted, used = [], []

    def kill_one(rank: int, workers: dict[int, int]) -> None:
        wanted.append(f"failed (exitcode: -9) local_rank: {rank} (pid: {workers[rank]})")
        used.append(int(checkpoints(out)[-1].removeprefix("step-")))
        kill(workers[rank])

    until(lambda: last_step(out) > SAVE_EVERY and not partials(out), run)
    kill_one(0, run.workers())
    for rank in (1, 0):
        until(lambda: len(resumed_from(out)) == len(used), run)
        resumed, workers = time.time_ns(), run.workers()  # looked for now, since a save is short
        assert len(workers) == 2, run.said
        caught = functools.partial(caught_saving, out, workers, rank, resumed)
        step = until(caught, run)
        kill_one(rank, workers)
        assert used[-1] == step - SAVE_EVERY
        kill(workers[1 - rank], signal.SIGCONT)
    assert run.wait() == 0, run.said
    assert resumed_from(out) == used
    assert [run.said.count(text) for text in wanted] == [1, 1, 1], run.said
    assert worst_loss(out, undisturbed) < 1e-6
    assert worst_weight(out, undisturbed) < 1e-5


def partials(out: Path, since: int = 0) -> list[Path]:
    """Checkpoints that are being written, into which something came after the moment `since`, in ns since 1970."""
    found = []
    for path in (out / "checkpoints").glob(".partial-step-*"):
        with contextlib.suppress(FileNotFoundError):  # it is in its place by now
            found += [path] if path.stat().st_mtime_ns > since else []
    return found


def caught_saving(out: Path, workers: dict[int, int], victim: int, since: int) -> int | None:
    """The step that is saved, where the processes could be stopped in the middle of a save which can't be finished
    without the victim. None, and they go on, where it isn't so."""
    if not partials(out, since):
        return None
    for pid in workers.values():
        kill(pid, signal.SIGSTOP)
    # The first process is needed to the last moment, the other one until it has written its part of the optimiser.
    caught = [path for path in partials(out, since) if victim == 0 or not list(path.glob("optimizer/shard-00002-*"))]
    if caught:
        return int(caught[0].name.removeprefix(".partial-step-"))
    for pid in workers.values():
        kill(pid, signal.SIGCONT)
    return None


# --- two machines


@pytest.mark.slow
def test_two_machines_one_of_which_goes_away(world: World, undisturbed: Path, launch: Launch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = settings(world, out, **CHANGES)

    def both(name: str) -> list[Launched]:
        meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", name)
        return [launch(arguments, 1, "--nnodes", "2", *meet) for _ in range(2)]

    first = both("first")
    until(lambda: last_step(out) > SAVE_EVERY, first[0])
    gone, left = first if 1 in first[0].workers() else first[::-1]
    kill(gone.workers()[1])
    gone.agent.kill()
    assert left.wait() == 1
    assert not left.workers()

    second = both("second")
    assert [run.wait() for run in second] == [0, 0], second[0].said + second[1].said
    assert "1 thread each (2 machines)" in second[0].said + second[1].said
    assert len(resumed_from(out)) == 1
    assert worst_loss(out, undisturbed) < 1e-5
    assert worst_weight(out, undisturbed) < 1e-5


@pytest.mark.slow
def test_two_machines_start_again_together(world: World, undisturbed: Path, launch: Launch, tmp_path: Path) -> None:
    """Each torchrun counts the restarts that it has seen, and meets what the dead processes left in the store."""
    out = tmp_path / "out"
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "again")
    arguments = settings(world, out, **CHANGES)
    kills = ",".join(f"{rank}:{number * SAVE_EVERY + 2}" for number, rank in enumerate((1, 0, 1), 1))
    both = [launch(arguments, 1, "--nnodes", "2", *meet, "--max-restarts", "3", kills=kills) for _ in range(2)]
    assert [run.wait() for run in both] == [0, 0], both[0].said + both[1].said
    assert resumed_from(out) == [SAVE_EVERY, 2 * SAVE_EVERY, 3 * SAVE_EVERY]
    assert worst_loss(out, undisturbed) < 1e-5
    assert worst_weight(out, undisturbed) < 1e-5


# --- one process hangs


@pytest.mark.slow
def test_one_that_hangs_is_given_up(world: World, launch: Launch, tmp_path: Path) -> None:
    """torchrun needs another 30 s: it asks a process to end before it kills it. Here 30 s pass before that, not the
    default 20, so that the steps of a busy machine aren't taken for one that hangs.
    """
    out = tmp_path / "out"
    run = launch([*settings(world, out, **CHANGES), "--set", "parallel.lost_after=30"], 2)
    victim = until(lambda: run.workers().get(1), run)
    until(lambda: last_step(out) > SAVE_EVERY, run)
    kill(victim, signal.SIGSTOP)
    assert run.wait() == 1
    wanted = "lost contact with another process: Timed out waiting 30000ms for "
    assert f"\nerror: {wanted}" in run.said, run.said
    assert f"traceback : {wanted}" in run.said, "in torchrun's report"
    assert f"       The last checkpoint is {out / 'checkpoints' / checkpoints(out)[-1]}.\n" in run.said
    assert killed(victim) in run.said


# --- stopped on purpose


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_run_goes_on(
    world: World, undisturbed: Path, launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = settings(world, out, **CHANGES, train__keep_checkpoints=1)
    run = launch(arguments, 2, "--standalone", "--shutdown-timeout", "600")
    until(lambda: last_step(out) >= 2, run)
    run.agent.terminate()
    assert run.wait() == 1
    step = last_step(out)
    assert 2 <= step < STEPS
    assert run.said.count(f"stopped   by SIGTERM after step {step} of {STEPS}; saved in {out / 'checkpoints'}\n") == 1
    assert f"resume    torchrun … -m train --config {out / 'config.yaml'}\n" in run.said
    assert "error: " not in run.said
    assert "SIGTERM: finishing this step, then saving.\n" in run.said, "torchrun passes a second Ctrl-C on as SIGTERM"
    assert checkpoints(out) == [f"step-{step:06d}"]
    assert worst_loss(out, undisturbed, step) < 1e-6

    assert main(arguments) == 0  # as one process: it takes less time
    assert f"after step {step} of {STEPS}" in capsys.readouterr().err
    assert worst_loss(out, undisturbed) < 1e-6
    assert worst_weight(out, undisturbed) < 1e-5


# --- what the user can fix


def test_an_unknown_key(world: World, tmp_path: Path) -> None:
    """Said once on standard error, and in torchrun's report."""
    done = in_processes(settings(world, tmp_path / "out", train__max_stps=3), 2)
    assert done.returncode == 1
    assert done.stderr.count("\nerror: ") + done.stderr.startswith("error: ") <= 1, done.stderr
    assert "unknown key 'train.max_stps'." in done.stderr
    assert done.stderr.count("Traceback") == 1, "torchrun's own"
    assert "exitcode  : 2 " in done.stderr


@pytest.mark.slow
def test_a_row_that_is_no_row(world: World, tmp_path: Path) -> None:
    """The first process alone reads them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(world.rows.read_text() + "{broken\n")
    arguments = settings(world, tmp_path / "out", data__train=str(rows), data__on_bad_row="error")
    assert_said_once(arguments, 2, f"{rows}:97")


@pytest.mark.slow
def test_a_mesh_that_is_not_that_of_the_processes(world: World, tmp_path: Path) -> None:
    arguments = settings(world, tmp_path / "out", parallel__shard=4)
    assert_said_once(arguments, 2, "parallel.shard 4 × parallel.expert 1 × parallel.replicate 1 is 4, but 2 processes")


def test_experts_that_can_not_be_divided(world: World, tmp_path: Path) -> None:
    assert_said_once(settings(world, tmp_path / "out"), 3, "4 experts")


def assert_said_once(arguments: list[str], processes: int, wanted: str) -> None:
    """By the first process, while the others wait to be ended (tests/train/test_launched.py)."""
    first, *others = forked(arguments, processes, grace=2.0)
    assert first.returncode == 2
    assert first.stderr.count("error: ") == 1, first.stderr
    assert wanted in first.stderr
    assert "Traceback" not in first.stderr
    assert [done.stderr for done in others] == [""] * len(others)


def test_an_error_of_one_process_alone(world: World, tmp_path: Path) -> None:
    """It has no place for its log."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ranks").touch()
    first, second = forked(settings(world, tmp_path / "out"), 2)
    assert "error: " not in first.stderr
    assert second.returncode == 2
    assert second.stderr.startswith(f"rank 1 on {os.uname().nodename}: error: {tmp_path / 'out' / 'ranks'}")
