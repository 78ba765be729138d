"""The worlds of test_distributed_checkpoint, forked from one process that has torch in memory already.

Starting a process is most of what these tests would take otherwise. main(FOLDER) leaves FOLDER/results.json. In the
last of the worlds two processes save a checkpoint, and one dies by SIGKILL when it opens, makes, renames or removes its
k-th file, for every k until the save gets through.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from parallel.checkpoint import load_parts, save_parts
from parallel.mesh import MeshSizes, make_meshes
from parallel.parts import Part
from parallel.world import World
from tests.dist_workers.checkpoint import four, resume, whole_run
from tests.processes import LIMIT
from train.state.checkpoint import latest_checkpoint
from train.state.optimizer_state import OptimizerState
from train.state.saver import CheckpointSaver

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def world_of(size: int, store: Path, work: Callable[[World], Any]) -> list[int]:
    """Calls work(world) in `size` processes; their exit statuses, as os.waitpid gives them."""
    store.unlink(missing_ok=True)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                shared = dist.FileStore(str(store), size)
                dist.init_process_group("gloo", store=shared, rank=rank, world_size=size)
                work(World(rank, size, rank))
                code = 0
            finally:
                if code:
                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    statuses, end = [], time.monotonic() + LIMIT
    for child in children:
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        statuses.append(done[1])
    return statuses


def results_of(size: int, root: Path, work: Callable[[World], Any]) -> list[Any]:
    """What work(world) returned in each of `size` processes, as JSON brings it back."""

    def write(world: World) -> None:
        (root / f"{world.rank}.json").write_text(json.dumps(work(world)))
        world.wait()

    assert world_of(size, root / "store", write) == [0] * size
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(size)]


# --------------------------------------------------------------------------------------------------------------- kills


def save(world: World, directory: Path, step: int, value: int, asynchronous: bool, die_at: int | None) -> None:
    """One of the two processes."""
    meshes = make_meshes(MeshSizes(1, 1, 2), torch.device("cpu"))
    part = Part((9000,), 0, world.rank * 4500, (world.rank + 1) * 4500, meshes.dense, (Replicate(), Shard(0)))
    tensors = {"big": torch.full((4500,), float(value)), "whole": torch.full((3,), float(value))}
    state = {"exp_avg.big": tensors["big"], "step.big": torch.tensor(float(value))}
    optimizer = OptimizerState(dict(state), {"kind": "AdamW", "steps": {}}, {"exp_avg.big": part})
    with CheckpointSaver(directory, 1, world=world, asynchronous=asynchronous) as saver:
        if die_at is not None:
            die(die_at)
        saver.save(step, tensors, optimizer, {"value": value}, {"big": part})


def die(k: int) -> None:
    seen = itertools.count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and next(seen) == k:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def pair(directory: Path, step: int, value: int, victim: int | None = None, k: int = 0) -> list[int]:
    """Exit statuses of the two processes."""

    def work(world: World) -> None:
        # Either way of saving with one of the victims.
        with contextlib.suppress(RuntimeError):  # gloo says that the other is gone
            save(world, directory, step, value, victim == 1, k if world.rank == victim else None)

    return world_of(2, directory.with_name("store"), work)


def value_in(directory: Path, new: int) -> float:
    """The value that the newest checkpoint holds in all its tensors."""
    checkpoint = latest_checkpoint(directory, report=lambda message: sys.exit(message))
    assert checkpoint is not None
    value: float = checkpoint.state["value"]
    tensors: list[tuple[str, Tensor]] = [("big", torch.zeros(9000)), ("whole", torch.zeros(3))]
    checkpoint.load_tensors(tensors)
    moments = checkpoint.optimizer_state().tensors
    everything = [tensor for _, tensor in tensors] + list(moments.values())
    assert all(bool((tensor == value).all()) for tensor in everything), list(directory.iterdir())
    assert checkpoint.step == (1 if value == 1 else new)
    return value


def kills(root: Path) -> list[dict[str, Any]]:
    """How often the previous and the new checkpoint were found, by victim."""
    directory, results = root / "work", []
    assert pair(root / "start", 1, 1) == [0, 0]
    for victim, new in ((0, 1), (1, 2)):  # the same step again, and the next one
        outcomes, left = [], set()
        for k in itertools.count():
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(root / "start", directory)
            statuses = pair(directory, new, 2, victim, k)
            assert statuses[1 - victim] == 0, (victim, k)
            names = tuple(sorted(path.name for path in directory.iterdir()))
            outcomes.append(value_in(directory, new))
            if not os.WIFSIGNALED(statuses[victim]):
                break
            if names not in left:  # whatever lies there, the next save clears it away
                left.add(names)
                assert pair(directory, new, 3) == [0, 0], names
                assert [path.name for path in directory.iterdir()] == [f"step-{new:06d}"], names
                assert value_in(directory, new) == 3
        assert outcomes[-1] == 2
        # While it is written the previous checkpoint, from the renaming on the new one.
        assert outcomes == sorted(outcomes), outcomes
        results.append({"victim": victim, "previous": outcomes.count(1), "new": outcomes.count(2)})
    return results


def main(folder: str) -> int:
    root = Path(folder)
    # Imports are not to be counted as files, and are to be made once.
    save_parts(root / "warm", {"a": torch.zeros(2)}, {})
    load_parts(root / "warm", {"a": torch.zeros(2)}, {})
    worlds = root / "worlds"
    for name in ("adamw", "adamw_8bit"):
        whole_run(name).steps(range(3)).save(str(worlds / f"alone_{name}"), 3, World())
    (root / "results.json").write_text(
        json.dumps(
            {
                "four": results_of(4, root, lambda world: four(world, str(worlds))),
                "two": results_of(2, root, lambda world: resume(world, str(worlds), ["adamw", "adamw_8bit"])),
                "three": results_of(3, root, lambda world: resume(world, str(worlds), ["adamw", "adamw_8bit"])),
                "kills": kills(root),
            }
        )
    )
    return 0
