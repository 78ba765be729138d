"""Which kernels this process uses: those that have shown on its device that they compute what torch's forms compute.

Nothing is used until `use` says so (models/use_kernels.py tries them first), so that a kernel that does not compile, or
computes something else on a card that nobody has tried, costs a message and speed, never a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.common.devices import on_cpu
from quant.common.errors import in_one_line
from quant.kernels.language import INTERPRETED, is_recording

Arguments = tuple[tuple[Any, ...], dict[str, Tensor]]  # of an operator: the inputs, and the outputs by name


@dataclass(frozen=True)
class Kernel:
    """An operator `nibble::name` that writes into the tensors it is given.

    schema: its arguments as torch's library writes them, outputs after a star. run: launches the Triton kernel.
    reference: the same in torch's operations. trials: small arguments at random, on a device. tolerance: of a trial,
    relative to the largest value of the reference; 0 asks for the same bits. tolerance_16_bit: of a trial with an
    input or output of 16 bits, where that is more.
    """

    name: str
    schema: str
    run: Callable[..., None]
    reference: Callable[..., None]
    trials: Callable[[torch.device], Iterable[Arguments]]
    tolerance: float
    tolerance_16_bit: float = 0.0

    def __call__(self, *inputs: Any, **outputs: Tensor | None) -> None:
        # Where nobody watches the operators, torch's dispatcher would only cost the host a third of a launch.
        first = inputs[0] if isinstance(inputs[0], Tensor) else inputs[0][0]
        if first.is_cuda or (first.is_cpu and is_recording()):
            self.run(*inputs, **outputs)
        else:
            getattr(torch.ops.nibble, self.name).default(*inputs, **outputs)

    def failure(self, device: torch.device) -> str | None:
        """What is wrong with the kernel on `device`, by its trials, or None."""
        for number, (inputs, outputs) in enumerate(self.trials(device)):
            right = {name: tensor.clone() for name, tensor in outputs.items()}
            try:
                self.run(*inputs, **outputs)
                self.reference(*inputs, **right)
                worst = max(_difference(outputs[name], right[name]) for name in outputs)
            except Exception as error:  # noqa: BLE001  whatever a compiler or a driver raises
                return in_one_line(error)
            # Triton's interpreter cuts float32 off where bfloat16 ends, and multiplies no bfloat16 at all.
            cut = INTERPRETED and any(tensor.dtype == torch.bfloat16 for tensor in outputs.values())
            given = [value for value in (*inputs, *outputs.values()) if isinstance(value, Tensor)]
            half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in given)
            tolerance = max(self.tolerance, self.tolerance_16_bit if half else 0.0, 2**-7 if cut else 0.0)
            if not worst <= tolerance:
                return f"trial {number} differs from torch's form by {worst:.1e} of its largest value"
        return None


def _difference(given: Tensor, right: Tensor) -> float:
    """The largest difference relative to the largest value; infinite where only one of them is a number."""
    given, right = given.double(), right.double()
    if not torch.equal(given.isfinite(), right.isfinite()):
        return float("inf")
    given, right = given.nan_to_num(0, 0, 0), right.nan_to_num(0, 0, 0)
    largest = float(right.abs().max()) if right.numel() else 0.0
    return float((given - right).abs().max()) / max(largest, 1e-30) if right.numel() else 0.0


KERNELS: dict[str, Kernel] = {}
# Of the whole process: autograd computes CUDA's gradients in threads of its own, which see no context variable.
_used: set[str] = set()
_library = torch.library.Library("nibble", "DEF")


def kernel(
    name: str,
    schema: str,
    *,
    run: Callable[..., None],
    reference: Callable[..., None],
    trials: Callable[[torch.device], Iterable[Arguments]],
    tolerance: float,
    tolerance_16_bit: float = 0.0,
) -> Kernel:
    """Defines the operator `nibble::name`. On the meta device it computes nothing; recorded, it says its launches."""
    made = KERNELS[name] = Kernel(name, schema, run, reference, trials, tolerance, tolerance_16_bit)

    def on_meta(*inputs: Any, **outputs: Tensor) -> None:
        if is_recording():
            run(*inputs, **outputs)

    _library.define(f"{name}{schema}")
    _library.impl(name, run, "CUDA")
    _library.impl(name, run, "CPU")
    _library.impl(name, on_meta, "Meta")
    return made


def uses(made: Kernel, device: torch.device) -> bool:
    """Whether what lies on `device` is computed by this kernel, and else in torch's operations."""
    return made.name in _used and (INTERPRETED or not on_cpu(device))


def use(names: Iterable[str]) -> None:
    """These kernels from now on, and no others: those that were right when they were tried on the device."""
    _used.clear()
    _used.update(names)


@contextmanager
def using(names: Iterable[str]) -> Iterator[None]:
    """Within it these kernels are used and no others, tried or not: for tests, and to count a step's launches."""
    before = set(_used)
    use(names)
    try:
        yield
    finally:
        use(before)
