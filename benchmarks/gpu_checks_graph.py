"""A micro-batch's pass that is recorded as a CUDA graph and replayed, against usual passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_checks_models import NF4, TINY, everywhere, tiny_model
from benchmarks.gpu_compare import BFLOAT16_MODEL, NEEDS_CUDA, Check, Group, compare, compare_each_norm
from models.adapters.lora import trainable_parameters
from models.attention.fla import uses_fla

LENGTH, SEQUENCES, STEPS = 64, 4, 6


def groups() -> list[Group]:
    found = [(f"{model_type}, CUDA graph", functools.partial(replayed, model_type)) for model_type in TINY]
    return [*found, ("CUDA graph that fails", recording_fails)]


def replayed(model_type: str, device: torch.device) -> Iterator[Check]:
    """Steps on batches of other documents and labels each: whether they were replayed, losses, LoRA afterwards."""
    name = f"{model_type}, bfloat16, passes replayed"
    if device.type != "cuda":
        yield Check(name, NEEDS_CUDA, None)
        return
    if model_type == "qwen3_5_moe_text" and uses_fla(device, torch.bfloat16):
        yield Check(name, "flash-linear-attention waits for the device", None)
        return
    losses, trained, notes = _train(model_type, device, graph=True)
    usual_losses, usual, _ = _train(model_type, device, graph=False)
    yield Check(name, "; ".join(notes), any(note.startswith("passes are replayed") for note in notes))
    yield compare(f"{name}: losses", [(torch.tensor(losses), torch.tensor(usual_losses))], 5e-3)
    yield compare_each_norm(f"{name}: LoRA after {STEPS} steps", list(zip(trained, usual, strict=True)), BFLOAT16_MODEL)


def recording_fails(device: torch.device) -> Iterator[Check]:
    """Steps go on as usual where CUDA ends a recording: on the stream from before, with an allocator that works."""
    name = "glm4_moe_lite, a recording that CUDA ends"
    if device.type != "cuda":
        yield Check(name, NEEDS_CUDA, None)
        return
    from train.graph import CudaRecorder

    class Waiting(CudaRecorder):
        def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
            def waits() -> None:
                work()
                torch.cuda.synchronize()  # which no recording survives

            return super()._capture(waits)

    stream = torch.cuda.current_stream(device)
    losses, trained, notes = _train("glm4_moe_lite", device, graph=True, recorder=Waiting(device))
    torch.cuda.empty_cache()
    usual_losses, usual, _ = _train("glm4_moe_lite", device, graph=False)
    on_it = torch.cuda.current_stream(device) == stream
    yield Check(f"{name}: on the usual stream", "; ".join(notes), on_it and notes[0].startswith("no CUDA graph"))
    yield compare(f"{name}: losses", [(torch.tensor(losses), torch.tensor(usual_losses))], 5e-3)
    yield compare_each_norm(f"{name}: LoRA after {STEPS} steps", list(zip(trained, usual, strict=True)), BFLOAT16_MODEL)


def _train(
    model_type: str, device: torch.device, *, graph: bool, recorder: Any = None
) -> tuple[list[float], list[Tensor], list[str]]:
    """By plain gradient descent, whose steps are proportional to the gradients. recorder: of PassGraph."""
    from parallel.shards import Shards
    from train.data.batches import make_batch
    from train.graph import PassGraph
    from train.loop import training_step

    model = tiny_model(model_type, NF4, torch.bfloat16, device, **everywhere(model_type))
    model.activation_checkpointing = True
    model.train()
    shards, notes = Shards(model), list[str]()
    named = trainable_parameters(model)
    optimizer = torch.optim.SGD([parameter for _, parameter in named], lr=0.1)
    generator = torch.Generator().manual_seed(64)
    size, passes = LENGTH * SEQUENCES, None
    if graph:
        passes = PassGraph(shards, device, tokens=size, longest=LENGTH, note=notes.append, recorder=recorder)
    losses = []
    for number in range(STEPS):
        lengths = [LENGTH - 7, LENGTH, 20 + number, 40 - number, LENGTH]
        tokens = [torch.randint(1, model.vocabulary, (n,), generator=generator).tolist() for n in lengths]
        batch = make_batch([(row, [False] + [True] * (len(row) - 1)) for row in tokens], range(len(lengths)))
        step = training_step(shards, optimizer, [batch], step=number, max_grad_norm=1.0, device=device, graph=passes)
        losses.append(step.loss)
    return losses, [parameter.detach().clone() for _, parameter in named], notes
