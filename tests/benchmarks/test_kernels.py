"""benchmarks.kernels: what the launches of a step compile to on cards that aren't here, and what is a fault."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.compiled import TARGETS, Built, Compiled, step_of
from benchmarks.kernels import CARDS, row_of, work_table

ROOT = Path(__file__).parents[2]


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Triton has to be there before the kernels are."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_kernels_compile_for_a_card_that_is_not_here() -> None:
    run = compiled("--arch", "qwen3_moe", "--target", "90", "--only", "grouped_gradient", "combine")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "HGMMA" in run.stdout and "combine" in run.stdout and "0 with a fault" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", CARDS)
def test_every_kernel_of_every_architecture_compiles(target: str) -> None:
    run = compiled("--all", "--storage", "nf4", "int8", "--target", target)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_the_work_of_a_launch() -> None:
    """SwiGLU of Qwen3-30B-A3B reads 2 · 768 and writes 768 bfloat16 values of 8 rows for each of 4,096 tokens; the
    router multiplies its 4,096 tokens of 2,048 values with 128 rows.
    """
    printed = work_table("Qwen3-30B-A3B", step_of("qwen3_moe", "nf4"))
    cells = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    assert cells["expert_swiglu"][:3] == ["2", f"{8 * 4096 * 3 * 768 * 2 / 2**20:.1f}", "0.0"]
    assert cells["router"][2] == f"{2 * 4096 * 2048 * 128 / 1e9:.1f}"
    assert "mm" not in cells and "addmm" not in cells


def test_what_is_a_fault() -> None:
    assert {f"{10 * major + minor}" for major, minor in TARGETS} == set(CARDS)

    def fault(capability: tuple[int, int] = (9, 0), **changed: object) -> str | None:
        code = Compiled(64, spills=0, shared=1 << 17, widest=128, multiplies=True, products={"HMMA": 2})
        built = Built("kernel", capability, 1, replace(code, **changed))  # type: ignore[arg-type]
        assert row_of(built)[-1] == (built.fault or "")
        return built.fault

    assert fault() is None
    assert fault(products={}, multiplies=False) is None
    assert fault(spills=8) == "spills 8 bytes"
    assert fault((8, 9)) == "more shared memory than the card's 99 KiB"
    assert fault(products={}) == "a product without tensor cores"
