"""Small checkpoints of a run, to be read, killed and damaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.state.optimizer_state import OptimizerState
from train.state.saver import CheckpointSaver


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "layers.0.A": torch.randn(3, 5, 7, generator=generator),
        "layers.0.B": torch.randn(9, 4, generator=generator).to(torch.bfloat16).T,
    }


def save(directory: Path, step: int, keep: int = 2, **state: Any) -> Path:
    optimizer = OptimizerState({"step.layers.0.A": torch.tensor(float(step))}, {"kind": "test", "steps": {}})
    return save_checkpoint(directory, step, tensors_of(step), optimizer, {"step": step, **state}, keep)


def save_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Tensor], optimizer: OptimizerState, state: Any, keep: int
) -> Path:
    CheckpointSaver(directory, keep).save(step, tensors, optimizer, state)
    return directory / f"step-{step:06d}"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def weights_of(path: Path) -> Path:
    return next((path / "weights").iterdir())
