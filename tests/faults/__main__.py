"""python -m tests.faults: kills runs at random moments and damages their files; what became of each.

Every trial ends in one of these ways, and only "lost" is a fault:
    exact    the same command went on, and adapter and losses are those of a run that was left alone, bit for bit
    told     the command ended with exit code 2 and a message; the newest whole checkpoint is as new as it was before
    lost     anything else: other results, a traceback, a hang, work gone that was saved
    missed   nothing was disturbed, because the run had ended by then: no trial
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import LIMIT, Call, Forked, forked_calls
from tests.run_helpers import PATIENT, World, curve, make_world, settings
from train.state.checkpoint_folder import folders, problem, step_of

STEPS = 12
TARGET = "train.__main__:main"


@dataclass
class Trials:
    """world: what is trained on. folder: of all runs. outcomes: by kind of trial and outcome."""

    world: World
    folder: Path
    processes: int
    draw: random.Random
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    numbers: int = 0

    def arguments(self, out: Path) -> list[str]:
        changes = {
            "train__max_steps": STEPS,
            "train__save_every": 2,
            "data__eval_fraction": 0.1,
            "train__eval_every": 4,
        }
        return [*PATIENT, *settings(self.world, out, **changes)]

    def start(self, out: Path, target: str = TARGET, *more: object) -> list[Forked]:
        said = self.folder / f"said-{self.processes}"
        said.mkdir(exist_ok=True)
        self.numbers += 1
        calls = [
            Call(target, json.dumps([self.arguments(out), *more]), f"{said}/{self.numbers}-{rank}", command=True)
            for rank in range(self.processes)
        ]
        return forked_calls(calls)

    def said(self) -> str:
        found = sorted((self.folder / f"said-{self.processes}").glob(f"{self.numbers}-*.err"))
        return "".join(path.read_text(errors="replace") for path in found)

    def finish(self, processes: list[Forked]) -> list[int]:
        """The exit codes; where one process has ended with an error, a launcher ends the others."""
        deadline = time.monotonic() + LIMIT
        while any(process.poll() is None for process in processes):
            codes = [process.poll() for process in processes]
            if any(codes) or time.monotonic() > deadline:
                time.sleep(1.0)
                for process in processes:
                    process.kill()
            time.sleep(0.02)
        return [process.wait() for process in processes]

    def new(self, name: str) -> Path:
        return self.folder / f"{self.processes}-{name}-{self.numbers}"

    def record(self, kind: str, outcome: str, why: str = "") -> None:
        self.outcomes[kind, outcome] += 1
        if outcome == "lost":
            print(f"LOST: {kind}: {why}\n{self.said()[-2000:]}", file=sys.stderr, flush=True)

    def undisturbed(self) -> tuple[str, float]:
        """What a run that is left alone gives, and how long it takes in seconds."""
        begun, out = time.monotonic(), self.new("reference")
        if any(self.finish(self.start(out))):
            raise SystemExit(f"the undisturbed run failed:\n{self.said()}")
        return result_of(out), time.monotonic() - begun

    def judge(self, kind: str, out: Path, reference: str) -> None:
        """Give the same command until it is done, and compare."""
        before = newest_step(out)
        for _ in range(3):
            codes = self.finish(self.start(out))
            if not any(codes):
                same = result_of(out) == reference
                self.record(kind, "exact" if same else "lost", f"{out}: other results")
                return
            if "Traceback" in self.said() or 2 not in codes:
                self.record(kind, "lost", f"{out}: exit codes {codes}")
                return
        after = newest_step(out)
        self.record(kind, "told" if after >= before else "lost", f"{out}: step {before} was saved, {after} is left")


def result_of(out: Path) -> str:
    """A hash of the adapter's bytes and of the curve. Any difference in training is a difference here."""
    digest = hashlib.sha256(repr(curve(out)).encode())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((out / "adapter" / name).read_bytes())
    return digest.hexdigest()


def newest_step(out: Path) -> int:
    """Of the checkpoints whose files are what was written; -1 where there is none."""
    whole = (path for path in folders(out / "checkpoints") if problem(path, hashes=True) is None)
    return max(map(step_of, whole), default=-1)


def kills(trials: Trials, count: int, reference: str, seconds: float) -> None:
    """A run is killed one to three times, at moments drawn over its whole length, and given again each time."""
    killed = 0
    while killed < count:
        out, before = trials.new("killed"), killed
        for _ in range(trials.draw.randint(1, 3)):
            running = trials.start(out)
            time.sleep(trials.draw.uniform(0, seconds))
            # One process, as a machine does, or all, as a launcher or a user does.
            alive = [
                process
                for process in trials.draw.choice([running, running[:1], running[-1:]])
                if process.poll() is None
            ]
            for process in alive:
                process.kill()
            trials.finish(running)
            killed += bool(alive)
        if killed > before:
            trials.judge("killed", out, reference)
        else:
            trials.record("killed", "missed")
        shutil.rmtree(out, ignore_errors=True)
    trials.outcomes["killed", "kills"] = killed


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(max(path.stat().st_size, 1))])


