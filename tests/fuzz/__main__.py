"""python -m tests.fuzz --minutes 10: inputs at random for as long as asked; exit code 1 at the first fault."""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import Target, targets

SECONDS = 20  # for one input
MEMORY = 2 * 2**30  # bytes beyond what the process has when it starts
_AT_A_TIME = 200  # inputs of a target


class Hang(BaseException):
    """Not an Exception, so that nothing on the way takes it for an error of the input."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"an input takes more than {SECONDS} s")


def _opened(target: Target, counts: dict[str, int], number: int) -> None:
    slowest = 0.0

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
        nonlocal slowest
        begun = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            target.open(drawn)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        counts[target.name] += 1
        slowest = max(slowest, time.monotonic() - begun)

    opens()


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--only", nargs="*", help="names of targets")
    arguments.add_argument("--seed", type=int, default=0)
    given_arguments = arguments.parse_args()
    made = [target for target in targets() if not given_arguments.only or target.name in given_arguments.only]
    signal.signal(signal.SIGALRM, _hang)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts, begun, number = {target.name: 0 for target in made}, time.monotonic(), given_arguments.seed
    while time.monotonic() - begun < 60 * given_arguments.minutes:
        for target in made:
            _opened(target, counts, number)
        number += 1
    seconds = time.monotonic() - begun
    print(json.dumps({"inputs": sum(counts.values()), "seconds": round(seconds), **counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
