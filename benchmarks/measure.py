"""What both sides' processes measure, in the same way: seconds and memory of training steps on CPU.

Imports torch and the device helpers only: the peer's environment has no more of this project's needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.setting import Request
from parallel.device import peak_memory_bytes

CPU = torch.device("cpu")


@dataclass
class Measured:
    """What one process found. Seconds per measured step; losses and gradient norms of all steps, warm-up included.

    imports: resident bytes when everything was imported and nothing else done. load_peak, step_peak: the largest
    resident set while the model was built and loaded, and while it was trained. frozen_bytes: of the base's weights
    as stored. trainable: parameters with a gradient; moved: tensors among the `tensors` trained ones that the steps
    changed. matrices: the dtype in which bfloat16 matrices are multiplied (native side only).
    """

    side: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    imports: int = 0
    load_peak: int = 0
    step_peak: int = 0
    load_seconds: float = 0.0
    frozen_bytes: int = 0
    parameters: int = 0
    trainable: int = 0
    trainable_dtype: str = ""
    tensors: int = 0
    moved: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Peak resident bytes of the whole run above the imports."""
        return max(self.load_peak, self.step_peak) - self.imports

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def reset_peak_memory(device: torch.device) -> bool:
    """Count the peak from what is in use now; False where the system does not allow that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): 5 resets VmHWM
    except OSError:
        return False
    return True


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it (the CPU always has)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS")


def begin(side: str, request: Request) -> Measured:
    """Call when everything is imported: sets the number of threads and notes what the imports take."""
    torch.set_num_threads(request.threads)
    measured = Measured(side, versions={"torch": torch.__version__}, imports=resident_bytes())
    reset_peak_memory(CPU)  # imports peak higher than they stay
    return measured


def loaded(measured: Measured, since: float) -> None:
    """Call when the model is ready to train."""
    measured.load_seconds = time.perf_counter() - since
    measured.load_peak = peak_memory_bytes(CPU)
    reset_peak_memory(CPU)


def batch(request: Request, vocabulary: int, step: int) -> Tensor:
    """Tokens int64 [N] of a step: the same on both sides, other ones in every step, so that the routing changes."""
    generator = torch.Generator().manual_seed(request.seed * 1_000_003 + step)
    return torch.randint(0, vocabulary, (request.tokens,), generator=generator)


def run_steps(
    measured: Measured, request: Request, vocabulary: int, step: Callable[[Tensor], tuple[float, float]]
) -> None:
    """`step` trains on tokens [N] and returns loss and gradient norm."""
    for number in range(request.warmup + request.steps):
        tokens = batch(request, vocabulary, number)
        start = time.perf_counter()
        loss, norm = step(tokens)
        seconds = time.perf_counter() - start
        measured.losses.append(loss)
        measured.grad_norms.append(norm)
        if number >= request.warmup:
            measured.seconds.append(seconds)
    measured.step_peak = peak_memory_bytes(CPU)


def note_trained(measured: Measured, parameters: list[Tensor], before: list[Tensor]) -> None:
    """Counts what was trained, and how much of it the steps changed."""
    measured.trainable = sum(parameter.numel() for parameter in parameters)
    measured.trainable_dtype = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    measured.tensors = len(parameters)
    measured.moved = sum(not torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
