"""What a process of `benchmarks.gpu` that trains does, on either side: each case's steps, measured in the same way.

One JSON line on standard output for each case as it ends. A case that runs out of memory says so and the next one goes
on; any other error ends the process, as the device may be unusable, and the command starts another for those left.
Imports torch and what the peer's environment has too.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.gpu_cases import OUT_OF_MEMORY, Case, Request
from benchmarks.measure import reset_peak_memory, synchronise
from parallel.device import choose_device, peak_memory_bytes

Result = dict[str, Any]
Step = Callable[[Tensor], float]  # trains on tokens int64 [sequences, length] and returns the loss


def begin(request: Request) -> torch.device:
    device = choose_device(request.device)
    if device.type != "cuda":
        return device
    torch.cuda.set_device(device)
    if request.memory_limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, request.memory_limit * 2**30 / total), device)
    return device


def answer(cases: Sequence[Case], device: torch.device, measure: Callable[[Case], Result]) -> None:
    """Prints what `measure` finds for each case, which leaves nothing behind but the model."""
    for case in cases:
        found: Result | None = None
        with contextlib.suppress(torch.OutOfMemoryError):  # the error, which holds what the case made, is gone below
            found = measure(case)
        print(json.dumps({"result": found, "reason": "" if found else OUT_OF_MEMORY}), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_steps(
    device: torch.device, request: Request, case: Case, vocabulary: int, step: Step, optimizer: Optimizer
) -> tuple[Result, Callable[[], None]]:
    """Seconds, memory and the update's milliseconds of `step`; and what takes one more."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    generator = torch.Generator(device).manual_seed(1)
    update = _Stopwatch(device)
    hooks = [optimizer.register_step_pre_hook(update.start), optimizer.register_step_post_hook(update.stop)]
    seconds, losses = [], []

    def one() -> None:
        shape = (case.sequences, case.length)
        tokens = torch.randint(0, vocabulary, shape, generator=generator, device=device)
        losses.append(step(tokens))

    reset_peak_memory(device)
    for number in range(request.warmup + request.steps):
        synchronise(device)
        began = time.perf_counter()
        one()
        synchronise(device)
        if number >= request.warmup:
            seconds.append(time.perf_counter() - began)
    found: Result = {
        "trainable": sum(parameter.numel() for parameter in trained),
        "trainable_dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trained})),
        "tensors": len(trained),
        "optimizer": type(optimizer).__name__,
        "seconds": seconds,
        "tokens_per_second": case.sequences * case.length / statistics.median(seconds),
        "update_ms": statistics.median(update.milliseconds()[request.warmup :]),
        "peak": peak_memory_bytes(device),
        "reserved": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
        "in_use": _in_use(device),
        "losses": losses,
    }
    for hook in hooks:
        hook.remove()
    return found, one


def learning_tensors(optimizer: Optimizer, one_step: Callable[[], None]) -> int:
    """How many of those that are trained have a gradient other than zero in the next step. (Not in the first one: B
    starts at zero and gives A none.)
    """
    found = 0

    def look(*given: Any) -> None:
        nonlocal found
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        found = sum(gradient is not None and bool(gradient.any()) for gradient in gradients)

    hook = optimizer.register_step_pre_hook(look)
    one_step()
    hook.remove()
    return found


class _Stopwatch:
    """Milliseconds between a start and a stop: on CUDA by events, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def start(self, *given: Any) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(1e3 * time.perf_counter())

    stop = start

    def milliseconds(self) -> list[float]:
        synchronise(self.device)
        pairs = zip(self.marks[::2], self.marks[1::2], strict=True)
        return [a.elapsed_time(b) if self.device.type == "cuda" else b - a for a, b in pairs]


def _in_use(device: torch.device) -> int:
    """Bytes of the device that are taken, the CUDA context and other processes included."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
