"""Optimisers, gradient clipping and the optimiser's state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quant.errors import NibbleError

NAMES = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")

# bitsandbytes' tables of the 256 values of an 8-bit state: constants that it makes itself, the same for every tensor.
_CONSTANTS = ("qmap1", "qmap2")


class NonFiniteError(NibbleError):
    """The loss or a gradient is infinite or not a number; raised before any weight is touched."""


@dataclass(frozen=True)
class OptimizerState:
    """What an optimiser remembers. `tensors` is named "<what>.<parameter>" (exp_avg.model…); `values` is JSON."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def build_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """AdamW over the parameters that require a gradient; weight decay (decoupled) on matrices and stacks of them only.

    `adamw` keeps both moments in float32. It is torch's fused AdamW when all parameters are float32. Torch would keep
    the moments of a bfloat16 parameter in bfloat16, where the second one stops moving (it changes by 0.1 % a step, half
    of what bfloat16 resolves); those runs take bitsandbytes' 32-bit AdamW, the same formula in float32. The parameter
    itself is still rounded to bfloat16 after each update, so that updates below 0.2 % of a weight can be lost.
    `adamw_8bit` (bitsandbytes) keeps both moments in 8 bits with one scale per 256 values, tensors of fewer than 4096
    values in float32. `paged_…` are the same with states in memory that CUDA moves to the host under pressure.

    Raises NibbleError for an unknown name, a paged optimiser without CUDA and for nothing to train.
    """
    trained = [(key, parameter) for key, parameter in named_parameters if parameter.requires_grad]
    if name not in NAMES:
        raise NibbleError(f"train.optimizer: '{name}' is unknown. Choose one of {', '.join(NAMES)}.")
    if not trained:
        raise NibbleError(
            "nothing to train: no parameter requires a gradient. Set adapter.targets, or adapter.kind: none."
        )
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in trained if pair[1].ndim >= 2], "weight_decay": weight_decay},
        {"params": [pair for pair in trained if pair[1].ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
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
    optimizer: Optimizer = classes[name](groups, **options)
    return optimizer


def require_device(name: str, device: torch.device) -> None:
    """Raises NibbleError when the optimiser `name` can't work on `device`."""
    if name.startswith("paged_") and device.type != "cuda":
        raise NibbleError(
            f"train.optimizer: {name} needs CUDA (it pages its state between GPU and host); this run is on"
            f" {device.type}.\nUse {name.removeprefix('paged_')}, or train.device: cuda."
        )


# ---------------------------------------------------------------------------------------------------- before the step


def check_loss(loss: float, step: int) -> None:
    """Raises NonFiniteError when the loss of `step` is infinite or not a number."""
    if not math.isfinite(loss):
        raise NonFiniteError(_non_finite(step, "the loss", loss))


def clip_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]], max_norm: float | None, step: int) -> float:
    """The 2-norm of all gradients together, in float32; scales them down so that it is at most `max_norm`.

    Same as torch.nn.utils.clip_grad_norm_, but with the norm of bfloat16 gradients in float32, and it raises
    NonFiniteError naming the first tensor whose gradient's norm is infinite or not a number. `max_norm` None only
    measures. Waits for the device once.
    """
    pairs = [(name, parameter.grad) for name, parameter in named_parameters if parameter.grad is not None]
    if not pairs:
        return 0.0
    gradients = [gradient for _, gradient in pairs]
    norms = torch.stack(_norms(gradients))
    total = float(torch.linalg.vector_norm(norms))
    if not math.isfinite(total):
        finite = norms.isfinite().tolist()
        # Each norm may be finite and their sum of squares not: then the largest is named.
        first = finite.index(False) if False in finite else int(norms.argmax())
        raise NonFiniteError(_non_finite(step, f"the gradient of {pairs[first][0]}", float(norms[first])))
    if max_norm is not None and total > max_norm:
        torch._foreach_mul_(gradients, max_norm / (total + 1e-6))
    return total


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    device = gradients[0].device
    return [norm.to(device) for norm in torch._foreach_norm(gradients, 2, dtype=torch.float32)]


def _non_finite(step: int, what: str, value: float) -> str:
    return (
        f"step {step}: {what} is not finite ({value}). No weight was changed in this step.\n"
        "Lower train.learning_rate or lengthen train.warmup_ratio, and look at the rows of this step."
    )


# -------------------------------------------------------------------------------------------------------------- state


