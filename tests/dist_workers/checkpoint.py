"""What test_distributed_checkpoint lets several processes do.

Each compares its parts with whole tensors that it computes by itself: a run of one process with the same gradients.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from parallel.mesh import MeshSizes, make_meshes
from parallel.parts import Part, bounds
from parallel.world import World
from quant.common.errors import NibbleError
from train.optim import NonFiniteError, build_optimizer, clip_gradients
from train.state.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from train.state.optimizer_state import OptimizerState, optimizer_state
from train.state.saver import CheckpointSaver

# Name: shape and the dimension that is cut. Above and below the 4096 values from which 8-bit states are kept.
TENSORS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "stack.A": ((8, 16, 64), 0),  # parts begin at a multiple of 256 values
    "odd.A": ((6, 5, 151), 0),  # they don't; four processes hold 2, 2, 2 and none
    "columns.A": ((48, 96), 1),
    "small.A": ((9, 8), 0),
    "norm.weight": ((100,), 0),
    "whole.A": ((70, 64), None),
}
ALIGNED = ("stack.A", "small.A", "norm.weight", "whole.A")
LATER = 3  # steps after the checkpoint


def whole_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, (shape, _) in TENSORS.items()}


def whole_gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in TENSORS.items()}


@dataclass
class Run:
    """Parameters, whole or the parts of one process, and their optimiser."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    parts: dict[str, Part]

    def steps(self, steps: range) -> Run:
        for step in steps:
            for name, gradient in whole_gradients(step).items():
                self.parameters[name].grad = self.part(name, gradient).clone()
            self.optimizer.step()
        return self

    def part(self, name: str, whole: Tensor) -> Tensor:
        return self.parts[name].of(whole) if name in self.parts else whole

    def state(self) -> OptimizerState:
        return optimizer_state(self.optimizer, self.parts)

    def save(self, directory: str, step: int, world: World) -> Path:
        saver = CheckpointSaver(Path(directory), 2, world=world)
        saver.save(step, self.parameters, self.state(), {"fingerprint": {}, "from": world.rank}, self.parts)
        return Path(directory, f"step-{step:06d}")

    def load(self, checkpoint: Checkpoint) -> Run:
        checkpoint.load_tensors(self.parameters.items(), self.parts)
        checkpoint.load_optimizer(self.optimizer, self.parts)
        return self

    def differences(self, other: Run) -> dict[str, float]:
        """Of every parameter the largest difference to `other`'s, whose parameters are whole, relative to its largest
        value; 0 where all bits are the same."""
        result = {}
        for name, parameter in self.parameters.items():
            whole = other.parameters[name].detach()
            ours, theirs = parameter.detach(), self.part(name, whole)
            result[name] = 0.0 if torch.equal(ours, theirs) else float((ours - theirs).abs().max() / whole.abs().max())
        return result


def whole_run(optimizer: str) -> Run:
    parameters = whole_parameters()
    return Run(parameters, build_optimizer(optimizer, parameters.items(), 0.01, weight_decay=0.1), {})


