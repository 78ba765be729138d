"""The peer's own Python environment: made on first use, kept while what it must hold stays the same."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from quant.common.errors import NibbleError

TRANSFORMERS, PEFT, BITSANDBYTES, ACCELERATE = "5.14.1", "0.19.1", "0.49.1", "1.15.0"
NATIVE_ONLY = "measure this side: --native-only"
STAMP = "nibble-peer.json"  # written when everything is installed


def requirements(bitsandbytes: str = BITSANDBYTES) -> list[str]:
    """What the environment holds: the peer at fixed versions, on the torch that this project runs on."""
    torch = importlib.metadata.version("torch").partition("+")[0]
    return [
        f"torch=={torch}",
        f"transformers=={TRANSFORMERS}",
        f"peft=={PEFT}",
        f"bitsandbytes=={bitsandbytes}",
        f"accelerate=={ACCELERATE}",
    ]


def python_in(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def environment_of(root: Path, wanted: list[str]) -> tuple[Path, bool]:
    """The folder under `root` of the environment that holds `wanted`, and whether it is there and does."""
    name = next(entry for entry in wanted if entry.startswith("bitsandbytes"))
    folder = root / name.replace("==", "-")
    stamp = folder / STAMP
    there = python_in(folder).exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == _content(wanted)
    return folder, there


def _content(wanted: list[str]) -> str:
    return json.dumps({"python": sys.version.split()[0], "requirements": wanted})


def peer_python(root: Path, wanted: list[str], say: Callable[[str], None], instead: str = NATIVE_ONLY) -> Path:
    """The interpreter of the environment under `root` that holds `wanted`; made first if it isn't there.

    Raises NibbleError with the end of pip's output when the installation fails, and what to do `instead`.
    """
    folder, there = environment_of(root, wanted)
    python = python_in(folder)
    if there:
        return python
    say(f"making the peer's environment in {folder} (a few minutes, once): {', '.join(wanted)}")
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet", *wanted],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise NibbleError(
                f"the peer's environment {folder} could not be made ({' '.join(command[1:4])} failed):\n{end}\n"
                f"Mend the installation (pip reads PIP_INDEX_URL and its like), or {instead}."
            )
    (folder / STAMP).write_text(_content(wanted), encoding="utf-8")
    return python
