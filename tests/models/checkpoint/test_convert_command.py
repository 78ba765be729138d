"""python -m models.convert: what it prints, its exit codes, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from models.convert import __main__ as command
from quant.common.progress import Bar
from tests.convert_helpers import contents, run


@pytest.mark.usefixtures("signals_heeded")
def test_ctrl_c_says_how_to_go_on(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"

    def interrupt(bar: object, done: int, total: int, part: str = "") -> None:
        if part == "layer-00001.safetensors" and done > total / 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("quant.common.progress.Bar.update", interrupt)
        assert command.main([str(hub), str(target), "--storage", "fp4", "--single-quant"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    again = f"python -m models.convert {hub} {target} --storage fp4 --single-quant"
    assert err == f"interrupted: 2 of 4 files are finished and kept.\nTo go on: {again}\n"
    assert not list(target.glob("*.partial"))
    assert command.main(again.split()[3:]) == 0
    assert re.search(r"in 4 files, 2 of them from before, \d+\.\d s$", capsys.readouterr().out.strip())


def test_again_says_that_all_is_done(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(hub), str(tmp_path / "out")]
    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal
    assert re.fullmatch(
        rf"{tmp_path}/out: [\d,]+ parameters, 1\.41 MiB → \d+\.\d\d KiB "
        r"\(nf4 with double quantisation, bfloat16\) in 4 files, \d+\.\d s\n",
        out,
    )
    before = contents(tmp_path / "out")
    assert command.main(arguments) == 0
    assert f"{tmp_path}/out: all is done already, 4 files, " in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def test_help_is_quick_and_its_example_is_real() -> None:
    code = (
        "import sys, runpy; sys.argv[1:] = ['--help']\ntry: runpy.run_module('models.convert', run_name='__main__')\n"
    )
    result = run("-c", f"{code}finally: print('torch' in sys.modules, file=sys.stderr)")
    assert result.returncode == 0
    assert (
        "python -m models.convert checkpoints/GLM-4.7-Flash checkpoints/GLM-4.7-Flash-nf4 --storage nf4"
        in result.stdout
    )
    assert result.stderr.strip() == "False"


def test_as_a_command(hub: Path, tmp_path: Path) -> None:
    result = run("-m", "models.convert", hub, tmp_path / "out", "--storage", "int8", "--dtype", "float32", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    data = json.loads(result.stdout)
    assert data["storage"] == "int8, float32"
    assert data["files"] == 4
    assert data["bytes"] == sum(len(value) for value in contents(tmp_path / "out", "*.safetensors").values())


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Bar("converting") as bar:
        bar.update(30, 40, "layer-00001.safetensors")
    assert re.search(r"converting .*75%.*left  layer-00001\.safetensors", terminal.getvalue())
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Bar("loading", show=False) as bar:
        bar.update(30, 40, "layer-00001.safetensors")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "error: SRC and DST are needed (see --help)."),
        (["src"], "error: SRC and DST are needed (see --help)."),
        (
            ["a", "b", "--storage", "int8", "--single-quant"],
            "error: --single-quant is about 4-bit storage; --storage is int8.",
        ),
        (["/nowhere/a", "b"], "error: /nowhere/a doesn't exist."),
    ],
)
def test_wrong_arguments(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
def test_cuda_where_there_is_none(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(hub), str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "error: device 'cuda' is not available: " in capsys.readouterr().err
