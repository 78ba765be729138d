"""The benchmarks' arguments, checks and tables; nothing here is timed."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    gpu,
    gpu_checks,
    gpu_checks_models,
    gpu_checks_sequence,
    gpu_compare,
    gpu_timings,
    gpu_train,
    peer_env,
    report,
    step,
)
from benchmarks.checkpoint import ensure_checkpoint, parameters_of
from benchmarks.gpu_cases import CASES, MODELS, Case
from benchmarks.measure import batch
from benchmarks.setting import DEFAULT, EXPERTS, SETTINGS, Request
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.attention.indexer import Indexer
from models.blocks.balance import AuxiliaryLoss, BiasUpdate
from models.blocks.documents import Documents
from models.blocks.router import Router
from models.decoder import CausalLM
from models.load import load_model
from models.registry import ARCHITECTURES
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import relative_error
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
def test_checkpoint_is_written_once_and_loads(arch: str, tmp_path: Path):
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


# ------------------------------------------------------------------------------------- a device's checks, on the CPU

CPU = torch.device("cpu")


def test_compare_fails_on_wrong_and_on_nan():
    right = torch.ones(4)
    assert gpu_compare.compare("x", [(right * (1 + 1e-6), right)], 1e-5).passed
    assert not gpu_compare.compare("x", [(right * 1.1, right)], 1e-5).passed
    assert not gpu_compare.compare("x", [(right * math.nan, right), (right, right)], 1e-5).passed
    assert not gpu_compare.compare_norm("x", [(right * math.nan, right)], 1e-5).passed
    # A small tensor that is wrong beside a large one that is right.
    pairs = [(1e4 * right, 1e4 * right), (right * 1.1, right)]
    assert gpu_compare.compare_norm("x", pairs, 1e-2).passed
    assert not gpu_compare.compare_each_norm("x", pairs, 1e-2).passed
    assert not gpu_compare.compare_each_norm("x", [(right * math.nan, right), (right, right)], 1e-2).passed


def test_a_check_that_raises_is_a_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def broken(device: torch.device) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(gpu_checks, "groups", lambda: [("first", broken), ("loss", gpu_checks.loss_in_chunks)])
    found = list(gpu_checks.checks(CPU))
    assert [(check.name, check.passed) for check in found[:1]] == [("first", False)]
    assert found[0].figure == "RuntimeError: no kernel image"
    assert [check.passed for check in found[1:]] == [True, True]
    assert gpu.check_line({"name": "loss", "figure": "0 of 1", "passed": None}) == "skip  loss: 0 of 1"


def test_every_architecture_and_storage_is_checked():
    names = {name for name, _ in gpu_checks.groups()}
    known = {model_type for model_type in ARCHITECTURES if model_type != "qwen3_5_moe"}  # computes as its text model
    assert set(gpu_checks_models.TINY) == known
    assert {f"{model_type}, {kind}" for model_type in known for kind in ("none", "nf4", "int8", "documents")} <= names


def passes(found: Any) -> bool:
    checks = list(found)
    assert checks and all(check.passed is not None for check in checks)
    return all(check.passed for check in checks)


@pytest.mark.parametrize(
    "group",
    [*gpu_checks.groups()[2:4], *gpu_checks_sequence.groups(), gpu_checks.groups()[-1]],
    ids=lambda group: group[0],
)
def test_checks_of_blocks_pass_on_the_cpu(group: gpu_compare.Group):
    found = list(group[1](CPU))
    assert all(check.passed is not False for check in found), found
    skipped = [check.name for check in found if check.passed is None]
    assert bool(skipped) == (group[0] == "flash-linear-attention"), "only that one needs CUDA"


def test_checks_of_blocks_notice_documents_that_are_mixed_up(monkeypatch: pytest.MonkeyPatch):
    def merged(lengths: Any, device: Any = "cpu", padding: int = 0) -> Documents:
        return from_lengths([sum(lengths)], device, padding)

    from_lengths = Documents.from_lengths
    monkeypatch.setattr(Documents, "from_lengths", staticmethod(merged))
    for check in (gpu_checks_sequence.attention, gpu_checks_sequence.window_attention, gpu_checks_sequence.convolution):
        assert not any(found.passed for found in check(CPU) if "1000" not in found.name)


def test_checks_of_blocks_notice_what_is_left_out(monkeypatch: pytest.MonkeyPatch):
    sequence = gpu_checks_sequence
    attend, select, rule = sequence.causal_attention, sequence.selected_attention, sequence.chunked_gated_delta_rule
    monkeypatch.setattr(
        sequence, "causal_attention", lambda q, k, v, documents, scale, window: attend(q, k, v, documents, scale)
    )
    found = [check.passed for check in sequence.window_attention(CPU)]
    assert found == [False, False, False, False, True, True], "the last window is longer than any document"

    def one_less(q: Any, k: Any, v: Any, parts: Any, selected: torch.Tensor, scale: float) -> torch.Tensor:
        return select(q, k, v, parts, selected[:, 1:], scale)

    monkeypatch.setattr(sequence, "selected_attention", one_less)
    assert not any(check.passed for check in sequence.attention_to_selected(CPU))
    monkeypatch.setattr(
        sequence,
        "chunked_gated_delta_rule",
        lambda q, k, v, decay, beta, documents: rule(q, k, v, decay * 1.1, beta, documents),
    )
    assert not any(check.passed for check in sequence.delta_rule(CPU))


WHOLE = dict(zip(gpu_checks_models.TINY, ("none", "nf4", "none", "int8", "nf4", "int8"), strict=True))


@pytest.mark.parametrize("model_type", WHOLE)
def test_checks_of_models_pass_on_the_cpu_and_can_fail(model_type: str, monkeypatch: pytest.MonkeyPatch):
    spec = next(spec for spec in gpu_checks_models.SPECS if spec.kind == WHOLE[model_type])
    assert passes(gpu_checks_models.whole_model(model_type, spec, CPU))

    def other(model: CausalLM) -> CausalLM:
        copied = copy.deepcopy(model)
        trainable_parameters(copied)[1][1].data.mul_(1.02)
        return copied

    monkeypatch.setattr(gpu_checks_models, "copy", types.SimpleNamespace(deepcopy=other))
    found = [check.passed for check in gpu_checks_models.whole_model(model_type, spec, CPU)]
    assert found[1] is False and all(found[-2:]), "only the copy in float32 is another one"


@pytest.mark.parametrize("model_type", gpu_checks_models.TINY)
def test_checks_of_models_do_not_hang_on_rounding(model_type: str):
    """A device that rounds otherwise makes the same choices of experts and keys, and gradients within the tolerance."""
    model = gpu_checks_models.tiny_model(model_type, gpu_checks_models.NF4, torch.float32, CPU)
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, given, out: chosen.append(out[0].sort(-1).values))
        elif isinstance(module, Indexer):
            module.register_forward_hook(lambda module, given, out: chosen.append(out.sort(-1).values))
    found = []
    for _ in range(2):
        chosen.clear()
        model.zero_grad()
        loss = gpu_checks_models.batch_loss(model, CPU)
        loss.backward()
        found.append((loss.item(), [x.clone() for x in gpu_checks_models.gradients(model)], list(chosen)))
        weight = model.model.embed_tokens.weight.data
        weight.mul_(1 + 1e-6 * gpu_compare.random(tuple(weight.shape), 0))
    (loss_a, gradients_a, chosen_a), (loss_b, gradients_b, chosen_b) = found
    assert len(chosen_a) >= 2 and all(map(torch.equal, chosen_a, chosen_b))
    assert abs(loss_a - loss_b) < 2e-6 * loss_a
    worst = max(map(relative_error, gradients_b, gradients_a))
    assert 0 < worst < 3e-5, "the tolerance is 1e-4"


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "glm_moe_dsa"])
def test_checks_of_documents_pass_on_the_cpu_and_can_fail(model_type: str, monkeypatch: pytest.MonkeyPatch):
    assert passes(gpu_checks_models.packed_documents(model_type, CPU))
    from_lengths = Documents.from_lengths
    monkeypatch.setattr(
        Documents,
        "from_lengths",
        staticmethod(lambda lengths, device="cpu", padding=0: from_lengths([sum(lengths)], device, padding)),
    )
    assert not any(check.passed for check in gpu_checks_models.packed_documents(model_type, CPU))


@pytest.mark.parametrize(("model_type", "method"), [("glm4_moe_lite", BiasUpdate), ("qwen3_5_moe_text", AuxiliaryLoss)])
def test_checks_of_balance_pass_on_the_cpu_and_can_fail(model_type: str, method: Any, monkeypatch: pytest.MonkeyPatch):
    balanced = gpu_checks_models._balanced
    expected = balanced(model_type, method, CPU)
    real = sum(gpu_checks_models.PADDED) - gpu_checks_models.PADDING
    assert expected[0].sum(-1).unique().tolist() == [2 * 3 * real], "two micro-batches, three experts a token"
    assert len(expected[2]) > len(expected[0]), "every router has gradients"

    answers = [expected, expected]
    monkeypatch.setattr(gpu_checks_models, "_balanced", lambda *given: answers.pop())
    assert passes(gpu_checks_models.balance(model_type, method, CPU))
    wrong = (expected[0] + 1, [x * 1.1 for x in expected[1]], [x * 1.1 for x in expected[2]])
    answers = [wrong, expected]
    assert not any(check.passed for check in gpu_checks_models.balance(model_type, method, CPU))


def test_timings_on_the_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    gpu_timings.main("cpu", tiny=True)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    figures = [timing for timing in found if not timing["note"]]
    assert len(found) == 4 and len(figures) == 3
    assert all(timing["forward"] > 0 and timing["backward"] > 0 for timing in figures)
    lines = gpu.timing_table([*found, {"name": "other", "note": "RuntimeError: no"}]).splitlines()
    assert len(lines) == 7
    assert lines[-1].split() == ["other", "RuntimeError:", "no"]

    def broken(*given: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(gpu_timings, "measure", broken)
    assert [timing.note for timing in gpu_timings.timings(CPU, tiny=True)] == ["RuntimeError: no kernel image"] * 2


def test_flash_linear_attention_that_is_missing_is_not_passed(monkeypatch: pytest.MonkeyPatch):
    find = gpu_compare.importlib.util.find_spec
    for there, reason in ((None, "not installed"), (object(), "needs CUDA")):
        monkeypatch.setattr(
            gpu_compare.importlib.util, "find_spec", lambda name, there=there: there if name == "fla" else find(name)
        )
        assert gpu_compare.without_flash_linear_attention(CPU) == reason
        (check,) = gpu_checks_sequence.flash_linear_attention(CPU)
        assert (check.figure, check.passed) == (f"flash-linear-attention: {reason}", None)
    monkeypatch.setitem(sys.modules, "fla", None)  # there, but can't be imported
    with pytest.raises(ImportError):
        gpu_compare.without_flash_linear_attention(torch.device("cuda"))


def test_command_says_what_passed_and_what_did_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    checks = [
        {"name": "a", "figure": "1 of 2", "passed": True},
        {"name": "b", "figure": "not installed", "passed": None},
    ]
    timed = [{"name": "c", "note": "not installed"}]
    monkeypatch.setattr(gpu, "run_checks", lambda *given: checks)
    monkeypatch.setattr(gpu, "run_timings", lambda *given: timed)
    monkeypatch.setattr(gpu, "CASES", ())
    command = ["--tiny", "--device", "cpu"]
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


@pytest.mark.parametrize("named", [CASES[1], CASES[2], CASES[3], CASES[4]], ids=lambda named: named.name)
def test_random_model_trains_and_spreads_its_tokens(named: Any):
    found = gpu_train.measure(replace(named.case, length=64, warmup=1, steps=1, device="cpu", tiny=True))
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert found["tokens_per_second"] > 0
    assert 1.0 <= found["busiest_expert"] < 3.0


@pytest.mark.parametrize(
    ("model", "parameters"),
    [(name, count) for name, count in zip(MODELS, (29_943_390_976, 34_660_610_688, 26_123_974_400), strict=True)],
)
def test_models_have_published_sizes(model: str, parameters: int):
    """With all their layers."""
    config = {key: value for key, value in MODELS[model].items() if key != "num_hidden_layers"}
    assert parameters_of(config) == parameters
