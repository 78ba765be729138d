"""docs/inspect.md: its commands run, and print what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from models.convert.__main__ import main as convert
from models.inspect.__main__ import main as inspect
from train.demo.__main__ import main as demo

PAGE = Path(__file__).parent.parent / "docs" / "inspect.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = {"models.inspect": inspect, "models.convert": convert, "train.demo": demo}


def transcripts() -> list[tuple[str, str]]:
    """Each command after a `$`, and the output that the page shows, without its indentation."""
    blocks = re.findall(r"^    \$ python -m models\.inspect (.*)\n((?:(?:    .*)?\n)*)", TEXT, re.M)
    return [(command, re.sub(r"^ {4}", "", shown, flags=re.M).strip("\n")) for command, shown in blocks]


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for module, arguments in re.findall(r"^    python -m (train\.demo|models\.convert) (.*)$", TEXT, re.M):
        assert COMMANDS[module](arguments.split()) == 0
    (snippet,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    exec(compile(snippet, str(PAGE), "exec"), {"__name__": "inspect"})  # noqa: S102
    found = transcripts()
    assert len(found) == 4
    for command, shown in found:
        capsys.readouterr()
        code = inspect(command.split())
        assert code == (1 if shown.endswith(" differences") else 0)
        printed = capsys.readouterr().out.strip("\n")
        pattern = ".*".join(map(re.escape, re.split(r"…", shown)))
        assert re.fullmatch(pattern, printed, re.S), f"{command} prints:\n{printed}"
    assert Path("outputs/inspect/norms.png").is_file()
