"""Which of two ways a computation takes: the CPU's or the accelerator's, and how its inputs get there."""

from __future__ import annotations

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
    return _pinned(tensor, device).to(device, non_blocking=True)


def copy_without_waiting(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """`target.copy_(tensor)`, likewise."""
    target.copy_(_pinned(tensor, target.device), non_blocking=True)


def _pinned(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" and str(device).startswith("cuda") else tensor
