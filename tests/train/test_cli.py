"""`python -m train` as a shell sees it: exit codes, streams, and nothing heavy imported before the config is right."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from parallel.world import World
from quant.common.errors import NibbleError
from tests.processes import LIMIT, run_commands
from train.__main__ import EXAMPLE, main
from train.config.load import Config, config_schema, load_config, parse_config
from train.config.schema import keys

ROOT = Path(__file__).parents[2]
QLORA = "configs/glm47_qlora.yaml"


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)


def stand_in(monkeypatch: pytest.MonkeyPatch, outcome: int | BaseException) -> list[tuple[Config, Path | None]]:
    """Put a run in place that returns or raises `outcome`; returns the list of the calls to it."""
    calls: list[tuple[Config, Path | None]] = []

    def run(config: Config, *, config_path: Path | None, world: World, restart: bool, extend_to: int | None) -> int:
        assert world == World() and not restart and extend_to is None
        calls.append((config, config_path))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    module = ModuleType("train.run")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "train.run", module)
    return calls


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    path = tmp_path / "my.yaml"
    path.write_text(
        f"model: {{path: nobody/x}}\ndata: {{train: {tmp_path}/rows.jsonl}}\noutput: {{dir: {tmp_path}/out}}\n"
    )
    return path


def test_help_names_every_key_and_an_example() -> None:
    done = run_cli("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert EXAMPLE in done.stdout
    for key in keys(config_schema()):
        assert f"  {key}  (" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_the_example_of_the_help_works() -> None:
    python, dash_m, module, *arguments = shlex.split(EXAMPLE)
    assert (python, dash_m, module) == ("python", "-m", "train")
    done = run_cli(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert parse_config(done.stdout) == load_config(ROOT / QLORA, ["train.max_steps=3"])


def test_print_schema() -> None:
    done = run_cli("--print-schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == config_schema()


@pytest.mark.parametrize("arguments", [["--print-schema"], ["--help"], ["--config", "nowhere.yaml"]], ids=str)
def test_a_reader_that_has_gone_away_is_no_error(arguments: list[str]) -> None:
    """`| head`, which closes the pipe when it has seen enough."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "train", *arguments]
    failing = arguments[0] == "--config"
    streams = (
        {"stdout": subprocess.PIPE, "stderr": writing} if failing else {"stdout": writing, "stderr": subprocess.PIPE}
    )
    done = subprocess.run(command, cwd=ROOT, text=True, timeout=LIMIT, check=False, **streams)  # type: ignore[call-overload]
    os.close(writing)
    assert (done.returncode, done.stdout or "", done.stderr or "") == (2 if failing else 0, "", "")


def test_config_error_is_one_line_and_exit_2(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: {path: x}\ndata: {train: x}\noutput: {dir: x}\ntrain:\n  learning_rat: 1\n")
    done = run_cli("--config", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"error: {path}:5: unknown key 'train.learning_rat'. Did you mean 'train.learning_rate'?\n")


def test_further_errors_are_indented_under_the_first(capsys: pytest.CaptureFixture[str], config_path: Path) -> None:
    assert main(["--config", str(config_path), "--set", "train.max_stpes=3", "--set", "train.seed=x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: --set train.max_stpes=3: unknown key 'train.max_stpes'. Did you mean 'train.max_steps'?",
        "       --set train.seed=x: train.seed: got the text 'x', wanted an integer ≥ 0",
    ]


def test_config_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "error: --config FILE is required, e.g. --config configs/glm47_qlora.yaml" in capsys.readouterr().err


def test_config_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--config", "configs/glm47_qlor.yaml"]) == 2
    expected = "error: configs/glm47_qlor.yaml: no such file. Did you mean configs/glm47_qlora.yaml?\n"
    assert capsys.readouterr().err == expected


def test_check(capsys: pytest.CaptureFixture[str], config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, 0)
    assert main(["--config", str(config_path), "--check"]) == 0
    assert capsys.readouterr().out.startswith(f"{config_path}: ok\n  checked      the keys of the config, and that")
    assert main(["--config", str(config_path), "--check", "--set", "data.train=nowhere.jsonl"]) == 2
    assert "error: data.train: nowhere.jsonl: no such file." in capsys.readouterr().err
    assert calls == []


def test_missing_data_stops_before_the_run(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, 0)
    assert main(["--config", str(config_path), "--set", "data.train=nowhere.jsonl"]) == 2
    assert calls == []


def test_the_run_gets_the_config(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, 0)
    assert main(["--config", str(config_path), "--set", "train.max_steps=3"]) == 0
    assert calls == [(load_config(config_path, ["train.max_steps=3"]), config_path)]


def test_errors_of_the_run(
    capsys: pytest.CaptureFixture[str], config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, NibbleError("x: shard is missing\nFetch it again\n       and again"))
    assert main(["--config", str(config_path)]) == 2
    assert capsys.readouterr().err == "error: x: shard is missing\n       Fetch it again\n       and again\n"
    stand_in(monkeypatch, KeyboardInterrupt())
    assert main(["--config", str(config_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    stand_in(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main(["--config", str(config_path)])


def test_options_that_exclude_each_other_and_unknown_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--config", QLORA, "--check", "--print-config"], ["--conf", QLORA], ["--config", QLORA, "--x"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--print-schema"], ["--config", QLORA, "--print-config"], ["--config", QLORA, "--set", "a=1"]],
    ids=["help", "schema", "print-config", "config error"],
)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_module('train', run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'torch', 'numpy', 'bitsandbytes', 'peft', 'transformers', 'tokenizers', 'matplotlib', 'pyarrow'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.stderr.splitlines()[-1] == "HEAVY []"


def test_of_several_processes_one_answers(config_path: Path) -> None:
    """Of an error the other one speaks too, with its rank, where no torchrun ends it before."""

    def run_two(*arguments: str) -> list[tuple[int, str, str]]:
        given = ["--config", str(config_path), *arguments]
        done = run_commands(2, "train.__main__:main", given, grace=LIMIT)
        return [(process.returncode, process.stdout, process.stderr) for process in done]

    first, other = run_two("--check")
    assert first[1].startswith(f"{config_path}: ok\n")
    assert (first[::2], other) == ((0, ""), (0, "", ""))
    wrong = "error: --set train.max_stpes=3: unknown key 'train.max_stpes'. Did you mean 'train.max_steps'?\n"
    assert run_two("--set", "train.max_stpes=3") == [(2, "", wrong), (2, "", f"rank 1 on {platform.node()}: {wrong}")]


def test_part_of_the_launchers_variables(
    capsys: pytest.CaptureFixture[str], config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # main would set it
    monkeypatch.delenv("RANK", raising=False)
    assert main(["--config", str(config_path)]) == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE is set, so this is one of several processes, but RANK")
