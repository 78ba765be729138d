"""A distributed run leaves torch, peft and bitsandbytes as they are: no function, class, method or source of theirs is
another one afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import LIMIT
from tests.run_helpers import ROOT, make_world, settings

pytestmark = pytest.mark.slow  # two processes of torchrun, 20 s of CPU

MEDDLE = [
    "import torch, bitsandbytes, peft",
    "torch.nn.Linear.forward = lambda self, x: x",
    "torch.nn.functional.silu.__code__ = (lambda x, inplace=False: x).__code__",
    "torch.distributed.fsdp.fully_shard = lambda module: module",
    "torch.Tensor.gently = lambda self: self",
    "bitsandbytes.functional.quantize_4bit = print",
    "peft.tuners.lora.LoraModel.__init__ = lambda self: None",
    "torch.nn.modules.module.register_module_forward_hook(lambda module, given, out: out)",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("patched")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """Of the two processes of a run, and of one that meddles with the libraries."""
    (folder / "world").mkdir()
    changes = {
        "adapter__targets": ["attention", "experts", "router"],
        "train__max_steps": 3,
        "train__save_every": 2,
        "parallel__expert": 2,
    }
    arguments = settings(make_world(folder / "world"), folder / "run", **changes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.dist_workers.patched"]
    command += [json.dumps(arguments), "\n".join(MEDDLE), str(folder / "result")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"result-{number}.json").read_text(encoding="utf-8")) for number in range(3)]


def test_libraries_are_as_they_were_after_a_distributed_run(found: list[dict[str, Any]], folder: Path) -> None:
    for of_rank in found[:2]:
        assert of_rank["code"] == 0
        assert of_rank["early"] == [], "nothing of the project is imported before the libraries are looked at"
        assert of_rank["compared"] > 10_000
        assert not of_rank["wrong"], "\n".join(of_rank["wrong"])
    out = folder / "run"
    assert list((out / "checkpoints").glob("*")) and list(out.rglob("adapter_model.safetensors"))


def test_patches_are_noticed(found: list[dict[str, Any]]) -> None:
    wrong = "\n".join(found[2]["wrong"])
    for name in (
        "torch.distributed.fsdp.fully_shard is another object",
        "bitsandbytes.functional.quantize_4bit is another object",
        "torch.nn.functional.silu has other code",
        "_global_forward_hooks has 1 more",
    ):
        assert name in wrong, name
    for ending in (".forward is another object", ".gently is new", ".__init__ is new"):
        assert ending in wrong, ending
