"""What processes find out about each other before they start: the folder that they are to write to, the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from parallel.world import World
from quant.common.errors import NibbleError
from train.config.load import Config
from train.state.resume import require_same_config
from train.state.run_folder import require_shared


def check(world: World, folders: list[str]) -> str:
    """The message that this process gets, empty where there is none; each is given a folder by its rank."""
    try:
        require_shared(Path(folders[world.rank]), world)
    except NibbleError as error:
        return str(error)
    return ""


def check_all(world: World, same: str, other: str) -> list[str]:
    return [check(world, [same, same]), check(world, [same, other])]


def check_config(world: World, keys: list[dict[str, Any]], devices: list[str]) -> str:
    """The same for configs, of which each process has other keys of section train, and for devices."""
    sections = {"model": {"path": "model"}, "data": {"train": "rows.jsonl"}, "output": {"dir": "out"}}
    try:
        require_same_config(
            Config.model_validate({**sections, "train": keys[world.rank]}), torch.device(devices[world.rank])
        )
    except NibbleError as error:
        return str(error)
    return ""


def check_configs(world: World) -> list[str]:
    same, other = {"learning_rate": 1e-4}, {"learning_rate": 2e-4, "max_steps": 7}
    return [
        check_config(world, [same, same], ["cpu", "cpu"]),
        check_config(world, [same, other], ["cpu", "cpu"]),
        check_config(world, [same, same], ["cuda:0", "cpu"]),
        check_config(world, [same, same], ["cuda:0", "cuda:1"]),
    ]
