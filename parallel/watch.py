"""A process that fails or dies ends the others, and the user reads why: once, in full.

Without this they would wait in a collective for one that never comes. A thread of every process shows a sign of life
and looks for the others'. Whoever finds one gone, or fails itself, writes the cause to the store, and the first cause
counts: what the others then run into is its consequence and not worth a word. Rank 0 says it where it can.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from parallel.lifesigns import FINISHED, Others, whereabouts
from parallel.store import launch_store
from parallel.world import World

_PULSE = 0.5  # seconds between two signs of life
_HURRY = 0.1  # the same once the run is ending
_LOOK = 0.2  # seconds between two looks at what is known
_GRACE = 4.0  # seconds in which the main thread may come out by itself, before the process is ended
_SAID = 2 * _GRACE  # how long the others wait for rank 0 to say the cause
_ANSWER = timedelta(seconds=10)  # of the store to one question
_LAUNCHER = -1  # in place of a rank

Describe = Callable[[BaseException], tuple[str, int]]


@dataclass(frozen=True)
class Cause:
    """Why the run ends. rank, host, pid: whose failure or end it is; teller: the rank that found it out. lost: it is
    gone without a word; otherwise `text` is what it said. code: the exit code of all.
    """

    rank: int
    host: str
    pid: int
    teller: int
    text: str
    code: int
    lost: bool = False

    @property
    def short(self) -> str:
        if self.rank == _LAUNCHER:
            return "the launcher is gone"
        return f"rank {self.rank} (pid {self.pid} on {self.host}) {'is gone' if self.lost else 'failed'}"


def watched(world: World, body: Callable[[Watch], int], describe: Describe, say: Callable[[str], None]) -> int:
    """Runs body(watch), which returns an exit code, beside the other processes of `world`; returns the exit code.

    An error of the body, or of another process, is said by `say` once over all processes. describe(error) is what the
    user is to read of an error, and its exit code. Where the main thread doesn't come out of what it does (a collective
    that waits for a dead process), this ends the process from another thread.
    """
    watch = Watch(world, launch_store(world), describe, say)
    watch._start()
    code = 1
    with watch._signals():
        try:
            code = watch._finish(body(watch))
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  it is described and ends the run
            code = watch._leave(error)
        finally:
            watch._close(code)
    return code


class Watch:
    """What a process knows of the others; `watched` makes it.

    store: what the processes share, for the process group. lost_after: seconds without a sign of life after which a
    process is taken for lost. hint: what to add to the news of a loss, such as where the last checkpoint is. log: takes
    a text for this process's log file. Other threads call hint and log.
    """

    def __init__(self, world: World, store: dist.Store, describe: Describe, say: Callable[[str], None]) -> None:
        self.world, self.store = world, store
        self.lost_after = 30.0
        self.hint: Callable[[], str] = lambda: ""
        self.log: Callable[[str], None] = lambda text: None
        self._describe, self._say = describe, say
        self._me, self._others = whereabouts(), Others(world)
        self._stop, self._wake = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        # What this process has to tell,
        self._found: Cause | None = None
        self._own_text: str | None = None  # of the error that ended the main thread's work
        self._said = self._finished = self._terminated = False
        self._settling = threading.Lock()  # whoever has it ends the process, and doesn't give it back
        # and what it has heard. Only the talking thread uses the store: a question may stay without an answer.
        self._cause: Cause | None = None
        self._heard_said = self._all_heard = self._finish_told = self._cut_off = False
        self._rounds = 0

    @staticmethod
    def alone() -> Watch:
        """That of a process without others."""
        return Watch(World(), launch_store(World()), lambda error: (str(error), 1), lambda text: None)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """An error that leaves this block is told to the others at once. To be opened inside the process group: taking
        that down may wait for the others."""
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise

    # --- in the main thread

    def _start(self) -> None:
        if self.world.size == 1:
            return
        # The main thread may use its own connection for as long as it waits for the others.
        connection: dist.Store = self.store.clone()  # type: ignore[attr-defined, unused-ignore]
        connection.set_timeout(_ANSWER)
        with contextlib.suppress(dist.DistError):  # one that died meanwhile; it will be found out
            self._others.meet(connection, self._me)
        for name, work in (("talk", lambda: self._talk(connection)), ("judge", self._judge)):
            self._threads.append(threading.Thread(target=work, name=f"watch-{name}", daemon=True))
            self._threads[-1].start()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """A SIGTERM that nobody else handles interrupts the main thread, like Ctrl-C. torchrun sends it to all when one
        of them has died; without a handler they would be gone before they had said so."""
        if self.world.size == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(number: int, frame: FrameType | None) -> None:
            self._terminated = True
            raise KeyboardInterrupt

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tell(self, error: BaseException) -> None:
        """Make `error` the cause, unless there is one already of which it is but a consequence."""
        if self.world.size == 1 or self._own_text is not None or isinstance(error, SystemExit):
            return
        if _is_consequence(error):
            self._wait(lambda: self._cause is not None, self.lost_after + 2 * _GRACE)
        elif self._terminated:
            self._wait(lambda: self._cause is not None, _GRACE)
        self._own_text, code = self._describe(error)
        if self._cause is None:
            me = self._me
            self._propose(Cause(self.world.rank, me.host, me.pid, self.world.rank, self._own_text, code))
            self._wait(lambda: self._cause is not None, 2 * _GRACE)

    def _leave(self, error: BaseException) -> int:
        """Sees that the cause is said; the exit code. It takes a few seconds, and a further signal changes nothing."""
        if self._threads and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._tell(error)
        self._settling.acquire()
        cause = self._cause or self._found
        if cause is None:  # alone
            text, code = self._describe(error)
            self._say(text)
            return code
        self._settle(cause)
        return cause.code

    def _finish(self, code: int) -> int:
        """This process has done all it had to. Rank 0 waits for the others: the store may end with it."""
        if self.world.size == 1:
            return code
        self._finished = True
        self._wake.set()
        while not (self._cause or self._cut_off):
            if self._finish_told and (not self.world.first or self._others.all_finished()):
                return code
            time.sleep(_LOOK / 4)
        if self._cause is None:
            return code
        self._settling.acquire()
        self._settle(self._cause)
        return self._cause.code

    def _close(self, code: int) -> None:
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(_GRACE)
        if any(thread.is_alive() for thread in self._threads):
            _exit_now(code)  # it waits for a store that doesn't answer; Python would wait for it

    # --- in the main or the judging thread

    def _propose(self, cause: Cause) -> None:
        if self._found is None:
            self._found = cause
        self._wake.set()

    def _wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true in time."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK / 4)
        return True

    def _settle(self, cause: Cause) -> None:
        """See that the cause is said once, and heard by all before the one who keeps the store leaves."""
        with contextlib.suppress(OSError, ValueError):  # a full disk, a log that is closed already
            self.log(f"ended because {cause.short}:\n{cause.text}")
        if self._cut_off:
            if self._others.first_here(without=cause.rank if cause.lost else None):
                self._say(self._news(cause))
            return
        teller = cause.teller == self.world.rank
        speaks = teller if cause.lost and cause.rank == 0 else self.world.first
        if not speaks:
            speaks = not self._wait(lambda: self._heard_said or self._cut_off, _SAID) and teller
        if speaks:
            self._say(self._news(cause))
            self._said = True
            self._wake.set()
        elif self._others.first_here():  # then rank 0 speaks on another machine
            whose = "failed" if cause.rank == self.world.rank else f"ended because {cause.short}"
            self._say(f"rank {self.world.rank} on {self._me.host}: {whose}; rank 0 has said why")
        if self.world.first or speaks:
            self._wait(lambda: self._all_heard or self._cut_off, _GRACE)

    def _news(self, cause: Cause) -> str:
        if not cause.lost:
            # An error of rank 0, or of all, is told as that of a single process would be.
            common = cause.rank == 0 or (self.world.first and cause.text == self._own_text)
            return cause.text if common else f"{cause.short}:\n{cause.text}"
        lines = [f"error: {cause.short}: {cause.text}"]
        with contextlib.suppress(OSError):
            lines += [f"       {line}" for line in self.hint().splitlines()]
        return "\n".join(lines)

    # --- in a thread of its own: talking to the store

    def _talk(self, store: dist.Store) -> None:
        try:
            while not self._stop.is_set():
                self._exchange(store)
                self._rounds += 1
                self._wake.wait(_HURRY if self._finished or self._found or self._cause else _PULSE)
                self._wake.clear()
        except (dist.DistError, RuntimeError):
            self._cut_off = True  # a broken connection is not mended by waiting

    def _exchange(self, store: dist.Store) -> None:
        rank = self.world.rank
        store.set(f"alive/{rank}", FINISHED.decode() if self._finished else str(self._rounds + 1))
        self._finish_told = self._finished
        self._others.listen(store, everyone=self._finished and self.world.first)
        if self._cause is None:
            if self._found is not None:
                first = store.compare_set("cause", "", json.dumps(asdict(self._found)))
            else:
                first = store.get("cause") if store.check(["cause"]) else b""
            if first:
                self._cause = Cause(**json.loads(first))
        if self._cause is not None:
            if self._said:
                store.set("said", "")
            if store.check(["said"]):
                store.set(f"heard/{rank}", "")
                self._heard_said = True
            absent = {*self._others.finished, *([self._cause.rank] if self._cause.lost else [])}
            waited = [f"heard/{other}" for other in range(self.world.size) if other not in absent]
            self._all_heard = store.check(waited)

    # --- in another thread: judging

    def _judge(self) -> None:
        last, rounds, unanswered, ending_for = time.monotonic(), -1, 0.0, 0.0
        while not self._stop.wait(_LOOK):
            now = time.monotonic()
            passed, last = min(now - last, 5 * _LOOK), now  # not the time in which this process was stopped itself
            unanswered = unanswered + passed if self._rounds == rounds else 0.0
            rounds = self._rounds
            if self._cause is None and self._found is None:
                self._look(unanswered)
            if self._cause is None and (self._cut_off or unanswered > _GRACE):
                self._cause = self._found  # there is nobody to confirm it
                self._cut_off = self._cut_off or self._cause is not None
            ending_for += passed if self._cause is not None else 0.0
            if self._cause is not None and ending_for > _GRACE and self._settling.acquire(blocking=False):
                self._settle(self._cause)
                _exit_now(self._cause.code)

    def _look(self, unanswered: float) -> None:
        """Whether another process is lost, or the store."""
        lost = self._others.lost(self.lost_after, answered=not self._cut_off and unanswered < _GRACE)
        if lost is None and (self._cut_off or unanswered > self.lost_after):
            lost = self._store_lost(unanswered)
        if lost is not None:
            rank, text = lost
            there = self._others.known.get(rank)
            host, pid = (there.host, there.pid) if there is not None else ("an unknown machine", 0)
            self._propose(Cause(rank, host, pid, self.world.rank, text, 1, lost=True))

    def _store_lost(self, unanswered: float) -> tuple[int, str] | None:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        how = "has closed its connections" if self._cut_off else f"has not answered for {unanswered:.0f} s"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return _LAUNCHER, f"the store that torchrun keeps at {address} {how}."
        if 0 in self._others.finished:
            return None
        return 0, f"the store that it keeps at {address} {how}."


def _is_consequence(error: BaseException | None) -> bool:
    """Whether this is what a process meets when another one is gone: a collective or the store failed."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _exit_now(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)
