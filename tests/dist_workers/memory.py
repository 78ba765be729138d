"""What a process holds, needs for loading and gathers, of models cut over several processes."""

from __future__ import annotations

import gc
import hashlib
from typing import Any

import torch

import models.checkpoint.tensorfile
from benchmarks.distributed_process import held_bytes, largest_tensor, living_bytes
from benchmarks.documents import one_document
from benchmarks.measure import reset_peak_memory, resident_bytes
from benchmarks.traffic import planned_gathers, record
from models.load import open_folder
from parallel.device import peak_memory_bytes
from parallel.mesh import Meshes, make_meshes, mesh_sizes
from parallel.shards import Shards
from parallel.world import World
from quant.kinds import quantise
from quant.storage import StorageSpec
from tests.dist_workers.training import CPU, config_of
from train.loop import training_step
from train.model import load_trainable_model
from train.optim import build_optimizer
from train.output.parameter_table import whole_tensors

TOKENS = 32


def _load(case: dict[str, Any], meshes: Meshes) -> Shards:
    config = config_of(case)
    return load_trainable_model(config, open_folder(config.model.path), CPU, meshes, progress=False)


def measure_all(world: World, cases: list[dict[str, Any]], mapped: int) -> list[dict[str, Any]]:
    """mapped: bytes of a file that may stay mapped; a test's models are small."""
    torch.set_num_threads(1)
    quantise(StorageSpec("nf4"), torch.ones(64, 64), torch.bfloat16, name="ones")  # loads the library
    models.checkpoint.tensorfile.MAPPED_BYTES = mapped
    of_expert = {expert: make_meshes(mesh_sizes(world, expert=expert), CPU) for expert in (1, 2)}
    meshes = [of_expert[case["parallel"]["expert"]] for case in cases]
    for number in (0, -1):
        _load(cases[number], meshes[number])  # what is imported and set up on the way stays
    gc.collect()
    gc.freeze()  # from here on only what is made now is looked through for tensors
    found = [_loaded(world, case, mesh) for case, mesh in zip(cases, meshes, strict=True)]
    # Only now, since a step leaves behind freed memory that a load could fill unnoticed.
    for of_case, case, mesh in zip(found, cases, meshes, strict=True):
        if case["step"]:
            of_case |= _stepped(world, case, mesh)
    return found


def _loaded(world: World, case: dict[str, Any], meshes: Meshes) -> dict[str, Any]:
    gc.collect()
    world.wait()
    assert reset_peak_memory(CPU)
    before = resident_bytes()
    shards = _load(case, meshes)
    peak = peak_memory_bytes(CPU) - before
    model, buffers = shards.model, list(shards.model.buffers())
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    trained = held_bytes([parameter for _, parameter in shards.parameters])
    return {
        "peak": peak,
        "share": held_bytes([*model.parameters(), *buffers]),
        "largest": largest_tensor(model, meshes.sizes.parts),
        "frozen": held_bytes([*frozen, *buffers]),
        "total": sum(each.nbytes for each in whole_tensors(model) if not each.lora),
        "alive": living_bytes() - trained,
        "buffers": {name: _digest(buffer) for name, buffer in model.named_buffers()},
    }


def _stepped(world: World, case: dict[str, Any], meshes: Meshes) -> dict[str, Any]:
    gc.collect()
    shards = _load(case, meshes)
    planned = planned_gathers(shards, meshes.sizes)
    found = _step(world, shards, meshes)
    trained = held_bytes([parameter for _, parameter in shards.parameters])
    return {
        **found,
        "trained": trained,
        "planned": planned.packed,
        "dense": planned.dense,
        "alive_after": living_bytes() - trained,
    }


def _step(world: World, shards: Shards, meshes: Meshes) -> dict[str, Any]:
    model = shards.model
    model.train()
    model.activation_checkpointing = True
    optimizer = build_optimizer("adamw", shards.parameters, 1e-3, parts=shards.parts)
    tokens = torch.randint(0, model.vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(world.rank))
    batches = [one_document(tokens)]

    def step() -> None:
        training_step(shards, optimizer, batches, step=1, max_grad_norm=1.0, device=CPU, world=world)

    moved = record(step, meshes.owner, meshes.sizes.expert)
    shards.reshard()
    return {"gathered": moved.gathered, "reduced": moved.reduced, "exchanged": moved.exchanged}


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