def cut_run(optimizer: str, world: World, replicate: int = 1) -> Run:
    meshes = make_meshes(MeshSizes(replicate, 1, world.size // replicate), torch.device("cpu"))
    parts = {}
    for name, (shape, dim) in TENSORS.items():
        if dim is not None:
            start, stop = bounds(shape[dim], meshes.sizes.parts, meshes.part)
            parts[name] = Part(shape, dim, start, stop, meshes.dense, (Replicate(), Shard(dim)))
    whole = whole_parameters()
    parameters = {
        name: nn.Parameter((parts[name].of(parameter) if name in parts else parameter).detach().clone())
        for name, parameter in whole.items()
    }
    return Run(parameters, build_optimizer(optimizer, parameters.items(), 0.01, weight_decay=0.1, parts=parts), parts)


def wipe(run: Run) -> Run:
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter.zero_()
    return run


# ------------------------------------------------------------------------------------------------------ four processes


def save_and_go_on(world: World, folder: str, optimizer: str) -> dict[str, Any]:
    """3 steps, a checkpoint, LATER more; and from the checkpoint, LATER more. Differences to one process's numbers."""
    run, expected = cut_run(optimizer, world).steps(range(3)), whole_run(optimizer).steps(range(3))
    saved = run.differences(expected)
    path = run.save(f"{folder}/{optimizer}", 3, world)
    run.steps(range(3, 3 + LATER))
    resumed = wipe(cut_run(optimizer, world)).load(read_checkpoint(path, world)).steps(range(3, 3 + LATER))
    same = all(torch.equal(run.parameters[name], resumed.parameters[name]) for name in run.parameters)
    return {
        "saved": saved,
        "later": run.differences(expected.steps(range(3, 3 + LATER))),
        "resumed_is_the_same": same,
        "dtypes": {name: str(tensor.dtype) for name, tensor in run.state().tensors.items()},
    }


def four(world: World, folder: str) -> dict[str, Any]:
    return {
        "adamw": save_and_go_on(world, folder, "adamw"),
        "adamw_8bit": save_and_go_on(world, folder, "adamw_8bit"),
        "resumed": resume(world, folder, ["alone_adamw", "alone_adamw_8bit"]),
        "replicas": replicas(world, folder),
        "async": in_the_background(world, folder),
        "clip": clipping(world),
        "errors": errors(world, folder),
    }


def resume(world: World, folder: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """From the checkpoints folder/name of step 3, written by other numbers of processes, LATER steps.

    as_fresh: the parameters that are those of an optimiser that starts from the saved weights.
    """
    result = {}
    for name in names:
        optimizer = name.removeprefix("alone_")
        checkpoint = latest_checkpoint(Path(folder) / name, world=world)
        assert checkpoint is not None
        assert checkpoint.state["from"] == 0
        fresh, run = (wipe(cut_run(optimizer, world)) for _ in range(2))
        for each in (fresh, run):
            checkpoint.load_tensors(each.parameters.items(), each.parts)
        reset = checkpoint.load_optimizer(run.optimizer, run.parts)
        read = run.differences(whole_run(optimizer).steps(range(3)))
        assert name.startswith("alone") or all(value == 0 for key, value in read.items() if key in ALIGNED), read
        expected = whole_run(optimizer).steps(range(3 + LATER))
        for each in (fresh, run):
            each.steps(range(3, 3 + LATER))
        same = [key for key, tensor in run.parameters.items() if tensor.numel() and tensor.equal(fresh.parameters[key])]
        result[name] = {"reset": reset, "as_fresh": same, "later": run.differences(expected)}
    return result


def replicas(world: World, folder: str) -> dict[str, Any]:
    """Two copies of the model, each in two parts: everything is written once."""
    run = cut_run("adamw_8bit", world, replicate=2).steps(range(3))
    path = run.save(f"{folder}/replicas", 3, world)
    loaded = wipe(cut_run("adamw_8bit", world, replicate=2)).load(read_checkpoint(path, world))
    return loaded.differences(whole_run("adamw_8bit").steps(range(3)))


def in_the_background(world: World, folder: str) -> dict[str, Any]:
    """What is saved is the state of the moment of saving, though the steps go on."""
    directory = Path(folder) / "async"
    run = cut_run("adamw_8bit", world)
    with CheckpointSaver(directory, 1, world=world, asynchronous=True) as saver:
        for step in range(3):
            run.steps(range(step, step + 1))
            saver.save(step + 1, run.parameters, run.state(), {"step": step + 1}, run.parts)
            # Goes on, with messages of its own, while the checkpoint is written.
            world.sum(torch.ones(1000))
            run.steps(range(10, 12))
            saver.wait()
            checkpoint = latest_checkpoint(directory, world=world)
            assert checkpoint is not None
            assert checkpoint.step == checkpoint.state["step"] == step + 1
            run = wipe(cut_run("adamw_8bit", world)).load(checkpoint)
    last = latest_checkpoint(directory, world=world)
    assert last is not None
    run = wipe(run).load(last)
    return run.differences(whole_run("adamw_8bit").steps(range(3)))


def clipping(world: World) -> dict[str, Any]:
    run, whole = cut_run("adamw", world), whole_run("adamw")
    for name, gradient in whole_gradients(0).items():
        run.parameters[name].grad = run.part(name, gradient).clone()
        whole.parameters[name].grad = gradient
    named = list(run.parameters.items())
    run.parameters["norm.weight"].grad = None if world.rank == 3 else run.parameters["norm.weight"].grad
    if world.rank != 3:
        start = run.parts["norm.weight"].start
        assert start < 75
    whole_norm = whole.parameters["norm.weight"].grad
    assert whole_norm is not None
    whole_norm[75:] = 0  # rank 3 has no gradient there
    expected = float(torch.nn.utils.clip_grad_norm_(whole.parameters.values(), 0.5))
    norm = clip_gradients(named, 0.5, 1, total=world.sum, replicated={"whole.A"})
    clipped = all(
        parameter.grad is None
        or torch.allclose(parameter.grad, run.part(name, _gradient(whole, name)), rtol=1e-6, atol=0)
        for name, parameter in named
    )
    if world.rank == 1:
        _gradient(run, "columns.A")[0, 0] = float("nan")
    message = ""
    try:
        clip_gradients(named, 0.5, 7, total=world.sum, replicated={"whole.A"})
    except NonFiniteError as error:
        message = str(error).partition("\n")[0]
    return {"norm": norm, "expected": expected, "clipped": clipped, "message": message}


def _gradient(run: Run, name: str) -> Tensor:
    gradient = run.parameters[name].grad
    assert gradient is not None
    return gradient


def errors(world: World, folder: str) -> dict[str, str]:
    """What every process says when something is wrong on one of them."""
    run = cut_run("adamw", world).steps(range(1))
    directory, messages = f"{folder}/errors", {}
    path = run.save(directory, 1, world)

    with CheckpointSaver(Path(directory), 2, world=world, asynchronous=True) as saver:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # writing past it fails as on a full disk
        messages["full disk"] = _error(lambda: run.save(directory, 2, world))
        saver.save(2, run.parameters, run.state(), {}, run.parts)
        messages["full disk in the background"] = _error(saver.wait)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoint = read_checkpoint(path, world)

    others = {name: parameter for name, parameter in run.parameters.items() if name != "small.A"}
    messages["names"] = _error(lambda: checkpoint.load_tensors(others.items(), run.parts))
    halves = {name: parameter.half() for name, parameter in run.parameters.items()}
    messages["dtype"] = _error(lambda: checkpoint.load_tensors(halves.items(), run.parts))
    shape = dict(run.parts)
    shape["stack.A"] = Part((8, 8, 64), 0, 0, 2, shape["stack.A"].mesh, shape["stack.A"].placements)
    messages["shape"] = _error(lambda: checkpoint.load_tensors(run.parameters.items(), shape))
    messages["state shape"] = _error(lambda: checkpoint.load_optimizer(run.optimizer, shape))

    damaged = next((path / "weights").glob("shard-00003-*"))
    world.wait()
    if world.first:
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    world.wait()
    messages["damaged"] = _error(lambda: read_checkpoint(path, world))
    messages["none usable"] = _error(lambda: latest_checkpoint(Path(directory), world=world))
    messages["not there"] = _error(lambda: read_checkpoint(Path(directory) / "step-000009", world))
    return messages


def _error(action: Any) -> str:
    try:
        action()
    except NibbleError as error:
        return str(error)
    return "no error"
