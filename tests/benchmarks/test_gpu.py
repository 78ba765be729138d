"""benchmarks.gpu: its arguments, processes, tables and both sides on tiny models; nothing here is timed."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_peer, gpu_process, gpu_report, gpu_steps, gpu_timings, gpu_train
from benchmarks.checkpoint import parameters_of
from benchmarks.gpu_cases import ATTENTION, BOTH, GLM, GROUPS, MODELS, OUT_OF_MEMORY, PEER, QWEN3, Case, Group, Request
from benchmarks.gpu_process import Outcome
from benchmarks.peer_env import environment_of, requirements
from benchmarks.report import different_work
from tests.processes import LIMIT

# ---------------------------------------------------------------------------------------------------------- arguments


def test_gpu_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: benchmarks.gpu needs a CUDA device")
    assert "--tiny --device cpu" in error
    assert gpu.main(["--device", "cpu"]) == 2
    assert "add --tiny" in capsys.readouterr().err


def test_gpu_refuses_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu.main(["--device", "cuda:3"]) == 2
    assert "this machine has 1 CUDA devices" in capsys.readouterr().err
    assert gpu.main(["--device", "quantum"]) == 2
    assert "choose cuda or cuda:<number>" in capsys.readouterr().err


def test_the_trial_of_the_kernels_says_how_it_ended(capsys: pytest.CaptureFixture[str]):
    gpu.try_kernels("cpu", LIMIT)
    assert capsys.readouterr().out.startswith("kernels tried, or known from an earlier trial, in ")
    gpu.try_kernels("quantum", LIMIT)
    assert "the trial of the kernels: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "tried"),
    [(["--part", "checks"], True), (["--part", "peer"], False), (["--part", "checks", "--kernels", "torch"], False)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_kernels_are_tried_before_what_uses_them(
    options: list[str], tried: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    happened: list[Any] = []
    for name in ("require_device", "header", "run_groups", "run_checks"):
        monkeypatch.setattr(gpu, name, lambda *given, name=name: happened.append(name) or [])
    monkeypatch.setattr(gpu, "interpreter_of_peer", lambda arguments: tmp_path)
    monkeypatch.setattr(gpu, "try_kernels", lambda device, limit: happened.append((device, limit)))
    gpu.main([*options, "--device", "cuda:0", "--minutes", "5"])
    assert happened[2:] == [("cuda:0", 120.0)] * tried + ["run_groups" if "peer" in options else "run_checks"]


def test_timings_on_the_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    gpu_timings.main("cpu", tiny=True)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = [timing for timing in found if not timing["note"]]
    assert len(found) == 4 and len(figures) == 3
    assert all(timing["forward"] > 0 and timing["backward"] > 0 for timing in figures)
    lines = gpu_report.timing_table([*found, {"name": "other", "note": "RuntimeError: no"}]).splitlines()
    assert len(lines) == 7
    assert lines[-1].split() == ["other", "RuntimeError:", "no"]

    def broken(*given: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(gpu_timings, "measure", broken)
    assert [timing.note for timing in gpu_timings.timings(torch.device("cpu"), tiny=True)] == [
        "RuntimeError: no kernel image"
    ] * 2


def test_command_says_what_passed_and_what_did_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    checks = [
        {"name": "a", "figure": "1 of 2", "passed": True},
        {"name": "b", "figure": "not installed", "passed": None},
    ]
    timed = [{"name": "c", "note": "not installed"}]
    monkeypatch.setattr(gpu, "run_checks", lambda *given: checks)
    monkeypatch.setattr(gpu, "run_timings", lambda *given: timed)
    command = ["--tiny", "--device", "cpu", "--part", "checks", "timings"]
    assert gpu.main(command) == 0
    out = capsys.readouterr().out
    assert "1 of 1 checks passed, 1 could not be tried here\n" in out
    assert "8192" not in out and "operations, tiny sizes, bfloat16" in out
    timed[0]["note"] = "RuntimeError: no"
    assert gpu.main(command) == 1, "a timing failed"
    timed[0]["note"], checks[1]["passed"] = "", False
    timed[0] |= {"forward": 1.0, "backward": 2.0, "peak": 3 << 20}
    capsys.readouterr()
    assert gpu.main(command) == 1, "a check failed"
    out = capsys.readouterr().out
    assert "1 of 2 checks passed\nFAIL  b: not installed" in out
    assert ["c", "1.00", "2.00", "3"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (name, count)
        for name, count in zip(MODELS, (29_943_390_976, 34_660_610_688, 26_123_974_400, 30_532_122_624), strict=True)
    ],
)
def test_models_have_published_sizes(model: str, parameters: int):
    """With all their layers."""
    config = {key: value for key, value in MODELS[model].items() if key != "num_hidden_layers" or model == QWEN3}
    assert parameters_of(config) == parameters


# ---------------------------------------------------------------------------------------------------------- processes


def test_lines_of_a_process_come_with_its_end():
    def run(code: str, limit: float = LIMIT) -> list[tuple[str, str]]:
        return list(gpu_process.lines_of([sys.executable, "-c", code], limit))

    assert run("print('a'); print('b')") == [("line", "a"), ("line", "b"), ("end", "")]
    assert run("raise ValueError('wrong')") == [("end", "ValueError: wrong")]
    oom = "class OutOfMemoryError(Exception): pass\nraise OutOfMemoryError('CUDA out of memory. Tried')"
    assert run(oom) == [("end", OUT_OF_MEMORY)]
    assert run("print('a', flush=True); import time; time.sleep(60)", 2.0)[-1] == ("end", "stopped after 2 s")

    starts = "import subprocess as s, sys; p = s.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    (_, text), end = run(f"{starts}; print(p.pid, flush=True); p.wait()", 2.0)
    assert end == ("end", "stopped after 2 s")
    deadline = time.monotonic() + LIMIT
    while _runs(int(text)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(text)), "nor does what it started go on"


def _runs(process: int) -> bool:
    """Whether there is such a process, other than one that is dead and not yet waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