def damages(trials: Trials, count: int, reference: str, seconds: float) -> None:
    """A run is stopped in its middle, one of its files is damaged, removed or moved, and the command is given again."""
    actions: dict[str, Callable[[Path, random.Random], None]] = {
        "flipped": flip,
        "truncated": truncate,
        "removed": lambda path, draw: path.unlink(),
    }
    for number in range(count):
        kind = list(actions)[number % len(actions)]
        out = trials.new(kind)
        running = trials.start(out)
        while not list((out / "checkpoints").glob("step-*")) and any(process.poll() is None for process in running):
            time.sleep(0.01)
        time.sleep(trials.draw.uniform(0, seconds / 4))
        for process in running:
            process.kill()
        trials.finish(running)
        files = [path for path in sorted((out / "checkpoints").rglob("*")) if path.is_file() and path.stat().st_size]
        if files:
            actions[kind](trials.draw.choice(files), trials.draw)
            trials.judge(kind, out, reference)
        else:
            trials.record(kind, "missed")
        shutil.rmtree(out, ignore_errors=True)


def disks(trials: Trials, count: int, reference: str) -> None:
    """The disk is full, or becomes read-only, at some point of the run; afterwards there is room again."""
    for number in range(count):
        kind, out = ("disk full", "read-only")[number % 2], trials.new("disk")
        if kind == "disk full":
            running = trials.start(out, "tests.faults.limited:full", trials.draw.randrange(500, 60_000))
        else:
            running = trials.start(out, "tests.faults.limited:read_only", str(out), trials.draw.randrange(40))
        codes = trials.finish(running)
        if "Traceback" in trials.said() or not set(codes) <= {0, 2, -signal.SIGKILL}:
            trials.record(kind, "lost", f"exit codes {codes}")
            continue
        if any(codes):
            trials.judge(kind, out, reference)
        else:  # it wrote too little for the limit
            same = result_of(out) == reference
            trials.record(kind, "missed" if same else "lost", f"{out}: other results")
        shutil.rmtree(out, ignore_errors=True)


def moves(trials: Trials, count: int, reference: str, seconds: float) -> None:
    """The folder is moved away in mid-run: the run must end, and goes on exactly where its folder is put back."""
    for _ in range(count):
        out = trials.new("moved")
        running = trials.start(out)
        while not list((out / "checkpoints").glob("step-*")) and any(process.poll() is None for process in running):
            time.sleep(0.01)
        if all(process.poll() is not None for process in running):
            trials.record("moved", "missed")
            continue
        away = out.with_name(out.name + "-away")
        out.rename(away)
        codes = trials.finish(running)
        again = out.exists() and any(path.is_file() for path in out.rglob("*") if path.name != ".lock")
        if again or not any(codes):
            trials.record("moved", "lost", f"exit codes {codes}, {'a new folder' if again else 'nothing said'}")
            continue
        shutil.rmtree(out, ignore_errors=True)
        away.rename(out)
        trials.judge("moved", out, reference)
        shutil.rmtree(out, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Kill and damage trials.")
    parser.add_argument("--kills", type=int, default=50, help="for each number of processes (default: 50)")
    parser.add_argument("--damages", type=int, default=24, help="damaged checkpoints (default: 24)")
    parser.add_argument("--disks", type=int, default=12, help="full and read-only disks (default: 12)")
    parser.add_argument("--moves", type=int, default=3, help="folders moved away (default: 3)")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lost = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        (Path(name) / "world").mkdir()
        world = make_world(Path(name) / "world")
        for processes in arguments.processes:
            trials = Trials(world, Path(name), processes, random.Random(arguments.seed))
            trials.undisturbed()  # the first one also waits for imports
            reference, seconds = trials.undisturbed()
            kills(trials, arguments.kills, reference, seconds)
            damages(trials, arguments.damages, reference, seconds)
            disks(trials, arguments.disks, reference)
            moves(trials, arguments.moves, reference, seconds)
            found = {f"{kind}: {outcome}": count for (kind, outcome), count in sorted(trials.outcomes.items())}
            print(json.dumps({"processes": processes, "seconds of a run": round(seconds, 1), **found}), flush=True)
            lost += sum(count for (_, outcome), count in trials.outcomes.items() if outcome == "lost")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
