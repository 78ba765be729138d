"""What commands print, whatever the terminal is and whatever other people's files have in them; and Ctrl-C."""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quant.common.errors import NibbleError
from quant.common.terminal import LONGEST, error_text, exit_code, legible, refuse_empty
from tests.processes import LIMIT

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "train": ["--config", "configs/glm47_tiny_qlora.yaml"],
    "models.convert": ["nowhere", "somewhere"],
    "models.adapter_names": ["nowhere", "somewhere", "--to", "text"],
    "models.merge": ["nowhere", "adapter", "somewhere"],
    "train.demo": ["report", "nowhere"],
}
INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
HOSTILE = "a\x1b[31m\x07\x9b\u202eb"  # colours, a bell, C1's CSI, text from right to left
HARMLESS = r"a\x1b[31m\x07\x9b\u202eb"


def test_options_are_not_abbreviated() -> None:
    """An option that is added later must not change what a script's option means. Of every command's parsers."""
    made = []
    for package in ("quant", "models", "parallel", "train", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = getattr(node.func, "attr", None) if isinstance(node, ast.Call) else None
                if name in ("ArgumentParser", "add_parser"):
                    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    made.append((f"{path.relative_to(ROOT)}:{node.lineno}", given.get("allow_abbrev")))
    assert len(made) > 15
    assert [place for place, value in made if value != "False"] == []


def command(
    module: str, arguments: list[str], env: dict[str, str] | None = None, path: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    # Python puts the current directory first for -m, and this before the libraries'.
    extra = {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env={**os.environ, **(env or {}), **extra}, capture_output=True, timeout=LIMIT, check=False,
    )  # fmt: skip


def test_control_characters_are_escaped_and_lines_cut() -> None:
    assert legible(f"{HOSTILE}\nsecond · – → …") == f"{HARMLESS}\nsecond · – → …"
    cut = legible("x" * 100_000 + "\n" + "y" * LONGEST)
    assert [len(line) for line in cut.split("\n")] == [LONGEST - 1, LONGEST]
    assert cut.startswith("xxx") and "x…x" in cut
    assert legible("\udcff") == r"\udcff"  # of a file name that isn't UTF-8


def test_errors_and_interrupts_become_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        raise error

    assert exit_code(lambda: fail(NibbleError(f"{HOSTILE}: broken\nMend it."))) == 2
    assert capsys.readouterr().err == f"error: {HARMLESS}: broken\n       Mend it.\n"
    assert exit_code(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert exit_code(lambda: 3) == 3
    assert error_text(NibbleError("")) == "error: "


@pytest.mark.parametrize(
    "module", [name if name == "models.merge" else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_an_argument_with_an_escape_sequence(module: str) -> None:
    arguments = [HOSTILE if word == "nowhere" or word.startswith("configs") else word for word in COMMANDS[module]]
    done = command(module, arguments)
    assert done.returncode == 2
    assert HARMLESS.encode() in done.stderr
    assert not any(byte < 0x20 and byte != 0x0A for byte in done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("module", "arguments", "encoding"),
    [
        pytest.param("train", ["--help"], "latin-1", marks=pytest.mark.slow),
        ("train", ["--help"], "ascii"),
        ("models.convert", ["ä…", "–"], "ascii"),
    ],
)
def test_a_terminal_that_is_not_utf8(module: str, arguments: list[str], encoding: str) -> None:
    done = command(module, arguments, {"PYTHONIOENCODING": encoding})
    assert b"Traceback" not in done.stderr
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    if module == "train":
        assert rb"\u00d7" in done.stdout.replace(b"\xd7", rb"\u00d7").replace(rb"\xd7", rb"\u00d7")


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("train", "pydantic"),
        ("train", "torch"),
        ("models.convert", "argparse"),
        ("models.convert", "torch"),
        ("models.adapter_names", "safetensors"),
        ("train.demo", "tokenizers"),
    ],
)
def test_ctrl_c_during_imports(tmp_path: Path, module: str, imported: str) -> None:
    """Even where the importing library swallows what is raised there."""
    (tmp_path / f"{imported}.py").write_text(
        f"{INTERRUPT.replace('os.kill', 'try: os.kill')}except BaseException: raise ImportError\n"
    )
    arguments = ["prepare", str(tmp_path / "demo")] if module == "train.demo" else COMMANDS[module]
    if imported == "torch" and module == "train":
        (tmp_path / "rows.jsonl").touch()
        arguments = [*arguments, "--set", f"data.train={tmp_path / 'rows.jsonl'}", "--set", "data.eval=null"]
    done = command(module, arguments, path=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")


@pytest.mark.usefixtures("signals_heeded")
def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    """As of a command in the background of a script."""
    (tmp_path / "pydantic.py").write_text(f"{INTERRUPT}raise SystemExit(7)\n")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert command("train", COMMANDS["train"], path=tmp_path).returncode == 7


def test_warnings_of_a_command_are_escaped_too() -> None:
    code = (
        "import logging, sys\nfrom quant.common.terminal import run_command\n"
        f"sys.exit(run_command(lambda: logging.getLogger('nibble').warning({HOSTILE!r}) or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", HARMLESS.encode() + b"\n")
    assert logging.getLogger("nibble").handlers == []


def test_an_empty_name_is_refused() -> None:
    given = argparse.Namespace(model="m", by_row="", prompt="", device=None, stop=[])
    with pytest.raises(NibbleError, match="by-row is given as an empty text"):
        refuse_empty(given, "prompt")
    refuse_empty(argparse.Namespace(**vars(given) | {"by_row": "x"}), "prompt")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("models.adapter_names", ["", "out", "--to", "text"]),
        ("models.convert.__main__", ["model", ""]),
        ("models.export.__main__", ["adapter", "", "--for", "peft"]),
        ("models.hub_push", ["", "USER/NAME"]),
        ("models.inspect.__main__", [""]),
        ("models.merge.__main__", ["model", "", "out"]),
    ],
)
def test_every_command_refuses_empty_names(
    module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert importlib.import_module(module).main(arguments) == 2
    assert "is given as an empty text. Give a name, or leave it out." in capsys.readouterr().err