DIES = """
import json, sys
for case in json.loads(sys.argv[1])["group"]["cases"]:
    if case["rank"] == 1:
        sys.exit("cannot be built")
    print(json.dumps({"built": {}}))
    if case["rank"] == 3:
        raise ValueError("wrong")
    print(json.dumps({"result": {"rank": case["rank"]}, "reason": ""}), flush=True)
"""


def ranks(*given: int) -> Request:
    return Request(Group(GLM, "nf4", 1.0, tuple(Case(BOTH, rank=rank) for rank in given)))


def test_a_case_that_ends_its_process_does_not_hide_the_others():
    command = [sys.executable, "-c", DIES]
    found = gpu_process.run_cases(command, ranks(2, 3, 4, 3), time.monotonic() + LIMIT)
    assert [(outcome.result, outcome.reason) for outcome in found] == [
        ({"rank": 2}, ""), (None, "ValueError: wrong"), ({"rank": 4}, ""), (None, "ValueError: wrong")
    ]  # fmt: skip
    assert [outcome.case.rank for outcome in found] == [2, 3, 4, 3]
    found = gpu_process.run_cases(command, ranks(1, 2), time.monotonic() + LIMIT)
    assert [outcome.reason for outcome in found] == ["cannot be built"] * 2, (
        "of a model that isn't built no case can be"
    )
    (late,) = gpu_process.run_cases(command, ranks(2), time.monotonic() + 1.0)
    assert late.result is None and late.reason.startswith("not run")


