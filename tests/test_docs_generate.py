"""docs/generate.md: its transcripts, on a model that was taught to answer as the demo's does."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.generate_helpers import run

TEXT = (Path(__file__).parent.parent / "docs" / "generate.md").read_text(encoding="utf-8")


@dataclass
class Command:
    """A command of a transcript: its words, the lines typed into it, the lines that it prints."""

    words: list[str]
    typed: list[str] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)


def commands() -> list[Command]:
    found: list[Command] = []
    for block in re.findall(r"^```\n(.*?)^```$", TEXT, re.M | re.S):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Command(shlex.split(line[2:])))
            else:
                (found[-1].typed if line.startswith("> ") else found[-1].printed).append(line.removeprefix("> "))
    return found


def timeless(lines: list[str]) -> list[str]:
    return [re.sub(r"[\d,.]+ a second$", "N a second", line) for line in lines]


def test_transcripts(taught_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs").symlink_to(taught_demo.parent)
    monkeypatch.chdir(tmp_path)
    asked = 0
    for command in commands():
        if command.words[0] == "cat":
            path = Path(command.words[1])
            if path.exists():
                assert path.read_text(encoding="utf-8").splitlines() == command.printed
            else:
                path.write_text("".join(f"{line}\n" for line in command.printed), encoding="utf-8")
            continue
        assert command.words[:3] == ["python", "-m", "train.generate"]
        code, shown, said = run(command.words[3:], command.typed)
        assert code == 0
        # Both streams are on one terminal; what each prints is in order.
        printed = timeless(command.printed)
        for stream in (shown, said):
            lines = timeless(stream.splitlines())
            assert [line for line in printed if line in lines] == lines
        assert len(printed) == len(shown.splitlines()) + len(said.splitlines())
        asked += 1
    assert asked == 4


def test_every_option_is_documented() -> None:
    from train.generate.__main__ import parser

    for action in parser()._actions:
        for option in action.option_strings:
            assert option in ("-h", "--help") or f"`{option}" in TEXT or f" {option} " in TEXT, option
