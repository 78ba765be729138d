"""What python -m models.inspect says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.inspect.__main__ import main


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What --json prints, which must be all of standard output."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def compared(capsys: pytest.CaptureFixture[str], here: Path, there: Path) -> list[tuple[str, str, Any, Any]]:
    capsys.readouterr()
    code = main([str(here), "--diff", str(there), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (code, found["equal"]) == ((1, False) if found["differences"] else (0, True))
    return [tuple(difference.values()) for difference in found["differences"]]
