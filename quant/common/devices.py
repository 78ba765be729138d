"""Which of two ways a computation takes: the CPU's or the accelerator's, and how its inputs get there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def on_cpu(device: torch.device) -> bool:
    """Whether what lies on `device` is computed the CPU's way. Every choice of a way of computing asks this.

    Any other device takes the accelerator's way, meta too: a step on meta tensors then shows an accelerator's
    operations and memory (`python -m benchmarks.launches`), and fails where the host would wait for the device.
    What belongs to CUDA itself (its memory, streams, backends, kernels of libraries) asks for "cuda".
    """
    return device.type == "cpu"


def without_waiting(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor.to(device)`. A copy from host memory to CUDA is queued like a kernel: from memory that isn't pinned the
    host would wait until the device has done all that was queued before.
    """
    if tensor.device.type == "cpu" and str(device).startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
