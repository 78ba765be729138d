"""One of the processes of `benchmarks.distributed`: loads its part of the model, or trains on it."""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.distributed import Job
from benchmarks.documents import one_document
from benchmarks.measure import CPU, reset_peak_memory, resident_bytes
from benchmarks.setting import ALPHA, LEARNING_RATE, MAX_GRAD_NORM, RANK
from benchmarks.traffic import Traffic, planned_gathers, record
from models.checkpoint.keymap import key_map_of
from models.checkpoint.tensorfile import MAPPED_BYTES
from models.decoder import CausalLM
from models.load import open_folder
from parallel.device import peak_memory_bytes
from parallel.mesh import Meshes, MeshSizes, make_meshes, mesh_sizes
from parallel.shards import Shards, local_tensor
from parallel.world import World, launched_world, process_group
from quant.fourbit import import_bitsandbytes
from train.config.load import Config
from train.loop import training_step
from train.model import load_trainable_model
from train.optim import build_optimizer
from train.output.parameter_table import whole_tensors


def config_of(job: Job, path: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": path, "storage": job.storage, "dtype": job.dtype},
            "adapter": {"targets": ["attention", "experts"], "rank": RANK, "alpha": ALPHA},
            "data": {"train": "none"},
            "parallel": {"expert": job.expert},
            "output": {"dir": "none"},
        }
    )


def load(job: Job, path: str, meshes: Meshes | None) -> Shards:
    return load_trainable_model(config_of(job, path), open_folder(path), CPU, meshes, progress=False)


def held_bytes(tensors: list[Tensor]) -> int:
    """Of the memory behind tensors, each piece counted once."""
    storages = {local_tensor(tensor).untyped_storage() for tensor in tensors}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def living_bytes() -> int:
    """Of the memory behind all tensors that Python knows."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.device.type == "cpu"]
    return held_bytes(found)


def largest_tensor(model: CausalLM, parts: int) -> int:
    """Bytes of the largest tensor that passes through memory on its way to its place: a whole matrix in the model's
    dtype or as it is kept, one expert, or of a stack that is stored already this process's part."""
    item = model.dtype.itemsize
    keys = [math.prod(key.shape[-2:] if key.parts else key.shape) * item for key in key_map_of(model).keys]
    kept = [each.nbytes // (parts if each.key.parts else 1) for each in whole_tensors(model)]
    return max(*keys, *kept)


def measure_load(job: Job, path: str, meshes: Meshes | None, world: World) -> dict[str, Any]:
    gc.collect()
    world.wait()
    reset_peak_memory(CPU)
    before = resident_bytes()
    shards = load(job, path, meshes)
    peak = peak_memory_bytes(CPU) - before
    share = held_bytes([*shards.model.parameters(), *shards.model.buffers()])
    largest = largest_tensor(shards.model, job.processes)
    return {"peak": peak, "share": share, "largest": largest, "mapped": MAPPED_BYTES}


def measure_training(job: Job, meshes: Meshes | None, world: World) -> dict[str, Any]:
    shards = load(job, job.sources[-1], meshes)
    model, sizes = shards.model, meshes.sizes if meshes is not None else MeshSizes()
    owner = meshes.owner if meshes is not None else 0
    model.train()
    model.activation_checkpointing = True
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    total = sum(each.nbytes for each in whole_tensors(model) if not each.lora)
    found: dict[str, Any] = {"held": held_bytes([*frozen, *model.buffers()]), "total": total, "threads": job.threads}
    planned = planned_gathers(shards, sizes)
    found |= {"planned": planned.packed, "dense": planned.dense}
    # AdamW's usual epsilon would make steps out of the round-off of gradients that are next to nothing.
    optimizer = build_optimizer("adamw", shards.parameters, LEARNING_RATE, eps=1e-3, parts=shards.parts)
    losses, seconds = [], []

    def step(number: int) -> None:
        # N processes and one see the same documents.
        batches = []
        for micro_batch in range(job.micro_batches):
            document = number * world.size * job.micro_batches + world.rank * job.micro_batches + micro_batch
            generator = torch.Generator().manual_seed(document)
            batches.append(one_document(torch.randint(0, model.vocabulary, (job.tokens,), generator=generator)))
        start = time.perf_counter()
        done = training_step(
            shards, optimizer, batches, step=number, max_grad_norm=MAX_GRAD_NORM, device=CPU, world=world
        )
        seconds.append(time.perf_counter() - start)
        losses.append(done.loss)

    for number in range(job.warmup + job.steps):
        step(number)
    found["seconds"] = statistics.median(seconds[job.warmup :])
    moved = record(lambda: step(job.warmup + job.steps), owner, sizes.expert) if world.size > 1 else Traffic()
    found |= {"gathered_forward": moved.gathered_forward, "gathered_backward": moved.gathered_backward}
    found |= {"reduced": moved.reduced, "exchanged": moved.exchanged, "losses": losses}
    shards.reshard()
    state = [value for of_one in optimizer.state.values() for value in of_one.values() if isinstance(value, Tensor)]
    found["alive"] = living_bytes() - held_bytes([*(parameter for _, parameter in shards.parameters), *state])
    return found


def main(job: Job, result: Path) -> None:
    torch.set_num_threads(job.threads)
    import_bitsandbytes()
    world = launched_world()
    with process_group(world, CPU):
        meshes = make_meshes(mesh_sizes(world, expert=job.expert), CPU) if world.size > 1 else None
        found: dict[str, Any] = {}
        if job.kind != "train":
            load(job, job.sources[-1], meshes)  # what is imported and set up on the way there stays
            found["loads"] = [measure_load(job, path, meshes, world) for path in job.sources]
        if job.kind != "load":
            found |= measure_training(job, meshes, world)
        world.wait()
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Job.loads(sys.argv[1]), Path(sys.argv[2]))
