"""Which of two ways a computation takes: the CPU's or the accelerator's, and how its inputs get there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_cpu_is_cpu = [True]  # the last counts


def on_cpu(device: torch.device) -> bool:
    """Whether what lies on `device` is computed the CPU's way. Every choice of a way of computing asks this.

    Any other device takes the accelerator's way, meta too: a step on meta tensors then shows an accelerator's
    operations and memory (`python -m benchmarks.launches`), and fails where the host would wait for the device.
    What belongs to CUDA itself (its memory, streams, backends, kernels of libraries) asks for "cuda".
    """
    return device.type == "cpu" and _cpu_is_cpu[-1]


@contextmanager
def cpu_as_accelerator() -> Iterator[None]:
    """Within it what lies on the CPU is computed the accelerator's way, to time the host (`python -m benchmarks.host`).

    Only for what the CPU's libraries can do: no variable-length attention, no 4-bit storage.
    """
    _cpu_is_cpu.append(False)
    try:
        yield
    finally:
        _cpu_is_cpu.pop()


def without_waiting(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor.to(device)`. A copy from host memory to CUDA is queued like a kernel: from memory that isn't pinned the
    host would wait until the device has done all that was queued before.
    """
    if _crosses(tensor, device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def copy_without_waiting(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """`target.copy_(tensor)`, likewise."""
    if _crosses(tensor, target.device):
        target.copy_(tensor.pin_memory(), non_blocking=True)
    else:
        target.copy_(tensor)


def _crosses(tensor: torch.Tensor, device: torch.device | str) -> bool:
    return tensor.device.type == "cpu" and str(device).startswith("cuda")


def allowed_cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
