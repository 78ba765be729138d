"""Conversions of a tiny checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quant.storage import StorageSpec

NF4 = StorageSpec("nf4", True)


ROOT = Path(__file__).parents[1]


def hub_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def write_hub(folder: Path, tensors: dict[str, torch.Tensor], config: Path, **changes: Any) -> Path:
    """A hub folder with these tensors in one file, and the config.json of another folder."""
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((config / "config.json").read_text()) | changes))
    return folder


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob(pattern))}


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    # One thread: beside other work, threads that wait for each other take far longer.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )
