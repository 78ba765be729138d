"""What export refuses: by name, before anything is written, with the ways out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.export.__main__ import main
from quant.common.errors import NibbleError
from tests.export_helpers import World
from tests.peft_helpers import config_of


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("latent"), "glm4_moe_lite")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("qwen"), "qwen3_5_moe_text")


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.removeprefix("error: ").replace("\n       ", "\n").removesuffix("\n")


def test_matrices_that_vllm_computes_without(latent: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert error_of([str(latent.adapter), str(out), "--for", "vllm"], capsys) == (
        f"vLLM computes without LoRA on kv_b_proj, which {latent.adapter} has in 2 layers: its latent attention "
        "multiplies that matrix into others when it loads the model.\n"
        "Ways out: start vLLM with VLLM_MLA_DISABLE=1 and export with --keep kv_b_proj; or merge "
        f"(python -m models.merge {latent.base} {latent.adapter} OUT); or leave it out with --drop kv_b_proj, and see "
        "what that costs with python -m train.evaluate."
    )
    assert not out.exists()
    assert main([str(latent.adapter), str(out), "--for", "vllm", "--drop", "kv_b_proj"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "left out  kv_b_proj: 2 of the adapter's matrices"
    assert "kv_b_proj" not in config_of(out)["target_modules"]


def test_matrices_that_llama_cpp_computes_without_or_cannot_convert(
    latent: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(latent.adapter), str(tmp_path / "out"), "--for", "llamacpp"]
    drop = "--drop q_a_proj --drop q_b_proj --drop kv_a_proj_with_mqa --drop kv_b_proj"
    assert error_of(arguments, capsys) == (
        f"llama.cpp computes without LoRA on q_a_proj, q_b_proj, kv_a_proj_with_mqa, which {latent.adapter} has in 2 "
        "layers: its latent attention never applies it.\n"
        f"llama.cpp can't convert LoRA on kv_b_proj, which {latent.adapter} has in 2 layers: it cuts that matrix in "
        "two and turns one half over.\n"
        f"Ways out: merge (python -m models.merge {latent.base} {latent.adapter} OUT); or leave them out with {drop}, "
        "and see what that costs with python -m train.evaluate."
    )
    assert error_of([*arguments, *drop.split()[:6]], capsys).startswith("llama.cpp can't convert LoRA on kv_b_proj, ")
    assert main([*arguments, *drop.split()]) == 0


def test_qwens_gates(qwen: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(qwen.adapter), str(tmp_path / "out"), "--for", "vllm"]
    message = error_of(arguments, capsys)
    assert message.startswith("vLLM computes without LoRA on mlp.gate, which ")
    assert "\nvLLM computes without LoRA on shared_expert_gate, which " in message
    drop = "--drop mlp.gate --drop shared_expert_gate"
    assert f"leave them out with {drop}, and see" in message
    assert main([*arguments, *drop.split()]) == 0


def test_names_that_are_not_there(latent: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(latent.adapter), str(tmp_path / "out"), "--for", "vllm"]
    for option in ("--drop", "--keep"):
        message = error_of([*arguments, option, "q_proj"], capsys)
        assert message.startswith(f"{option} q_proj: the adapter has no such matrix. It has self_attn.q_a_proj, ")
    everything = ("attention", "experts", "shared_experts", "dense_mlp", "router")
    message = error_of([*arguments, *(part for name in everything for part in ("--drop", name))], capsys)
    assert message == f"--drop {' --drop '.join(everything)} leaves nothing of the adapter."


def test_where_the_base_is_not_here(latent: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(latent.adapter, adapter)
    config = config_of(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nobody/nothing"}))
    advice = (
        "Of the base only config.json is needed: give its folder with --model "
        "(hf download ID config.json --local-dir FOLDER fetches it)."
    )
    where = adapter / "adapter_config.json"
    assert error_of([str(adapter), str(out), "--for", "peft"], capsys) == (
        f"{where} names the base model 'nobody/nothing', which is not on this machine.\n{advice}"
    )
    arguments = [str(adapter), str(out), "--for", "peft", "--model"]
    assert error_of([*arguments, "some/other"], capsys) == f"--model some/other is not on this machine.\n{advice}"
    (tmp_path / "base").mkdir()
    shutil.copy(latent.base / "config.json", tmp_path / "base")  # the weights aren't needed
    assert main([*arguments, str(tmp_path / "base")]) == 0
    assert config_of(out)["base_model_name_or_path"] == "nobody/nothing"
    capsys.readouterr()
    assert error_of([*arguments, str(tmp_path / "base")], capsys) == (
        f"{out} holds adapter_config.json already. Name a folder that is empty or isn't there."
    )
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    shutil.rmtree(out)
    assert error_of([str(adapter), str(out), "--for", "peft"], capsys) == (
        f"{adapter / 'adapter_config.json'} doesn't name the base model.\n{advice}"
    )


def test_verify_where_nothing_can_be_compared(
    latent: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = [str(latent.adapter), str(out), "--for", "vllm", "--verify"]
    assert error_of([*arguments, "--drop", "kv_b_proj"], capsys) == (
        f"--verify with --drop: without kv_b_proj the result computes something else than {latent.adapter}.\n"
        "Leave --verify out, and compare the losses of both with python -m train.evaluate."
    )
    (tmp_path / "base").mkdir()
    shutil.copy(latent.base / "config.json", tmp_path / "base")
    model = ["--model", str(tmp_path / "base")]
    assert str(tmp_path / "base") in error_of([*arguments, *model], capsys), "there are no weights"
    (tmp_path / "base" / "nibble.json").touch()
    assert error_of([*arguments, *model], capsys) == (
        f"--verify: {tmp_path / 'base'} is a converted checkpoint, which transformers can't load.\n"
        "Name the hub's with --model, or leave --verify out."
    )
    assert not out.exists()

    def broken(*_: object, **__: object) -> None:
        raise ValueError("torchao is\ntoo old")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", broken)
        message = error_of([*arguments, "--keep", "kv_b_proj", "--json"], capsys)
    assert message.startswith(
        f"{out} is written, but not verified, as transformers or PEFT failed: ValueError: torchao"
    )
    monkeypatch.setattr("models.export.verify.find_spec", lambda name: None)
    assert error_of(arguments, capsys) == (
        "--verify loads the result with transformers and PEFT, and transformers and peft isn't installed here.\n"
        "pip install transformers peft, or leave --verify out."
    )


def test_matrices_that_two_options_mean_are_counted_once(
    latent: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drop = ["--drop", "kv_b_proj", "--drop", "attention", "--drop", "o_proj"]
    assert main([str(latent.adapter), str(tmp_path / "out"), "--for", "vllm", *drop, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {"kv_b_proj": 2, "attention": 8}


def test_names_of_a_class_that_there_is_not(latent: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for names in ("text", "vision-language"):
        assert error_of([str(latent.adapter), str(tmp_path / "out"), "--for", "peft", "--names", names], capsys) == (
            f"--names {names}: glm4_moe_lite has one class, with names of its own. Leave it out."
        )


def test_a_folder_that_holds_something(latent: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in latent.base.iterdir())
    assert error_of([str(latent.adapter), str(latent.base), "--for", "peft"], capsys) == (
        f"{latent.base} holds {before[0]} already. Name a folder that is empty or isn't there."
    )
    assert sorted(path.name for path in latent.base.iterdir()) == before
    file = latent.base / "config.json"
    assert f"{file} is a file." in error_of([str(latent.adapter), str(file), "--for", "peft"], capsys)
    (tmp_path / "empty").mkdir()
    assert main([str(latent.adapter), str(tmp_path / "empty"), "--for", "peft"]) == 0


def test_an_export_that_ends_early_starts_again(
    latent: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the weights and the configuration: by Ctrl-C, a full disk, and a kill, which leaves what there was."""
    out, partial = tmp_path / "new" / "out", tmp_path / "new" / "out.partial"
    arguments = [str(latent.adapter), str(out), "--for", "peft"]
    for error, code in ((KeyboardInterrupt(), 130), (NibbleError("the disk is full"), 2)):

        def fail(path: Path, data: bytes, error: BaseException = error) -> None:
            assert (path.parent / "adapter_model.safetensors").exists()
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("models.adapters.files.write_atomically", fail)
            assert main(arguments) == code
        assert not out.exists() and not partial.exists()
    partial.mkdir()
    (partial / "adapter_model.safetensors.partial").write_bytes(b"half")
    (partial / "adapter_config.json").write_bytes(b"{}")
    (partial / "mine").touch()
    capsys.readouterr()
    assert error_of(arguments, capsys) == (f"{partial} holds mine, and isn't an unfinished adapter. Move it away.")
    (partial / "mine").unlink()
    assert main(arguments) == 0
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not partial.exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['x', '--help']\ntry:\n"
        "    runpy.run_module('models.export', run_name='__main__')\n"
        "except SystemExit:\n    pass\nprint('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.endswith("False\n") and "llamacpp" in done.stdout
