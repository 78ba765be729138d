"""How a device's results are held against the CPU's: what a check is, and its tolerances.

Tolerances are relative to the largest expected value of a tensor, or to its 2-norm where it says norm: float32
differs from the CPU by the order of summation; bfloat16 is held against float32 on the same weights, where every
operation may add half a unit of its last place, 2^-9.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_cases import NEEDS_CUDA, NOT_INSTALLED
from models.attention.fla import uses_fla

FLOAT32, BFLOAT16, BFLOAT16_MODEL = 2e-5, 2e-2, 5e-2
DTYPES = ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Check:
    """passed None: could not be tried here, `figure` says why."""

    name: str
    figure: str
    passed: bool | None


# What belongs together: an error inside is one failure, and the other groups go on.
Group = tuple[str, Callable[[torch.device], Iterator[Check]]]


def compare(name: str, pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> Check:
    """Pairs of a result and what it should be."""
    errors = []
    for actual, expected in pairs:
        assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
        actual, expected = actual.detach().to(CPU, torch.float64), expected.detach().to(CPU, torch.float64)
        scale = expected.abs().max().item()
        errors.append((actual - expected).abs().max().item() / scale if scale else float("inf"))
    worst = float("nan") if any(math.isnan(error) for error in errors) else max(errors)
    return Check(name, f"{worst:.1e} of {tolerance:.0e}", worst <= tolerance)


def compare_each_norm(name: str, pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> Check:
    """In the 2-norm of every pair alone."""
    errors = [
        ((actual.detach().to(CPU).double() - right).norm() / right.norm()).item()
        for actual, right in ((actual, expected.detach().to(CPU).double()) for actual, expected in pairs)
    ]
    worst = float("nan") if any(math.isnan(error) for error in errors) else max(errors)
    return Check(name, f"{worst:.1e} of {tolerance:.0e} (norm of the worst)", worst <= tolerance)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def without_flash_linear_attention(device: torch.device) -> str:
    """Why `gated_delta_rule` doesn't take flash-linear-attention's kernels on `device`; "" where it does.

    Raises ImportError for an installation that is there and can't be used: it would be passed over in silence.
    """
    if importlib.util.find_spec("fla") is None:
        return NOT_INSTALLED
    if device.type != "cuda":
        return NEEDS_CUDA
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # noqa: F401

    return "" if uses_fla(device, torch.bfloat16) else "not right here"


def forward_backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output of `function` and the gradients of its inputs for that of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out.device, out.dtype))]
