"""The CUDA benchmark's own logic, without CUDA: its table, its messages, and its smallest checks."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, gpu_checks
from benchmarks.gpu_case import Case, measure

GIB = 2**30


def test_without_cuda_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu"]) == 2
    assert "error: benchmarks.gpu needs a CUDA device" in capsys.readouterr().err


def test_the_table_shows_figures_and_reasons() -> None:
    result = {
        "weights_bytes": 15 * GIB,
        "peak_bytes": 20 * GIB,
        "reserved_bytes": 21 * GIB,
        "tokens_per_second": 4321.0,
    }
    rows = [(gpu.CASES[0], gpu.Outcome([result])), (gpu.CASES[3], gpu.Outcome([], "out of memory"))]
    text = gpu.table(rows, passed=7, failed=1, unfinished="")
    first, last = text.splitlines()[3:]
    assert "checks of CUDA paths: 7 passed, 1 failed" in text
    assert first.split("  ")[0] == "nf4, LoRA on attention"
    for figure in ("15.00 GiB", "20.00 GiB", "21.00 GiB", "4,321", "~24 GiB"):
        assert figure in first
    assert "out of memory" in last
    assert "out of memory on 48 GB" in last


def test_a_failing_process_leaves_its_reason() -> None:
    outcome = gpu.run_module("benchmarks.gpu_case", "no json", 60)
    assert outcome.results == []
    assert "JSONDecodeError" in outcome.failure


def test_a_check_that_fails_or_raises_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> float:
        raise RuntimeError("no such kernel")

    checks = [("exact", lambda: 0.0, 0.0), ("far off", lambda: 0.5, 1e-5), ("broken", broken, 1.0)]
    monkeypatch.setattr(gpu_checks, "GROUPS", (lambda device: iter(checks),))
    results: list[dict] = []
    assert not gpu_checks.run_checks(torch.device("cpu"), results.append)
    assert [result["passed"] for result in results] == [True, False, False]
    assert "error 5.0e-01 (at most 1e-05)" in gpu.check_line(results[1])
    assert "RuntimeError: no such kernel" in gpu.check_line(results[2])


@pytest.mark.parametrize("group", [gpu_checks.experts_checks, gpu_checks.attention_checks, gpu_checks.loss_checks])
def test_the_checks_hold_on_the_cpu(group: gpu_checks.Callable) -> None:
    for name, error, tolerance in group(torch.device("cpu")):
        assert error() <= tolerance, name


def test_a_case_runs_at_a_small_size() -> None:
    case = Case("tiny", "nf4", ("attention", "experts"), rank=8, length=32, warmup=1, steps=1, device="cpu", tiny=True)
    assert Case.loads(case.dumps()) == case
    result = measure(case)
    assert result["tokens_per_second"] > 0
    assert result["trained"] > 0
    assert all(0 < loss < 20 for loss in result["losses"])