def test_what_a_part_leaves_of_its_time_is_there_for_the_next(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(gpu_process.time, "monotonic", lambda: clock[0])
    limits = gpu_process.deadlines(10.0, [1.0, 3.0, 1.0])
    assert next(limits) == 102.0
    clock[0] = 101.0
    assert list(limits) == [108.0, 110.0]


def test_all_groups_fit_into_the_default_time():
    """The shares are seconds of it; those that aren't asked for are divided among the others."""
    shares = [group.seconds for group in (*GROUPS, PEER)] + [gpu.CHECK_SECONDS, gpu.TIMING_SECONDS]
    assert sum(shares) == 60 * gpu.MINUTES <= 8 * 60


def test_a_case_that_runs_out_of_memory_lets_the_next_one_go_on(capsys: pytest.CaptureFixture[str]):
    def measure(case: Case) -> dict[str, Any]:
        if case.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"rank": case.rank}

    gpu_steps.answer([Case(BOTH, rank=1), Case(BOTH, rank=2)], torch.device("cpu"), measure)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first, second) == (
        {"result": None, "reason": OUT_OF_MEMORY}, {"result": {"rank": 2}, "reason": ""}
    )  # fmt: skip


def test_requests_pass_through_json():
    for group in (*GROUPS, PEER):
        request = Request(group, tiny=True, memory_limit=24.0)
        assert Request.loads(request.dumps()) == request


# -------------------------------------------------------------------------------------------------------- both sides


@pytest.fixture(scope="module")
def ours() -> list[dict[str, Any]]:
    """What the process prints for attention and attention + experts."""
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, **options: printed.append(text))
        cases = (Case(ATTENTION, length=64), Case(BOTH, "bfloat16", length=64), Case(BOTH, length=64, graph=True))
        gpu_train.run(tiny(*cases, model=GLM))
    return [json.loads(line) for line in printed]


def tiny(*cases: Case, model: str = GLM, peer: bool = False) -> Request:
    return Request(Group(model, "nf4", 1.0, cases, peer), "cpu", tiny=True, warmup=1, steps=1)


def test_cases_train_on_the_model_that_is_there(ours: list[dict[str, Any]]):
    built, attention, both, replayed = ours
    assert built["built"]["parameters"] == 1_176_192
    for found in (attention["result"], both["result"]):
        assert found["learning"] == found["tensors"], "in the third step A has a gradient too"
        assert found["tokens_per_second"] > 0 and found["update_ms"] > 0
        assert 1.0 <= found["busiest_expert"] < 3.0
    assert attention["result"]["trainable_dtype"] == "float32" and both["result"]["trainable_dtype"] == "bfloat16"
    # LoRA of 7 more stacks of both kinds, and nothing left of the case before.
    assert both["result"]["tensors"] == attention["result"]["tensors"] + 2 * 2 * 3
    assert attention["result"]["losses"][0] == pytest.approx(both["result"]["losses"][0]), "B is zero"
    # By a run's own step, which on a CPU replays nothing.
    assert replayed["result"]["losses"][0] == pytest.approx(both["result"]["losses"][0], rel=1e-3)
    assert "graph" not in replayed["result"]


@pytest.mark.parametrize("group", GROUPS[3:], ids=lambda group: group.name)
def test_the_other_models_train(group: Group, capsys: pytest.CaptureFixture[str]):
    gpu_train.run(tiny(replace(group.cases[0], length=64), model=group.model))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["result"]
    assert found["learning"] == found["tensors"] and 1.0 <= found["busiest_expert"] < 3.0


@pytest.mark.slow
def test_the_peer_is_given_the_same_work(ours: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]):
    """With the versions that are here; those of its environment are tried below."""
    gpu_peer.run(tiny(Case(ATTENTION, length=64), peer=True))
    built, theirs = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert different_work(ours[1]["result"], theirs["result"]) == ""
    assert theirs["result"]["learning"] == theirs["result"]["tensors"]
    # 4-bit and not dense: but for the routers, which the peer keeps in bfloat16, as many bytes as ours.
    assert 0.98 * ours[0]["built"]["weights"] < built["built"]["weights"] < ours[0]["built"]["weights"]


