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

from tests.processes import LIMIT, free_port, rank_environment
from tests.run_helpers import ROOT, World, make_world, settings

RANKS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def compare(arguments: list[str], meddle: str, result: Path, ranks: int) -> list[dict[str, Any]]:
    port, running = free_port(), []
    for rank in range(ranks):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **rank_environment(rank, ranks, port)}
        command = [sys.executable, "-m", "tests.dist_workers.patched", json.dumps(arguments), meddle, str(result)]
        running.append(subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=LIMIT)[1] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(said)[-3000:]
    return [json.loads(Path(f"{result}-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def test_libraries_are_as_they_were_after_a_distributed_run(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {
        "adapter__targets": ["attention", "experts", "router"],
        "train__max_steps": 3,
        "train__save_every": 2,
        "parallel__expert": 2,
    }
    for found in compare(settings(world, out, **changes), "", tmp_path / "result", RANKS):
        assert found["code"] == 0
        assert found["early"] == [], "nothing of the project is imported before the libraries are looked at"
        assert found["compared"] > 10_000
        assert not found["wrong"], "\n".join(found["wrong"])
    assert list((out / "checkpoints").glob("*")) and list(out.rglob("adapter_model.safetensors"))


def test_patches_are_noticed(tmp_path: Path) -> None:
    meddle = [
        "import torch, bitsandbytes, peft",
        "torch.nn.Linear.forward = lambda self, x: x",
        "torch.nn.functional.silu.__code__ = (lambda x, inplace=False: x).__code__",
        "torch.distributed.fsdp.fully_shard = lambda module: module",
        "torch.Tensor.gently = lambda self: self",
        "bitsandbytes.functional.quantize_4bit = print",
        "peft.tuners.lora.LoraModel.__init__ = lambda self: None",
        "torch.nn.modules.module.register_module_forward_hook(lambda module, given, out: out)",
    ]
    (found,) = compare(["--print-schema"], "\n".join(meddle), tmp_path / "result", 1)
    wrong = "\n".join(found["wrong"])
    for name in (
        "torch.distributed.fsdp.fully_shard is another object",
        "bitsandbytes.functional.quantize_4bit is another object",
        "torch.nn.functional.silu has other code",
        "_global_forward_hooks has 1 more",
    ):
        assert name in wrong, name
    for ending in (".forward is another object", ".gently is new", ".__init__ is new"):
        assert ending in wrong, ending
