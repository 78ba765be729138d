"""Triton, where it is of use, and one way to launch its kernels.

Triton compiles for CUDA without a GPU (`python -m benchmarks.kernels`) and runs on a CPU under TRITON_INTERPRET=1, both
of which take the launches from here. Nothing imports Triton on a machine that has neither, since that takes 0.3 s.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Who compiles without a GPU has imported it before.
_USED = torch.cuda.is_available() or INTERPRETED or "triton" in sys.modules
AVAILABLE = _USED and find_spec("triton") is not None

if AVAILABLE:
    import triton
    import triton.language as tl

    jit = triton.jit
else:

    class _Absent:
        """Stands for triton.language in annotations and default values; nothing is launched."""

        def __getattr__(self, name: str) -> Any:
            return self

    tl = _Absent()

    def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return function or (lambda given: given)


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded. arguments: by position; constants: what the kernel is compiled for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass
class _Recording:
    capability: tuple[int, int]
    launches: list[Launch]


_recordings: list[_Recording] = []


@contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Within it launches are kept instead of done, as they would be on a device of this compute capability."""
    _recordings.append(_Recording(capability, []))
    try:
        yield _recordings[-1].launches
    finally:
        _recordings.pop()


def is_recording() -> bool:
    return bool(_recordings)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    warps: int = 4,
    stages: int = 3,
    fuse: bool = True,
    **constants: Any,
) -> None:
    """kernel[grid](*arguments, **constants). fuse: whether a·b + c may be rounded once (a fused multiply-add)."""
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fuse}
    if _recordings:
        _recordings[-1].launches.append(Launch(kernel, grid, arguments, constants, options))
    else:
        kernel[grid](*arguments, **constants, **options)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that a launch is for; that of an H100 where nothing depends on it."""
    if _recordings:
        return _recordings[-1].capability
    return _capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def blocks(total: int, block: int) -> int:
    """How many blocks of `block` hold `total`."""
    return -(-total // block)


def power_of_two(number: int, least: int = 1) -> int:
    """The next power of two from `number` on, at least `least`: a size that Triton's blocks can have."""
    return max(least, 1 << max(number - 1, 0).bit_length())