@pytest.mark.slow
def test_the_peer_in_its_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, there = environment_of(gpu.ROOT / ".venv-peer", requirements())
    if not there:
        pytest.skip("python -m benchmarks.gpu --part peer makes it")
    file = tmp_path / "found.json"
    options = ["--tiny", "--device", "cpu", "--length", "64", "--steps", "1", "--json", str(file)]
    assert gpu.main([*options, "--part", "models", "peer", "--only", "GLM-4.7-Flash, nf4"]) == 0
    cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
    learning = [case["result"]["learning"] for case in cases if case["peer"]]
    assert learning == [40, 46, 46, 46, 52], "as users have it, one of two stacks doesn't learn"
    assert "46 of 52" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- tables


def outcome(case: Case, peer: bool = False, **changes: Any) -> Outcome:
    found = {
        "parameters": 10, "tensors": 6, "trainable": 42_000_000, "trainable_dtype": "float32", "learning": 5,
        "weights": 15 << 30, "build_seconds": 4.0, "peak": 18 << 30, "reserved": 19 << 30, "tokens_per_second": 4321.0,
        "seconds": [0.9, 1.0], "update_ms": 29.6, "versions": {"peft": "0.19.1"},
    }  # fmt: skip
    return Outcome(f"{GLM}, nf4{', the peer' if peer else ''}", case, peer, found | changes)


def test_case_table_shows_failures_beside_results():
    case = Case(BOTH, published="34")
    outcomes = [
        outcome(case, busiest_expert=1.4),
        Outcome("int8", case, False, None, OUT_OF_MEMORY),
        Outcome("other", case, False, None, "ImportError: no"),
    ]
    lines = gpu_report.case_table(outcomes).splitlines()
    assert lines[:3] == [
        "weights 15.00 GiB, made in 4 s",
        "attention + experts r32, float32 LoRA, 2 × 2048: out of memory",
        "attention + experts r32, float32 LoRA, 2 × 2048: ImportError: no",
    ]
    expected = ["42.0", "18.00", "19.00", "34", "4,321", "0.90", "to", "1.00", "30", "1.4"]
    assert lines[5].split()[-10:] == expected
    assert "out of memory" in lines[6] and "no result" in lines[7]


def test_the_peer_stands_beside_the_case_that_does_the_same():
    case = Case(BOTH)
    outcomes = [
        outcome(case),
        outcome(replace(case, adapter_dtype="bfloat16"), tokens_per_second=9.0),
        outcome(replace(case, kernels="torch"), tokens_per_second=9.0),
        outcome(replace(case, words=("autocast",)), peer=True, tokens_per_second=432.1, peak=36 << 30),
    ]
    text, unequal = gpu_report.peer_table(outcomes)
    assert text.splitlines()[-1].split()[-9:] == ["4,321", "432", "10.00", "18.00", "36.00", "0.50", "5", "of", "6"]
    assert not unequal
    assert gpu.conclude(outcomes, [], [])
    outcomes[-1].result |= {"trainable": 1}  # type: ignore[operator]
    _, (line,) = gpu_report.peer_table(outcomes)
    assert line.endswith("autocast doesn't do the same work: trainable is 1, here 42000000.")
    assert not gpu.conclude(outcomes, [], [])


def test_only_and_lengths_choose_among_cases():
    def chosen(*argv: str) -> list[Group]:
        return gpu.chosen(GROUPS, gpu.parser().parse_args(argv))

    assert chosen() == list(GROUPS)
    assert [group.model for group in chosen("--only", "Qwen3-30B")] == [QWEN3]
    (first, *_) = chosen("--only", "8192", "--kernels", "torch")
    assert {case.length for case in first.cases} == {8192} and {case.kernels for case in first.cases} == {"torch"}
    (first, *_) = chosen("--length", "512")
    assert {case.length for case in first.cases} == {512} and not any(case.published for case in first.cases)


def test_a_peer_without_an_environment_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.interpreter_of_peer(gpu.parser().parse_args([])) is None
    assert "--part peer makes it by pip, --peer-python takes another" in capsys.readouterr().out
    options = ["--tiny", "--device", "cpu", "--part", "peer", "--peer-python", str(tmp_path)]
    assert gpu.main(options) == 2
    assert "there is no virtual environment" in capsys.readouterr().err
