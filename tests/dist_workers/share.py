"""What the processes of tests/parallel/test_share.py do."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models import load_model
from models.blocks.balance import AuxiliaryLoss, BiasUpdate
from models.decoder import CausalLM
from parallel.world import ALONE, World
from quant.common.errors import NibbleError
from train.config.load import Config, parse_config
from train.data.batches import IGNORED, Batch
from train.data.load import Data, load_data
from train.held_out import batch_loss, held_out_loss
from train.output.report import Report

CPU = torch.device("cpu")
RATE = 0.5


def configured(model: str, rows: str, out: Path, *overrides: str) -> Config:
    text = f"""
        model: {{path: {model}, storage: none, dtype: float32}}
        adapter: {{kind: none}}
        data: {{train: {rows}, sequence_length: 64, eval_fraction: 0.25}}
        train: {{device: cpu, optimizer: adamw, micro_batch_size: 2, gradient_accumulation: 3}}
        output: {{dir: {out}}}
    """
    return parse_config(text, overrides)


def read(config: Config, folder: Path, world: World = ALONE) -> Data:
    folder.mkdir(exist_ok=True)
    with Report(folder / f"log-{world.rank}") as report:
        return load_data(
            config, Path(config.model.path), folder / "skipped.jsonl", report.note, datetime(2025, 1, 1), world
        )


def described(data: Data, steps: int) -> dict[str, Any]:
    """The rows of some steps and of the evaluation, and all that must be the same on every process."""
    assert data.held_out is not None
    train = [[real_tokens(batch) for batch in next(data.train)] for _ in range(steps)]
    return {
        "train": train,
        "held_out": [real_tokens(batch) for batch in data.held_out],
        "state": data.train.state(),
        "fingerprint": data.held_out.fingerprint(),
        "rows": [data.held_out_rows, data.examples.total_rows, len(data.packing)],
        "reports": [report.rows for report in data.reports],
        "skipped": data.skipped,
    }


def real_tokens(batch: Batch) -> list[int]:
    return batch.tokens[: batch.real_tokens].tolist()


def two_steps(model: CausalLM, data: Data, world: World) -> list[float]:
    """Two steps of gradient descent as parallel training does them; the losses, and what balance measured."""
    measured, balance = [], model.balance
    assert balance is not None
    for _ in range(2):
        batches = next(data.train)
        counts = torch.tensor([[batch.labelled, batch.real_tokens] for batch in batches]).sum(0)
        labelled, tokens = world.sum(counts).tolist()
        balance.begin_step()
        loss = torch.zeros(())
        for batch in batches:
            part = batch_loss(model, batch, labelled)
            extra = balance.collect(batch.real_tokens / tokens)
            (part if extra is None else part + extra).backward()
            loss += part.detach()
        for parameter in model.parameters():
            assert parameter.grad is not None  # also on a process without rows
            parameter.data -= RATE * world.sum(parameter.grad)
            parameter.grad = None
        measured += [world.sum(loss).item(), *balance.end_step().values()]
    return measured


def balanced(folder: str, method: type[BiasUpdate | AuxiliaryLoss], world: World) -> CausalLM:
    model = load_model(folder, storage="none", dtype=torch.float32).requires_grad_(True).train()
    model.balance = method(model, 0.05)
    model.balance.reduce = world.sum
    return model


def everything(world: World, sigmoid: str, softmax: str, rows: str, other: str, out: str) -> dict[str, Any]:
    """sigmoid, softmax: checkpoints with such routers; other: held-out rows. Only the first process may see any rows,
    or a tokenizer.
    """
    folder, result = Path(out, "out"), {}
    absent = {} if world.first else {"sigmoid": "nowhere", "rows": "nowhere.jsonl", "other": "nowhere.jsonl"}
    here = {"sigmoid": sigmoid, "rows": rows, "other": other} | absent
    fraction = configured(here["sigmoid"], here["rows"], folder)
    given = configured(
        here["sigmoid"],
        here["rows"],
        folder,
        "data.eval_fraction=null",
        f"data.eval=[{{path: {here['other']}, weight: 0.5}}]",
    )
    result["fraction"] = described(read(fraction, folder, world), steps=3)
    result["given"] = described(read(given, folder, world), steps=3)
    world.wait()  # the last one to have read has deleted the file of the rows
    result["files"] = sorted(path.name for path in folder.iterdir())

    for name, path, method, accumulation in (
        ("bias", sigmoid, BiasUpdate, 3),  # a process has no rows for its second pass
        ("auxiliary", softmax, AuxiliaryLoss, 4),
    ):
        config = configured(here["sigmoid"], here["rows"], folder, f"train.gradient_accumulation={accumulation}")
        data, model = read(config, folder, world), balanced(path, method, world)
        assert data.held_out is not None
        measured = two_steps(model, data, world)
        tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()
        if world.first:
            save_file(tensors, str(Path(out, f"{name}.safetensors")))
        loss = held_out_loss(model, data.held_out, CPU, world=world)
        result[name] = {"measured": measured, "digest": digest, "held_out": loss}

    done: list[int] = []
    stopped = held_out_loss(model, data.held_out, CPU, lambda: not world.first and len(done) == 1, done.append, world)
    result["stopped"] = [stopped, done, len(data.held_out)]
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        held_out_loss(model, map(without_labels, data.held_out), CPU, world=world)
    except NibbleError as error:
        result["unlabelled"] = [str(error), len(passes)]
    return result


def without_labels(batch: Batch) -> Batch:
    return replace(batch, labels=torch.full_like(batch.labels, IGNORED), labelled=0)
