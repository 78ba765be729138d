"""A process that dies, stops or fails ends the others, and the cause is said once. The scenes are in
tests/dist_workers/watch.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from parallel import lifesigns
from parallel.lifesigns import Others, whereabouts
from parallel.store import launch_store
from parallel.watch import Watch, _is_consequence, watched
from parallel.world import World
from quant.common.errors import NibbleError
from tests.processes import ROOT, free_port, rank_environment
from train.__main__ import describe

WORD = "its process ended without a word, as when it is killed or out of memory."
BROKEN = "error: data.train: row 7 is broken.\n       Mend it.\n"
PORT, SECONDS = "127.0.0.1:PORT", "SECONDS"


def matches(said: str, wanted: str) -> bool:
    """Where the wanted text leaves a port open, or the seconds after which 3 s of silence are noticed."""
    pattern = re.escape(wanted).replace("PORT", r"\d+").replace("SECONDS", "[345]")
    return re.fullmatch(pattern, said) is not None


@dataclass(frozen=True)
class Scene:
    """By rank: exit codes, process numbers, what was said on both streams, the logs. seconds: until the last ended."""

    codes: list[int]
    pids: list[int]
    said: list[str]
    logs: list[str]
    seconds: float

    def lost(self, rank: int, how: str = WORD, host: str = os.uname().nodename) -> str:
        return f"error: rank {rank} (pid {self.pids[rank]} on {host}) is gone: {how}\n"

    def failed(self, rank: int, text: str, host: str = os.uname().nodename) -> str:
        return f"rank {rank} (pid {self.pids[rank]} on {host}) failed:\n{text}"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    folder = tmp_path_factory.mktemp("watch")
    # As train.__main__ has it: torch's own lines about broken connections are not what these tests are about.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "tests.dist_workers.watch", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name: Scene(**values) for name, values in json.loads((folder / "results.json").read_text()).items()}


def test_one_killed_in_a_step(scenes: dict[str, Scene]) -> None:
    scene = scenes["killed_in_a_step"]
    assert scene.codes == [1, 1, -9, 1]
    assert scene.said == [scene.lost(2) + "       The last checkpoint is step-3.\n", "", "", ""]
    assert scene.seconds < 20
    assert scene.logs[3].startswith("ended because rank 2 (pid ")


def test_one_killed_while_the_others_do_something_else(scenes: dict[str, Scene]) -> None:
    scene = scenes["killed_while_others_sleep"]
    assert scene.codes == [1, -9, 1]
    assert scene.said == [scene.lost(1), "", ""]
    assert scene.seconds < 20


def test_one_stopped(scenes: dict[str, Scene]) -> None:
    scene = scenes["stopped"]
    assert scene.codes == [1, -9, 1], "the test kills what was stopped"
    assert matches(scene.said[0], scene.lost(1, f"no sign of life for {SECONDS} s."))
    assert scene.said[1:] == ["", ""]
    assert scene.seconds < 20


@pytest.mark.parametrize("name", ["store_killed", "store_killed_while_others_sleep"])
def test_the_one_with_the_store_killed(scenes: dict[str, Scene], name: str) -> None:
    scene = scenes[name]
    assert scene.codes == [-9, 1, 1]
    # The connections may be seen to close before the system knows that the process has ended.
    closed = scene.lost(0, f"the store that it keeps at {PORT} has closed its connections.")
    assert matches(scene.said[1], scene.lost(0)) or matches(scene.said[1], closed)
    assert scene.said[2] == ""
    assert scene.seconds < 20


def test_the_one_with_the_store_stopped(scenes: dict[str, Scene]) -> None:
    scene = scenes["store_stopped"]
    assert scene.codes == [-9, 1, 1]
    silent = f"the store that it keeps at {PORT} has not answered for {SECONDS} s."
    assert matches(scene.said[1], scene.lost(0, silent))
    assert scene.said[2] == ""
    assert scene.seconds < 30


def test_the_launcher_killed(scenes: dict[str, Scene]) -> None:
    scene = scenes["launcher_killed"]
    assert scene.codes == [1, 1, 1]
    lost = f"error: the launcher is gone: the store that torchrun keeps at {PORT} has closed its connections.\n"
    assert matches(scene.said[0], lost)
    assert scene.said[1:] == ["", ""]


@pytest.mark.parametrize(("name", "rank"), [("failed_in_a_step", 2), ("failed_while_others_sleep", 1)])
def test_one_fails(scenes: dict[str, Scene], name: str, rank: int) -> None:
    scene = scenes[name]
    assert scene.codes == [2] * len(scene.codes)
    assert scene.said[0] == scene.failed(rank, BROKEN)
    assert not any(scene.said[1:])
    assert scene.seconds < 20


@pytest.mark.parametrize("name", ["first_failed", "failed_everywhere"])
def test_an_error_of_rank_0_or_of_all_reads_like_that_of_a_single_process(scenes: dict[str, Scene], name: str) -> None:
    scene = scenes[name]
    assert scene.codes == [2] * len(scene.codes)
    assert scene.said[0] == BROKEN
    assert not any(scene.said[1:])


def test_one_fails_before_the_others_can_exchange_anything(scenes: dict[str, Scene]) -> None:
    scene = scenes["failed_before_the_group"]
    assert scene.codes == [2, 2, 2]
    assert scene.said == [scene.failed(1, "error: device 'cuda:1' is not here.\n"), "", ""]


def test_an_error_that_nobody_foresaw_is_one_line_and_the_place_of_its_traceback(scenes: dict[str, Scene]) -> None:
    scene = scenes["unforeseen"]
    assert scene.codes == [1, 1]
    wanted = "error: ZeroDivisionError: integer division or modulo by zero\n       The traceback is in "
    assert scene.said[0].startswith(scene.failed(1, wanted))
    assert scene.said[0].count("\n") == 3
    assert scene.said[1] == ""


@pytest.mark.parametrize("name", ["interrupted", "terminated_by_hand"])
def test_a_signal_to_one_of_them_ends_all(scenes: dict[str, Scene], name: str) -> None:
    scene = scenes[name]
    assert scene.codes == [130, 130]
    assert scene.said == [scene.failed(1, "interrupted\n"), ""]


def test_those_that_the_launcher_terminates_say_why_first(scenes: dict[str, Scene]) -> None:
    scene = scenes["terminated"]
    assert scene.codes == [1, -9, 1]
    assert scene.said == [scene.lost(1), "", ""]


def test_an_end_is_not_taken_for_death(scenes: dict[str, Scene]) -> None:
    scene = scenes["ended_at_different_times"]
    assert scene.codes == [0, 0, 0]
    assert scene.said == ["", "", ""]
    assert scene.seconds > 3, "rank 0 was done at once, and would have taken the store with it"


def test_trouble_after_rank_0_has_finished(scenes: dict[str, Scene]) -> None:
    failed, killed = scenes["failed_at_the_end"], scenes["killed_at_the_end"]
    assert failed.codes == [2, 2, 0]
    assert failed.said == [failed.failed(1, BROKEN), "", ""]
    assert killed.codes == [1, -9, 0]
    assert killed.said == [killed.lost(1), "", ""]


def test_one_of_another_machine_is_missed_when_it_gives_no_sign(scenes: dict[str, Scene]) -> None:
    scene = scenes["killed_elsewhere"]
    assert scene.codes == [1, 1, -9]
    lost = scene.lost(2, f"no sign of life for {SECONDS} s.", "node-b")
    assert matches(scene.said[0], lost + "       The last checkpoint is step-3.\n")
    assert scene.said[1] == ""


def test_a_terminal_of_another_machine_is_told_where_to_look(scenes: dict[str, Scene]) -> None:
    scene = scenes["failed_elsewhere"]
    assert scene.codes == [2, 2, 2]
    assert scene.said == [scene.failed(2, BROKEN, "node-b"), "", "rank 2 on node-b: failed; rank 0 has said why\n"]


def test_what_an_earlier_start_left_in_the_store_is_not_read(scenes: dict[str, Scene]) -> None:
    scene = scenes["started_again"]
    assert scene.codes == [0, 0, 0]
    assert scene.said == ["", "", ""]


# --- the parts


def test_a_process_and_its_number() -> None:
    me = whereabouts()
    assert me.here
    assert not me.ended()
    assert replace(me, started="1").ended(), "a later process with the same number"
    assert not replace(me, place="another machine").here
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    there = replace(me, pid=child.pid, started=lifesigns._started(child.pid) or "")
    assert not there.ended()
    child.kill()
    time.sleep(0.2)
    assert there.ended(), "not yet collected by its parent"
    child.communicate()
    assert there.ended()


def test_silence_is_what_was_heard_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    monkeypatch.setattr(lifesigns, "time", Clock)
    store, others = dist.HashStore(), Others(World(0, 3))
    elsewhere = replace(whereabouts(), place="another machine")
    for rank in (1, 2):
        store.set(f"who/{rank}", json.dumps(elsewhere.__dict__))
        store.set(f"alive/{rank}", "0")
    others.listen(store, everyone=False)
    for beat in range(10):
        now += 1.0
        store.set("alive/1", str(beat + 1))
        others.listen(store, everyone=False)
    assert others.lost(9.5, answered=True) == (2, "no sign of life for 10 s.")
    assert others.lost(10.5, answered=True) is None
    now += 1000  # this process was stopped itself
    others.listen(store, everyone=False)
    assert others.lost(12.5, answered=True) is None
    store.set("alive/2", lifesigns.FINISHED.decode())
    others.listen(store, everyone=False)
    assert (others.finished, others.all_finished()) == ({2}, False)


def test_which_errors_are_the_consequence_of_another() -> None:
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    assert _is_consequence(closed)
    assert _is_consequence(dist.DistNetworkError("Broken pipe"))
    with pytest.raises(NibbleError) as caught:
        raise NibbleError("step 3") from closed
    assert _is_consequence(caught.value)
    assert not _is_consequence(RuntimeError("a shape is wrong"))


def test_one_process_alone_needs_nothing_of_it() -> None:
    said: list[str] = []

    def fail(watch: Watch) -> int:
        with watch.errors():
            raise NibbleError("broken")

    assert watched(World(), lambda watch: 3, describe, said.append) == 3
    assert watched(World(), fail, describe, said.append) == 2
    assert said == ["error: broken"]
    assert Watch.alone().world == World()


def test_those_that_do_not_come_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_environment(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NibbleError, match=r"the 2 processes did not all meet at 127\.0\.0\.1:\d+ within 0:00:01: .*\n"):
        launch_store(World(0, 2), timedelta(seconds=1))
    server = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), None, True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    server.set("init/", "9")  # of an earlier start: torch believes that all are here
    with pytest.raises(NibbleError, match="rank 1 did not come"):
        launch_store(World(0, 2), timedelta(seconds=1))
