"""Optimisers and gradient clipping. The optimiser's state in checkpoints: train/state/optimizer_state.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.parts import Cut
from quant.common.devices import without_waiting
from quant.common.errors import NibbleError
from train.blockwise import BlockwiseAdamW

NAMES = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")

# Tensors of fewer values have float32 states in bitsandbytes' 8-bit optimisers.
_MIN_8BIT_SIZE = 4096


class NonFiniteError(NibbleError):
    """The loss or a gradient is infinite or not a number; raised before any weight is touched."""


def build_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    parts: Mapping[str, Cut] | None = None,
    seed: int = 0,
) -> Optimizer:
    """AdamW over the parameters that require a gradient; weight decay (decoupled) on matrices and stacks of them only.

    named_parameters: what this process holds of each; empty parts are left out. parts: of a model that is cut over
    processes, by name, which parts of what these are, where they aren't whole. With None all are whole and nobody
    else's memory, and bitsandbytes' optimisers move the small ones together (train/blockwise.py).

    `adamw` keeps both moments in float32. It is torch's fused AdamW when all parameters are float32. Torch would keep
    the moments of a bfloat16 parameter in bfloat16, where the second one stops moving (it changes by 0.1 % a step, half
    of what bfloat16 resolves); those runs take bitsandbytes' 32-bit AdamW, the same formula in float32.
    `adamw_8bit` (bitsandbytes) keeps both moments in 8 bits with one scale per 256 values, tensors of fewer than 4096
    values in float32 (whatever the size of this process's part). `paged_…` are the same with states in memory that CUDA
    moves to the host under pressure.

    All compute the update of a bfloat16 parameter in float32 and round what comes out stochastically, with random bits
    from `seed`: the same for the same seed, step and value of the whole model, however it is cut.

    Raises NibbleError for an unknown name, a paged optimiser without CUDA and for nothing to train.
    """
    trained = [(key, parameter) for key, parameter in named_parameters if parameter.requires_grad]
    if name not in NAMES:
        raise NibbleError(f"train.optimizer: '{name}' is unknown. Choose one of {', '.join(NAMES)}.")
    if not trained:
        raise NibbleError(
            "nothing to train: no parameter requires a gradient. Set adapter.targets, or adapter.kind: none."
        )
    held = [(key, parameter) for key, parameter in trained if parameter.numel()]
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in held if pair[1].ndim >= 2], "weight_decay": weight_decay},
        {"params": [pair for pair in held if pair[1].ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]] or [{"params": [], "param_names": []}]
    options: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps}
    if name == "adamw" and all(parameter.dtype == torch.float32 for _, parameter in trained):
        return torch.optim.AdamW(groups, fused=True, **options)

    for device in {parameter.device for _, parameter in trained}:
        require_device(name, device)
    from quant.fourbit import import_bitsandbytes  # slow to import, and not needed for the common case

    library = import_bitsandbytes().optim
    classes = {
        "adamw": library.AdamW,
        "adamw_8bit": library.AdamW8bit,
        "paged_adamw": library.PagedAdamW,
        "paged_adamw_8bit": library.PagedAdamW8bit,
    }
    optimizer = classes[name](groups, **options)
    _allocate_states(library.GlobalOptimManager.get_instance(), optimizer, parts or {})
    return BlockwiseAdamW(optimizer, parts is None, _numbers(trained, parts or {}), seed)


def _numbers(trained: Sequence[tuple[str, nn.Parameter]], parts: Mapping[str, Cut]) -> dict[str, int]:
    """The number of each parameter's first value among all that are trained, on whatever processes. A part along the
    first dimension has the numbers that it has in the whole; one along another has its own, as if parts were stacked.
    """
    numbers, first = {}, 0
    for name, parameter in trained:
        size, numbers[name] = parameter.numel(), first
        if (cut := parts.get(name)) is not None:
            size = math.prod(cut.shape)
            numbers[name] += size // cut.shape[cut.dim] * cut.start
        first += size
    return numbers


def _allocate_states(manager: Any, optimizer: Any, parts: Mapping[str, Cut]) -> None:
    """Allocate bitsandbytes' states, in 8 bits also for small parts of large tensors: the arithmetic is that of one
    process, and a tensor's state has one dtype on all processes.

    manager: bitsandbytes' own, of settings by parameter. It is one for all optimisers of a process and knows parameters
    by their id() for ever, so that it would mistake a later tensor for one that was freed: a setting is taken out again
    when the state, which alone depends on it, is there.
    """
    for name, parameter, group, place in parameters_of(optimizer):
        if name in parts and parameter.numel() < _MIN_8BIT_SIZE <= math.prod(parts[name].shape):
            manager.override_config(parameter, "min_8bit_size", 0)
        optimizer.init_state(group, parameter, *place)
        manager.pid2config.pop(id(parameter), None)


def parameters_of(optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any], tuple[int, int]]]:
    """Name, parameter, its group, and its place (group, index) in the optimiser."""
    for i, group in enumerate(optimizer.param_groups):
        for j, (name, parameter) in enumerate(zip(group["param_names"], group["params"], strict=True)):
            yield name, parameter, group, (i, j)


def require_device(name: str, device: torch.device) -> None:
    """Raises NibbleError when the optimiser `name` can't work on `device`."""
    if name.startswith("paged_") and device.type != "cuda":
        raise NibbleError(
            f"train.optimizer: {name} needs CUDA (it pages its state between GPU and host); this run is on"
            f" {device.type}.\nUse {name.removeprefix('paged_')}, or train.device: cuda."
        )


def check_loss(loss: float, step: int) -> None:
    """Raises NonFiniteError when the loss of `step` is infinite or not a number."""
    if not math.isfinite(loss):
        raise NonFiniteError(_non_finite(step, "the loss", loss))


@dataclass(frozen=True)
class Measured:
    """norms: 2-norms of the gradients, float32 [number of parameters], on the device. norm: of all together."""

    norms: Tensor
    norm: float
    loss: float


def measure_gradients(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    loss: Tensor | None = None,
    *,
    total: Callable[[Tensor], Tensor] | None = None,
    replicated: Collection[str] = (),
) -> Measured:
    """The norms of all gradients, and the value of `loss`, a scalar. Waits for the device once.

    The norms of bfloat16 gradients are float32. On several processes the parameters are the parts that this one holds,
    of the same names in the same order on all.
    total: sums a tensor (the parts' squared norms, float64) over the processes that hold one copy of the model
    together. replicated: names of those that every process holds whole, which count once.
    """
    parameters = list(named_parameters)
    device = parameters[0][1].device if parameters else torch.device("cpu")
    zero = torch.zeros((), device=device)
    present = {i: p.grad for i, (_, p) in enumerate(parameters) if p.grad is not None and p.grad.numel()}
    if present:
        found = dict(zip(present, torch._foreach_norm(list(present.values()), 2, dtype=torch.float32), strict=True))
        norms = torch.stack([found.get(i, zero).to(device) for i in range(len(parameters))])
    else:
        norms = zero.expand(len(parameters))
    # The norms are float32's; their squares may be larger than float32 can hold.
    squares = norms.double().square()
    if total is not None and parameters:
        alone = without_waiting(torch.tensor([name in replicated for name, _ in parameters]), device)
        squares = torch.where(alone, squares, total(squares.masked_fill(alone, 0.0)))
        norms = squares.sqrt().float()
    # In float32, as the gradients are: what overflows there is not finite.
    norm = squares.sum().sqrt().float()
    loss = zero if loss is None else loss.float()
    return Measured(norms, *torch.stack((norm.to(loss.device), loss)).tolist())


def clip_gradients(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    max_norm: float | None,
    step: int,
    *,
    total: Callable[[Tensor], Tensor] | None = None,
    replicated: Collection[str] = (),
    measured: Measured | None = None,
) -> float:
    """The 2-norm of all gradients together; scales them down so that it is at most `max_norm`.

    Same as torch.nn.utils.clip_grad_norm_, but with the norm of bfloat16 gradients in float32, and it raises
    NonFiniteError naming the first tensor whose gradient's norm is infinite or not a number. `max_norm` None only
    measures. measured, total and replicated: of `measure_gradients`, which is called where `measured` is None and waits
    for the device once.
    """
    parameters = list(named_parameters)
    measured = measured or measure_gradients(parameters, total=total, replicated=replicated)
    if not math.isfinite(measured.norm):
        norms = measured.norms.tolist()
        # Each norm may be finite and their sum of squares not: then the largest is named.
        first = next((i for i, norm in enumerate(norms) if not math.isfinite(norm)), norms.index(max(norms)))
        raise NonFiniteError(_non_finite(step, f"the gradient of {parameters[first][0]}", norms[first]))
    gradients = [parameter.grad for _, parameter in parameters if parameter.grad is not None]
    if max_norm is not None and measured.norm > max_norm and gradients:
        torch._foreach_mul_(gradients, max_norm / (measured.norm + 1e-6))
    return measured.norm


def _non_finite(step: int, what: str, value: float) -> str:
    return (
        f"step {step}: {what} is not finite ({value}). No weight was changed in this step.\n"
        "Lower train.learning_rate or lengthen train.warmup_ratio, and look at the rows of this step."
    )
