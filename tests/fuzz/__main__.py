"""python -m tests.fuzz --minutes 10: inputs at random for as long as asked; exit code 1 at the first fault."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import Target, targets

SECONDS = 20  # for one input
MEMORY = 2 * 2**30  # bytes beyond what the process has when it starts
_AT_A_TIME = 200  # inputs of a target


class Hang(BaseException):
    """Not an Exception, so that little on the way takes it for an error of the input."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"an input takes more than {SECONDS} s")


@dataclass
class Tally:
    """Of one target: the inputs opened, and the seconds of the slowest."""

    inputs: int = 0
    slowest: float = 0.0


def _open_some(target: Target, tally: Tally, number: int) -> None:
    @seed(number)
    @settings(
        max_examples=_AT_A_TIME,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
    )
    @given(target.inputs)
    def opens(drawn: object) -> None:
        begun = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            target.open(drawn)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.monotonic() - begun
        tally.inputs, tally.slowest = tally.inputs + 1, max(tally.slowest, seconds)
        if seconds > SECONDS:  # a reader that catches everything has caught Hang too
            raise Hang(f"an input took {seconds:.0f} s")

    opens()


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--only", nargs="*", help="names of targets")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    made = [target for target in targets() if not options.only or target.name in options.only]
    signal.signal(signal.SIGALRM, _hang)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tallies, begun, number = {target.name: Tally() for target in made}, time.monotonic(), options.seed
    fault = True
    try:
        while time.monotonic() - begun < 60 * options.minutes:
            for target in made:
                _open_some(target, tallies[target.name], number)
            number += 1
        fault = False
    finally:
        seconds = time.monotonic() - begun
        for name, tally in tallies.items():
            print(f"{name:12} {tally.inputs:8,} inputs, the slowest {tally.slowest:.2f} s")
        total = sum(tally.inputs for tally in tallies.values())
        print(f"{total:,} inputs in {seconds:.0f} s, {'a' if fault else 'no'} fault", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
