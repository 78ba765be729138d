"""The tests of tests/kernels in processes of their own: a CPU runs Triton's kernels where TRITON_INTERPRET was set
before Triton is imported. In a few processes, since each imports torch, the libraries and Triton first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "kernels").glob("test_*.py"))


PROCESSES = 4


def interpret(*arguments: Path | str) -> None:
    assert os.environ.get("TRITON_INTERPRET") != "1", "run tests/kernels itself where the variable is set"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize("number", range(PROCESSES))
def test_kernels_under_the_interpreter(number: int) -> None:
    interpret(*FILES[number::PROCESSES])


@pytest.mark.slow
def test_slow_kernels_under_the_interpreter() -> None:
    interpret(FILES[0].parent, "-m", "slow")
