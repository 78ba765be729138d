"""The device of a run: choice, name and peak memory."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from models.use_kernels import use_kernels
from parallel.world import World
from quant.choices import named_device
from quant.common.errors import NibbleError


def choose_device(name: str | None = None, local_rank: int | None = None) -> torch.device:
    """The device called `name`, see `named_device`; for None CUDA where there is one, else the CPU.

    local_rank: of one of several processes on this machine; each takes the GPU of that number.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda:"):
        raise NibbleError(
            f"device '{name}' with several processes: each takes a GPU of its own.\nUse device cuda (train.device: "
            "cuda), and choose among the GPUs with CUDA_VISIBLE_DEVICES."
        )
    if local_rank is not None and name == "cuda":
        name = f"cuda:{local_rank}"
    return named_device(name)


def choose_kernels(device: torch.device, wanted: str, world: World, note: Callable[[str], None]) -> None:
    """`use_kernels`: one process of each machine tries them, and the others wait for what it finds."""
    if world.local_rank == 0:
        use_kernels(device, wanted)
    if device.type != "cuda":
        return
    world.wait(note, "try the kernels")
    if world.local_rank > 0:
        use_kernels(device, wanted, first=False)


def device_name(device: torch.device) -> str:
    """The manufacturer's name: "NVIDIA H100 80GB HBM3", or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "CPU"


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far, in bytes.

    On CUDA: what torch's allocator held for tensors on that device since the start or the last reset. On the CPU: the
    largest resident set of this process (imports and mapped files included).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
