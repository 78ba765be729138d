"""Every kernel = its torch form in its own trials, which a run does on its device before it uses a kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import quant.kernels.dequantise
import quant.kernels.grouped
import quant.kernels.rounding
import quant.kernels.side_by_side  # noqa: F401
from models.kernels import (  # noqa: F401
    delta_chunks,
    delta_gates,
    delta_gradients,
    delta_inside,
    delta_scan,
    expert_rows,
    gates,
    latent_keys,
    rms_norm,
    rotary,
    router,
    short_conv,
)
from quant.kernels.choice import KERNELS, Arguments

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_its_torch_form(name: str) -> None:
    assert KERNELS[name].failure(CPU) is None


@pytest.mark.parametrize("name", KERNELS)
def test_another_result_is_told(name: str) -> None:
    """A kernel that leaves a value out: every output has to be compared, in every trial."""
    kernel = KERNELS[name]
    for number, (_, outputs) in enumerate(kernel.trials(CPU)):
        for changed in (name for name, output in outputs.items() if output.numel()):

            def almost(*inputs: Any, changed: str = changed, **given: torch.Tensor) -> None:
                kernel.reference(*inputs, **given)
                last = (-1,) * given[changed].dim()
                given[changed][last] += 1 + given[changed].abs().max()

            def only(device: torch.device, number: int = number) -> Iterator[Arguments]:
                yield from itertools.islice(kernel.trials(device), number, number + 1)

            told = replace(kernel, run=almost, trials=only).failure(CPU)
            assert told is not None and "differs" in told, (number, changed)