def optimizer_state(optimizer: Optimizer) -> OptimizerState:
    """The state as flat tensors (not copied: write them before the next step) and JSON values.

    Hyperparameters are left out: they come from the config, the learning rate from the schedule.
    """
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for name, parameter, _, _ in _parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in _CONSTANTS:
                continue
            if isinstance(value, Tensor):
                _wait_for_paged(value, parameter)
                tensors[f"{key}.{name}"] = value.detach()
            elif key == "step":
                steps[name] = int(value)
            else:
                raise TypeError(f"{_kind(optimizer)} keeps {key} = {value!r}, which has no place in a checkpoint")
    return OptimizerState(tensors, {"kind": _kind(optimizer), "steps": steps})


def load_optimizer_state(optimizer: Optimizer, saved: OptimizerState) -> None:
    """Put a saved state into a new optimiser of the same kind over the same parameters, which then goes on bit for bit.

    Raises NibbleError when kind, parameters or shapes differ.
    """
    kind = saved.values["kind"]
    if kind != _kind(optimizer):
        raise NibbleError(
            f"the checkpoint's optimiser is {kind}, this run's is {_kind(optimizer)}.\n"
            "Set train.optimizer (and the trained dtype) as they were, or start anew in another output.dir."
        )
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, step in saved.values["steps"].items():
        by_parameter.setdefault(name, {})["step"] = step
    for name, tensor in saved.tensors.items():
        key, parameter_name = name.split(".", 1)
        by_parameter.setdefault(parameter_name, {})[key] = tensor
    for name, parameter, group, place in _parameters(optimizer):
        state = by_parameter.pop(name, None)
        if state is None:  # a parameter that had no gradient yet has no state
            optimizer.state.pop(parameter, None)
        elif isinstance(optimizer, torch.optim.AdamW):
            _load_torch(optimizer, name, parameter, state)
        else:
            _load_bitsandbytes(optimizer, name, parameter, state, group, place)
    if by_parameter:
        plural = "s" if len(by_parameter) > 1 else ""
        raise NibbleError(
            f"the checkpoint holds optimiser state of {len(by_parameter)} parameter{plural} that this run doesn't"
            f" train, such as {min(by_parameter)}.\nTrain the same parameters, or start anew in another output.dir."
        )


def _load_torch(optimizer: Optimizer, name: str, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        _check_like(name, key, state.get(key), parameter)
    _check_like(name, "step", state.get("step"), torch.zeros(()))
    optimizer.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in state.items()}


def _load_bitsandbytes(
    optimizer: Any,
    name: str,
    parameter: nn.Parameter,
    state: dict[str, Any],
    group: dict[str, Any],
    place: tuple[int, int],
) -> None:
    # Its own load_state_dict puts paged states into ordinary memory and casts what it doesn't know to the parameter's
    # dtype. So: let it allocate what it would on its first step, and copy the values in.
    optimizer.state.pop(parameter, None)
    optimizer.init_state(group, parameter, *place)
    fresh = optimizer.state[parameter]
    for key, value in fresh.items():
        if key == "step":
            fresh[key] = state.pop("step")
        elif key not in _CONSTANTS:
            _check_like(name, key, state.get(key), value)
            _wait_for_paged(value, parameter)
            value.copy_(state.pop(key))
    if state:
        raise NibbleError(_differs(name, f"it has {', '.join(sorted(state))}, which this optimiser doesn't keep"))


def _check_like(name: str, key: str, saved: Tensor | None, here: Tensor) -> None:
    if saved is None:
        raise NibbleError(_differs(name, f"it lacks {key}"))
    if saved.shape != here.shape or saved.dtype != here.dtype:
        theirs, ours = (f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in (saved, here))
        raise NibbleError(_differs(name, f"{key} is {theirs}, here {ours}"))


def _differs(name: str, how: str) -> str:
    return (
        f"the checkpoint's optimiser state of {name} doesn't fit: {how}.\n"
        "Train the same parameters in the same dtype, or start anew in another output.dir."
    )


def _parameters(optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any], tuple[int, int]]]:
    """Name, parameter, its group, and its place (group, index) in the optimiser."""
    for i, group in enumerate(optimizer.param_groups):
        for j, (name, parameter) in enumerate(zip(group["param_names"], group["params"], strict=True)):
            yield name, parameter, group, (i, j)


def _wait_for_paged(state: Tensor, parameter: nn.Parameter) -> None:
    """A paged state is host memory that the GPU writes: wait until it has."""
    if getattr(state, "is_paged", False):
        torch.cuda.synchronize(parameter.device)


def _kind(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}"
