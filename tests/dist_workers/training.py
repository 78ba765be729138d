"""Training steps of tiny models on one or several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from models import load_model
from models.adapters.files import save_adapter
from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.checkpoint.export import export_hub
from models.load import open_folder
from parallel.mesh import make_meshes, mesh_sizes
from parallel.shards import Shards, local_tensor
from parallel.world import ALONE, World
from train.config.load import Config
from train.config.sections import TrainConfig
from train.data.batches import StepBatches
from train.data.examples import Examples
from train.data.packing import pack
from train.loop import Loop, training_step
from train.model import load_trainable_model
from train.optim import build_optimizer
from train.output.report import Report
from train.signals import StopOnSignal

CPU = torch.device("cpu")
STEPS = 3  # the last one or the last but one ends an epoch, with fewer micro-batches


def examples(count: int = 60, vocabulary: int = 128, seed: int = 0) -> Examples:
    """Documents of very different lengths, with loss on very different shares of them."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, 40, count)
    tokens = draw.integers(0, vocabulary, lengths.sum())
    starts = np.concatenate(([0], lengths.cumsum()[:-1]))
    mask = draw.random(lengths.sum()) < np.repeat(draw.random(count), lengths)
    mask[starts], mask[starts + 1] = False, True
    labelled = np.add.reduceat(mask, starts)
    return Examples(
        tokens.astype(np.int32), mask, starts.astype(np.int64), lengths.astype(np.int32),
        np.arange(count), labelled.astype(np.int32),
    )  # fmt: skip


def config_of(case: dict[str, Any]) -> Config:
    """case: config sections by name, as they would stand in a file; what it leaves out is small."""
    model = {"storage": "nf4", "dtype": "float32", **case["model"]}
    adapter = {"targets": ("attention", "experts", "router"), "rank": 4, "alpha": 8.0, **case.get("adapter", {})}
    # With AdamW's usual epsilon a weight whose gradient is nothing but round-off would still move by a whole step.
    train = {"optimizer": "adamw", "learning_rate": 1e-2, "eps": 1e-2, "gradient_accumulation": 2}
    train |= case.get("train", {})
    return Config.model_validate(
        {
            "model": model,
            "adapter": adapter,
            "data": {"train": "none"},
            "train": train,
            "parallel": case.get("parallel", {}),
            "output": {"dir": "none"},
        }
    )


def train(world: World, case: dict[str, Any]) -> tuple[list[float], list[float], Shards]:
    """Losses and gradient norms of STEPS steps, and the model after them."""
    config = config_of(case)
    settings, parallel = config.train, config.parallel
    source = open_folder(config.model.path)
    meshes = None
    if world.size > 1 or parallel.cpu_offload:
        sizes = mesh_sizes(world, parallel.shard, parallel.expert, parallel.replicate)
        meshes = make_meshes(sizes, CPU)
    shards = load_trainable_model(config, source, CPU, meshes, progress=False)
    model = shards.model
    model.train()
    model.activation_checkpointing = settings.activation_checkpointing
    optimizer = build_optimizer(
        settings.optimizer, shards.parameters, settings.learning_rate, eps=settings.eps, parts=shards.parts
    )
    rows = examples(36, vocabulary=model.vocabulary)
    batches = StepBatches(
        rows,
        pack(rows.lengths, 64, 0, True),
        micro_batch_size=settings.micro_batch_size,
        gradient_accumulation=settings.gradient_accumulation,
        rank=world.rank,
        ranks=world.size,
    )
    if model.balance is not None:
        model.balance.reduce = world.sum
    losses, norms = [], []
    for step in range(STEPS):
        done = training_step(
            shards, optimizer, next(batches), step=step, max_grad_norm=settings.max_grad_norm, device=CPU, world=world
        )
        losses.append(done.loss)
        norms.append(done.grad_norm)
    shards.reshard()
    return losses, norms, shards


def train_all(world: World, cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Each case trained; the result of each is saved under its number in `folder` by the first process."""
    torch.set_num_threads(1)
    results = []
    for number, case in enumerate(cases):
        losses, norms, shards = train(world, case)
        frozen = [tensor for tensor in shards.model.parameters() if not tensor.requires_grad]
        held = sum(local_tensor(tensor).nbytes for tensor in frozen)
        save_result(shards, Path(folder, str(number)), case, world)
        results.append({"losses": losses, "norms": norms, "frozen_bytes": held})
    return results


def saved_steps(
    world: World, checkpoint: str, folder: str, seconds: list[float], settings: dict[str, Any]
) -> list[int]:
    """The steps, of ten, after which this process writes a checkpoint. seconds: that a step takes, by rank."""
    model = load_model(checkpoint, storage="none", dtype=torch.float32)
    add_lora(model, AdapterSpec(("attention",), 4, 8.0))
    shards, rows, saved = Shards(model), examples(vocabulary=model.vocabulary), []
    with Report(Path(folder, f"{world.rank}.log"), quiet=True) as report:
        loop = Loop(
            settings=TrainConfig(**settings),
            shards=shards,
            optimizer=build_optimizer("adamw", shards.parameters, 0.0),
            batches=StepBatches(
                rows, pack(rows.lengths, 64, 0, True), micro_batch_size=1, rank=world.rank, ranks=world.size
            ),
            held_out=None,
            total_steps=10,
            device=CPU,
            metrics=None,
            report=report,
            stop=StopOnSignal(),
            save=lambda: saved.append(loop.progress.step),
            last_checkpoint=lambda: "",
            world=world,
            clock=lambda: seconds[world.rank] * loop.progress.step,
        )
        assert loop.run()
    return saved


def save_result(shards: Shards, folder: Path, case: dict[str, Any], world: World) -> None:
    if case.get("adapter", {}).get("kind") == "none":
        export_hub(shards.model, folder, case["model"]["path"], gather=shards.whole, writes=world.first)
    else:
        save_adapter(shards.model, folder, "base", gather=shards.whole, writes=world.first)
    world.wait()


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def train_alone(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """The same on one process, which holds the whole model; what concerns several processes is left out."""
    return train_all(ALONE, [{**case, "parallel": {}} for case in cases], folder)
