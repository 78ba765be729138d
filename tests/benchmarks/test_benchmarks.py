"""The benchmarks' arguments, checks and tables; nothing here is timed."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    checkpoint,
    generate,
    peer_env,
    report,
    step,
    usage,
)
from benchmarks.checkpoint import ensure_checkpoint, parameters_of
from benchmarks.measure import batch
from benchmarks.setting import DEFAULT, EXPERTS, SETTINGS, Request
from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.load import load_model
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from train.output.parameter_table import parameter_table

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


def test_default_model_has_the_size_it_is_said_to_have():
    assert parameters_of(SETTINGS[DEFAULT].config) == 72_570_624


@pytest.mark.parametrize("arch", SETTINGS)
def test_settings_have_as_many_parameters_as_in_transformers(arch: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    for tiny in (False, True):
        config = SETTINGS[arch].sized(tiny)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
        assert parameters_of(config) == model.num_parameters()


@pytest.mark.parametrize("arch", SETTINGS)
def test_checkpoint_is_written_once_and_loads(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if arch != DEFAULT:  # a process of its own is seconds of imports: one of them will do
        monkeypatch.setattr(checkpoint.subprocess, "run", lambda command, check: checkpoint.write(Path(command[-1])))
    setting = SETTINGS[arch]
    config = setting.sized(True)
    folder = ensure_checkpoint(config, tmp_path)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert ensure_checkpoint(config, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    model = load_model(folder, storage="nf4")
    assert parameter_table(model)[-1].parameters == parameters_of(config)
    add_lora(model, AdapterSpec((*setting.attention, *EXPERTS), 16, 32))
    assert model.spec == StorageSpec("nf4", True)


def test_counting_is_a_part_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(checkpoint.subprocess, "run", lambda command, check: checkpoint.write(Path(command[-1])))
    assert usage.main(["--tiny", "--tokens", "32", "--pairs", "1", "--folder", str(tmp_path)]) == 0
    found = re.search(r"with, of which counting is ([\d.]+) ms, ([\d.]+)%\n$", capsys.readouterr().out)
    assert found is not None and float(found[1]) > 0 and float(found[2]) < 50


def test_tokens_differ_in_each_step_and_repeat_in_each_process():
    request = Request("", tokens=32)
    assert torch.equal(batch(request, 100, 3), batch(request, 100, 3))
    assert not torch.equal(batch(request, 100, 3), batch(request, 100, 4))


def test_request_passes_through_json():
    request = Request("folder", dtype="float32", backend="eager+repaired", threads=3)
    assert Request.loads(request.dumps()) == request


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("module", ["benchmarks.step", "benchmarks.gpu", "benchmarks.usage"])
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


# ------------------------------------------------------------------------------------------------- processes and checks


def test_peer_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def worker(python: Path, module: str, request: Request) -> report.Result:
        assert request.arch == "afmoe"
        if request.backend == "eager":
            raise NibbleError("benchmarks.step_peer failed with exit code 1:\nTraceback\nValueError: no such model")
        return result()

    monkeypatch.setattr(step, "worker", worker)
    monkeypatch.setattr(step, "peer_python", lambda *given: Path(sys.executable))
    monkeypatch.setattr(step, "ensure_checkpoint", lambda config, work: tmp_path)
    assert step.main(["--arch", "afmoe", "--tiny", "--repetitions", "2", "--threads", "1"]) == 1
    out = capsys.readouterr().out
    reason = "nothing is compared with it: ValueError: no such model"
    assert f"peer eager can't train afmoe in this setting, so {reason}" in out
    assert "peer grouped_mm: first loss 9.0000" in out

    monkeypatch.setattr(step, "worker", lambda *given: worker(Path(), "", Request("", arch="afmoe", backend="eager")))
    assert step.main(["--arch", "afmoe", "--tiny", "--native-only"]) == 2, "without the native side there is nothing"
    assert "ValueError: no such model" in capsys.readouterr().err


def test_profile_of_another_architecture_is_refused(capsys: pytest.CaptureFixture[str]):
    assert step.main(["--arch", "afmoe", "--profile"]) == 2
    assert "--profile knows the parts of glm4_moe_lite only" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- generation


def test_generation_is_measured_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """All sides in this process; the checkpoint too."""
    monkeypatch.setattr(checkpoint.subprocess, "run", lambda command, check: checkpoint.write(Path(command[-1])))

    def here(side: str, arguments: Any, folder: Path) -> Any:
        arguments.folder = folder
        return generate.measure_here(side, arguments)

    monkeypatch.setattr(generate, "worker", here)
    options = ["--tiny", "--prompt", "24", "--new", "3", "--batch", "2", "--repetitions", "1", "--threads", "1"]
    assert generate.main([*options, "--work", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[-3:]] == ["nibble none", "nibble nf4", "transformers"]
    with pytest.raises(NibbleError, match="do not generate the same tokens"):
        generate.check_equal_tokens({"tokens": [[1]]}, {"tokens": [[2]]})
