"""What processes find out about the folder that they are to write to."""

from __future__ import annotations

from pathlib import Path

from parallel.world import World
from quant.errors import NibbleError
from train.run_folder import require_shared


def check(world: World, folders: list[str]) -> str:
    """The message that this process gets, empty where there is none; each is given a folder by its rank."""
    try:
        require_shared(Path(folders[world.rank]), world)
    except NibbleError as error:
        return str(error)
    return ""


def check_all(world: World, same: str, other: str) -> list[str]:
    return [check(world, [same, same]), check(world, [same, other])]
