"""What a run shows of a model of which this process holds a part. Run by tests/train/output/test_overview.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.registry import ARCHITECTURES
from parallel.fsdp import shard
from parallel.mesh import MeshSizes, make_meshes
from parallel.world import World
from quant.storage import StorageSpec
from tests.helpers import TINY_GLM
from train.config.load import parse_config
from train.output.overview import model_text, plan_text
from train.output.parameter_table import parameter_table

CPU = torch.device("cpu")


class Rows:
    """As much of train.data.load.Data as the plan reads."""

    class examples:
        total_tokens = 1000

    class train:
        steps_per_epoch = 10


def tiny_model(storage: str, rank: int) -> Any:
    """GLM's architecture on the meta device; with rank 0 everything is trained."""
    architecture = ARCHITECTURES["glm4_moe_lite"]
    config = architecture.parse_config(dict(TINY_GLM), "tiny")
    model = architecture.build(config, StorageSpec(storage), torch.bfloat16, "meta")
    if rank:
        add_lora(model, AdapterSpec(("attention", "experts"), rank, 1))
    else:
        model.requires_grad_(True)
    return model


def plan(model: Any, sizes: MeshSizes | None, *overrides: str) -> str:
    config = parse_config("{model: {path: x}, data: {train: x}, output: {dir: x}}", overrides)
    rows: Any = Rows
    return plan_text(model, rows, config, 5, sizes)


def table(model: Any) -> list[Any]:
    return [list(dataclasses.astuple(row)) for row in parameter_table(model)]


def shown(world: World, cases: list[list[Any]]) -> list[Any]:
    """For each (storage, rank, sizes): the table and the texts, of the model cut so."""
    results = []
    for storage, rank, numbers in cases:
        model, sizes = tiny_model(storage, rank), MeshSizes(*numbers)
        shard(model, make_meshes(sizes, CPU))
        full = [] if rank else ["adapter.kind=none", "model.storage=none"]
        title = model_text(model, "tiny", Path("tiny"), CPU, sizes)
        results.append([table(model), title, plan(model, sizes, *full)])
    return results
