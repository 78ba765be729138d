"""The benchmarks' arguments, checks and tables; nothing here is timed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_train, peer_env, report, step
from benchmarks.checkpoint import ensure_checkpoint, parameters_of, tensor_shapes
from benchmarks.gpu_cases import CASES, Case
from benchmarks.measure import batch
from benchmarks.setting import ATTENTION, MODEL, TINY, Request
from models.glm4_moe_lite import Glm4MoeLiteConfig, key_map
from models.load import load_model
from models.lora import AdapterSpec, add_lora
from quant.errors import NibbleError
from quant.storage import StorageSpec

MiB = 1 << 20


def result(**changes: Any) -> report.Result:
    given = {
        "seconds": [1.0, 2.0, 4.0],
        "losses": [9.0, 8.9, 8.8],
        "grad_norms": [0.3, 0.3, 0.3],
        "imports": 400 * MiB,
        "load_peak": 600 * MiB,
        "step_peak": 700 * MiB,
        "load_seconds": 3.0,
        "frozen_bytes": 1000,
        "parameters": 10,
        "trainable": 4,
        "trainable_dtype": "float32",
        "tensors": 2,
        "moved": 2,
        "notes": {},
    }
    return given | changes


# ------------------------------------------------------------------------------------------------------- the setting


def test_model_has_the_size_it_is_said_to_have():
    assert parameters_of(MODEL) == 72_570_624


@pytest.mark.parametrize("config", [MODEL, TINY])
def test_checkpoint_has_the_keys_and_shapes_of_the_architecture(config: dict[str, Any]):
    keys = key_map(Glm4MoeLiteConfig.parse(config, "config.json")).keys
    expected = {name for key in keys for name in key.hub_keys()}
    shapes = dict(tensor_shapes(config))
    assert set(shapes) == expected
    assert all(shapes[key.hub] == key.shape for key in keys if not key.parts)


def test_checkpoint_is_written_once_and_loads(tmp_path: Path):
    folder = ensure_checkpoint(TINY, tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_checkpoint(TINY, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    model = load_model(folder, storage="nf4")
    add_lora(model, AdapterSpec((*ATTENTION, "experts"), 16, 32))
    assert model.spec == StorageSpec("nf4", True)


def test_tokens_differ_in_each_step_and_repeat_in_each_process():
    request = Request("", tokens=32)
    assert torch.equal(batch(request, 100, 3), batch(request, 100, 3))
    assert not torch.equal(batch(request, 100, 3), batch(request, 100, 4))


def test_request_passes_through_json():
    request = Request("folder", dtype="float32", backend="eager+repaired", threads=3)
    assert Request.loads(request.dumps()) == request
    assert all(Case.loads(named.case.dumps()) == named.case for named in CASES)


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("module", ["benchmarks.step", "benchmarks.gpu"])
def test_arguments_are_read_without_torch(module: str):
    code = f"import sys, {module} as m; m.parser().parse_args([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=step.ROOT)


def test_wrong_backend_names_the_right_ones(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        step.parser().parse_args(["--backends", "grouped_mm,triton"])
    assert "'triton': choose grouped_mm or eager, alone or with +autocast or +repaired" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        step.parser().parse_args(["--steps", "0"])
    assert "0 is not a positive whole number" in capsys.readouterr().err
    assert step.parser().parse_args(["--backends", "eager+repaired"]).backends == ["eager+repaired"]


def test_physical_cores_count_hyperthreads_once():
    text = "\n\n".join(f"processor : {p}\nphysical id : {p // 4}\ncore id : {p % 2}" for p in range(8))
    assert step.physical_cores(text, 8) == 4
    assert step.physical_cores(text, 3) == 3
    assert step.physical_cores("", 6) == 6


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


# ------------------------------------------------------------------------------------------- the peer's environment


def test_peer_environment_is_reused_while_its_stamp_is_right(tmp_path: Path):
    wanted = peer_env.requirements()
    assert f"torch=={torch.__version__.partition('+')[0]}" in wanted
    folder = tmp_path / f"bitsandbytes-{peer_env.BITSANDBYTES}"
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    content = {"python": sys.version.split()[0], "requirements": wanted}
    (folder / peer_env.STAMP).write_text(json.dumps(content), encoding="utf-8")
    said: list[str] = []
    assert peer_env.peer_python(tmp_path, wanted, said.append) == python
    assert said == []


def test_peer_environment_that_fails_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "line\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(NibbleError, match=r"(?s)could not be made.*ERROR: no network.*--native-only"):
        peer_env.peer_python(tmp_path, peer_env.requirements(), lambda line: None)


def test_worker_that_fails_shows_its_last_lines():
    with pytest.raises(NibbleError, match=r"(?s)benchmarks.checkpoint failed with exit code 1:.*Error: .*nowhere"):
        step.worker(Path(sys.executable), "benchmarks.checkpoint", Request("/nowhere"))


# ------------------------------------------------------------------------------------------------------------- tables


def test_table_aligns_its_columns():
    assert report.table(["name", "n"], [["a", "1"], ["longer", "22"]]) == (
        "name     n\n------  --\na        1\nlonger  22"
    )


def test_step_table_and_verdict():
    sides = {
        "nibble": [result(), result(seconds=[1.0]), result(seconds=[4.0])],
        "peer grouped_mm": [result(seconds=[8.0], load_peak=2400 * MiB)],
        "peer eager": [result(seconds=[16.0], load_peak=1400 * MiB)],
    }
    lines = report.step_table(sides, 1024).splitlines()
    assert lines[2].split() == ["nibble", "512", "256", "to", "1,024", "300", "200", "300", "3.0"]
    peer = ["peer", "grouped_mm", "128", "128", "to", "128", "4.00", "2,000", "0.15", "2,000", "300", "1.00", "3.0"]
    assert lines[3].split() == peer
    speed, memory = report.verdict(sides, 1024)
    assert speed == "speed   4.00 times peer grouped_mm, the fastest; target 3 times: met"
    assert memory.startswith("memory  0.30 of peer eager's peak") and memory.endswith("target 0.5 at most: met")
    slow = {"nibble": [result()], "peer": [result()]}
    assert all(line.endswith("MISSED") for line in report.verdict(slow, 1024))


def test_sides_that_differ_in_work_are_refused():
    report.check_equal_work(result(), result(losses=[9.001]), "peer", "bfloat16")
    with pytest.raises(NibbleError, match="doesn't do the same work: trainable is 5, here 4"):
        report.check_equal_work(result(), result(trainable=5), "peer", "bfloat16")
    with pytest.raises(NibbleError, match=r"doesn't compute the same: its first loss is 9\.10000, here it is 9\.00000"):
        report.check_equal_work(result(), result(losses=[9.1]), "peer", "bfloat16")
    with pytest.raises(NibbleError, match="first loss is nan"):
        report.check_equal_work(result(), result(losses=[math.nan]), "peer", "float32")
    with pytest.raises(NibbleError, match="only 1 of 2 trained tensors changed"):
        report.check_equal_work(result(moved=1), result(), "peer", "float32")


def test_conclusions_tell_of_adapters_that_do_not_learn():
    peer = result(moved=1, notes={"unmoved": ["down_proj"]})
    lines = step.conclusions({"nibble": [result()], "peer eager": [peer]}, "bfloat16", 1024)
    assert "1 of 2 trained tensors changed" in lines[1]
    assert "without effect and gradient" in lines[2]
    assert "target 3 times: MISSED" in lines[3]


def test_profile_text_shows_shares():
    found = {
        "phases": {"forward": 30.0, "backward": 70.0},
        "parts": {"attention": {"forward": 10.0, "backward": 20.0, "step": 40.0}},
        "operations": {"products": 75.0, "other": 25.0},
    }
    text = report.profile_text(found)
    assert "forward   30   30 %" in text
    assert "40 %" in text
    assert "products   75   75 %" in text


def test_case_table_shows_failures_beside_results():
    found = {
        "trainable": 42_000_000,
        "weights": 15 * gpu.GiB,
        "peak": 18 * gpu.GiB,
        "reserved": 19 * gpu.GiB,
        "tokens_per_second": 4321.0,
        "seconds": [0.9, 1.0],
        "busiest_expert": 1.4,
    }
    outcomes = [
        gpu.Outcome("nf4", "24", found),
        gpu.Outcome("int8", "35", None, gpu.OUT_OF_MEMORY),
        gpu.Outcome("other", "35", None, "ImportError: no"),
    ]
    lines = gpu.case_table(outcomes).splitlines()
    expected = ["nf4", "42.0", "15.00", "18.00", "19.00", "24", "4,321", "0.90", "to", "1.00", "1.4"]
    assert lines[2].split() == expected
    assert "out of memory" in lines[3]
    assert "no result" in lines[4]


# ------------------------------------------------------------------------------------------------- processes and checks


def test_lines_of_a_process_come_with_its_end():
    def run(code: str, limit: float = 30.0) -> list[tuple[str, str]]:
        return list(gpu.lines_of([sys.executable, "-c", code], limit))

    assert run("print('a'); print('b')") == [("line", "a"), ("line", "b"), ("end", "")]
    assert run("raise ValueError('wrong')") == [("end", "ValueError: wrong")]
    oom = "class OutOfMemoryError(Exception): pass\nraise OutOfMemoryError('CUDA out of memory. Tried')"
    assert run(oom) == [("end", gpu.OUT_OF_MEMORY)]
    assert run("print('a', flush=True); import time; time.sleep(60)", 2.0)[-1] == ("end", "stopped after 2 s")


def test_compare_fails_on_wrong_and_on_nan():
    right = torch.ones(4)
    assert gpu_checks._compare("x", [(right * (1 + 1e-6), right)], 1e-5).passed
    assert not gpu_checks._compare("x", [(right * 1.1, right)], 1e-5).passed
    assert not gpu_checks._compare("x", [(right * math.nan, right), (right, right)], 1e-5).passed
    assert not gpu_checks._compare_norm("x", [(right * math.nan, right)], 1e-5).passed


def test_a_check_that_raises_is_a_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def broken(device: torch.device) -> Any:
        raise RuntimeError("no kernel image\nis available")

    for name in ("_storages", "_experts", "_attention", "_model", "_optimisers"):
        monkeypatch.setattr(gpu_checks, name, broken)
    found = list(gpu_checks.checks(torch.device("cpu")))
    assert [check.passed for check in found].count(False) == 5
    assert found[0].figure == "RuntimeError: no kernel image"
    assert [check.passed for check in found if check.name.startswith("loss")] == [True, True]
    assert gpu.check_line({"name": "loss", "figure": "0 of 1", "passed": None}) == "skip  loss: 0 of 1"


@pytest.mark.parametrize("named", [CASES[3], CASES[4]], ids=lambda named: named.name)
def test_random_model_trains_and_spreads_its_tokens(named: Any):
    case = Case(named.case.storage, named.case.targets, named.case.adapter_dtype, length=64, warmup=1, steps=1,
                device="cpu", tiny=True)  # fmt: skip
    found = gpu_train.measure(case)
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert found["tokens_per_second"] > 0
    assert 1.0 <= found["busiest_expert"] < 3.0
