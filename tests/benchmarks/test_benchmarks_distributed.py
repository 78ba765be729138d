"""The benchmark of several processes: it runs at a tiny size, and refuses figures that can't be right."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import distributed, traffic
from quant.common.errors import NibbleError

MiB = 2**20


@pytest.mark.slow
def test_tiny_run_prints_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own checks pass: the losses are those of one process, and what is gathered is what the plan says."""
    command = ["--tiny", "--processes", "2", "--expert", "2", "--tokens", "32", "--steps", "1", "--threads", "2"]
    assert distributed.main([*command, "--work", str(tmp_path), "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    for line in ("frozen weights held", "peak of loading, hub checkpoint", "gathered", "tokens to and from experts"):
        assert line in said
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    check_that_checks_can_fail(found)
    for rank in found["train"]:
        assert rank["held"] == pytest.approx(rank["total"] / 2, rel=0.02)
        assert rank["alive"] == pytest.approx(rank["held"], rel=0.02)
        assert 0 < rank["gathered_backward"] < rank["gathered_forward"] < rank["dense"]


def check_that_checks_can_fail(found: dict[str, Any]) -> None:
    for change, said in (
        (lambda wrong: wrong["alone"][0]["losses"].__setitem__(0, 9.0), "step 1: the loss of 2 processes is"),
        (lambda wrong: wrong["train"][1].__setitem__("gathered_forward", 1), "process 1 gathered"),
    ):
        wrong = copy.deepcopy(found)
        change(wrong)
        with pytest.raises(NibbleError, match=said):
            distributed.check_equal_work(wrong, "float32")


def event(
    name: str, ts: float, shapes: list[Any], types: list[str], concrete: list[str] | None = None
) -> dict[str, Any]:
    arguments = {"Input Dims": shapes, "Input type": types, "Concrete Inputs": concrete or []}
    return {"name": name, "ts": ts, "dur": 1.0, "tid": 1, "args": arguments}


def test_traffic_leaves_out_what_stays() -> None:
    rows = [[7, 4], [6, 4], []]
    events = [
        event("c10d::_allgather_base_", 1.0, [[40], [10]], ["unsigned char", "unsigned char"]),
        event("autograd::engine::evaluate_function: X", 5.0, [], []),
        event("c10d::_allgather_base_", 5.5, [[40], [20]], ["c10::BFloat16", "c10::BFloat16"]),
        event("c10d::_reduce_scatter_base_", 7.0, [[10], [40]], ["float", "float"]),
        event("c10d::alltoall_base_", 8.0, rows, ["float", "float", ""], ["", "", "", "[3, 4]", "[1, 5]"]),
        event("c10d::alltoall_base_", 9.0, [[8], [8], []], ["long int", "long int", ""], ["", "", "", "[]", "[]"]),
        event("c10d::allreduce_", 9.5, [[[4]]], ["TensorList"]),
    ]
    moved = traffic._summed(events, owner=0, owners=2)
    assert moved == traffic.Traffic(30, 40, 120, 5 * 4 * 4 + 4 * 8)
    assert moved.gathered == 70


@pytest.mark.slow
def test_processes_that_fail_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distributed.main(["--tiny", "--processes", "3", "--expert", "2", "--work", str(tmp_path)]) == 2
    assert "error: --expert 2 doesn't divide --processes 3." in capsys.readouterr().err
    job = distributed.Job("train", (str(tmp_path),), 1, 1, "nf4", "float32", 8, 1, 1, 1, 1)
    assert distributed.Job.loads(job.dumps()).threads == 1
    with pytest.raises(NibbleError, match=r"process 0 of 1 failed with exit code 1:\n[\s\S]*config.json"):
        distributed.launch(job)
