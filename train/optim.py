"""Optimisers, gradient clipping and the optimiser's state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.parts import Cut, Part, bounds
from quant.common.errors import NibbleError

NAMES = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")

# bitsandbytes' tables of the 256 values of an 8-bit state: constants that it makes itself, the same for every tensor.
_CONSTANTS = ("qmap1", "qmap2")
# What has the parameter's shape, of torch's AdamW and of bitsandbytes'.
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "state1", "state2")
# Tensors of fewer values have float32 states in bitsandbytes' 8-bit optimisers.
_MIN_8BIT_SIZE = 4096
_BLOCK = 256  # values per scale of an 8-bit state


class NonFiniteError(NibbleError):
    """The loss or a gradient is infinite or not a number; raised before any weight is touched."""


@dataclass(frozen=True)
class OptimizerState:
    """What an optimiser remembers. `tensors` is named "<what>.<parameter>" (exp_avg.model…); `values` is JSON.

    cuts: for the tensors of which this process holds a part, which part that is. anew: of a saved state, the parameters
    that it has nothing for here (`room_for_state`).
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    cuts: dict[str, Cut] = field(default_factory=dict)
    anew: tuple[str, ...] = ()


def build_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    sizes: Mapping[str, int] | None = None,
) -> Optimizer:
    """AdamW over the parameters that require a gradient; weight decay (decoupled) on matrices and stacks of them only.

    named_parameters: what this process holds of each; empty parts are left out. sizes: the number of values of the
    whole tensors, by name, where that differs.

    `adamw` keeps both moments in float32. It is torch's fused AdamW when all parameters are float32. Torch would keep
    the moments of a bfloat16 parameter in bfloat16, where the second one stops moving (it changes by 0.1 % a step, half
    of what bfloat16 resolves); those runs take bitsandbytes' 32-bit AdamW, the same formula in float32. The parameter
    itself is still rounded to bfloat16 after each update, so that updates below 0.2 % of a weight can be lost.
    `adamw_8bit` (bitsandbytes) keeps both moments in 8 bits with one scale per 256 values, tensors of fewer than 4096
    values in float32 (whatever the size of this process's part). `paged_…` are the same with states in memory that CUDA
    moves to the host under pressure.

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
    _allocate_states(library.GlobalOptimManager.get_instance(), optimizer, sizes or {})
    result: Optimizer = optimizer
    return result


def _allocate_states(manager: Any, optimizer: Any, sizes: Mapping[str, int]) -> None:
    """Allocate bitsandbytes' states, in 8 bits also for small parts of large tensors: the arithmetic is that of one
    process, and a tensor's state has one dtype on all processes.

    manager: bitsandbytes' own, of settings by parameter. It is one for all optimisers of a process and knows parameters
    by their id() for ever, so that it would mistake a later tensor for one that is gone: a setting is taken out again
    when the state, which alone depends on it, is there.
    """
    for name, parameter, group, place in _parameters(optimizer):
        if parameter.numel() < _MIN_8BIT_SIZE <= sizes.get(name, 0):
            manager.override_config(parameter, "min_8bit_size", 0)
        optimizer.init_state(group, parameter, *place)
        manager.pid2config.pop(id(parameter), None)


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


def clip_gradients(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    max_norm: float | None,
    step: int,
    *,
    total: Callable[[Tensor], Tensor] | None = None,
    replicated: Collection[str] = (),
) -> float:
    """The 2-norm of all gradients together; scales them down so that it is at most `max_norm`.

    Same as torch.nn.utils.clip_grad_norm_, but with the norm of bfloat16 gradients in float32, and it raises
    NonFiniteError naming the first tensor whose gradient's norm is infinite or not a number. `max_norm` None only
    measures. Waits for the device once.

    On several processes the parameters are the parts that this one holds, of the same names in the same order on all.
    total: sums a tensor (the parts' squared norms, float64) over the processes that hold one copy of the model
    together. replicated: names of those that every process holds whole, which count once.
    """
    parameters = list(named_parameters)
    gradients = [parameter.grad for _, parameter in parameters if parameter.grad is not None]
    if not parameters or (total is None and not gradients):
        return 0.0
    squares = _squared_norms([parameter for _, parameter in parameters])
    if total is not None:
        alone = torch.tensor([name in replicated for name, _ in parameters], device=squares.device)
        squares = torch.where(alone, squares, total(squares.masked_fill(alone, 0.0)))
    # In float32, as the gradients are: what overflows there is not finite.
    norms = squares.sqrt().float()
    norm = float(squares.sum().sqrt().float())
    if not math.isfinite(norm):
        finite = norms.isfinite().tolist()
        # Each norm may be finite and their sum of squares not: then the largest is named.
        first = finite.index(False) if False in finite else int(norms.argmax())
        raise NonFiniteError(_non_finite(step, f"the gradient of {parameters[first][0]}", float(norms[first])))
    if max_norm is not None and norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm


def _squared_norms(parameters: list[nn.Parameter]) -> Tensor:
    """float64 [number of parameters] on the first one's device; 0 where there is no gradient.

    The norms are float32's; their squares may be larger than float32 can hold.
    """
    device = parameters[0].device
    present = [i for i, parameter in enumerate(parameters) if parameter.grad is not None and parameter.numel()]
    gradients = [gradient for i in present if (gradient := parameters[i].grad) is not None]
    squares = torch.zeros(len(parameters), dtype=torch.float64, device=device)
    if gradients:
        norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(gradients, 2, dtype=torch.float32)])
        squares[torch.tensor(present, device=device)] = norms.double().square()
    return squares


def _non_finite(step: int, what: str, value: float) -> str:
    return (
        f"step {step}: {what} is not finite ({value}). No weight was changed in this step.\n"
        "Lower train.learning_rate or lengthen train.warmup_ratio, and look at the rows of this step."
    )


# -------------------------------------------------------------------------------------------------------------- state


def optimizer_state(optimizer: Optimizer, parts: Mapping[str, Part] | None = None) -> OptimizerState:
    """The state as flat tensors (not copied: write them before the next step) and JSON values.

    parts: of the parameters of which the optimiser has a part. Hyperparameters are left out: they come from the config,
    the learning rate from the schedule.
    """
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    cuts: dict[str, Cut] = {}
    layouts: dict[str, list[int]] = {}
    for name, parameter, _, _ in _parameters(optimizer):
        part = (parts or {}).get(name)
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in _CONSTANTS:
                continue
            if isinstance(value, Tensor):
                _wait_for_paged(value, parameter)
                tensors[f"{key}.{name}"] = value.detach()
                if part is not None and key in _LIKE_PARAMETER:
                    cuts[f"{key}.{name}"] = part
                elif part is not None and key.startswith("absmax"):
                    cuts[f"{key}.{name}"] = _scales_cut(part)
                    layouts[name] = _layout(part)
            elif key == "step":
                steps[name] = int(value)
            else:
                raise TypeError(f"{_kind(optimizer)} keeps {key} = {value!r}, which has no place in a checkpoint")
    values: dict[str, Any] = {"kind": _kind(optimizer), "steps": steps}
    if layouts:
        values["blocks"] = layouts
    return OptimizerState(tensors, values, cuts)


def room_for_state(
    saved: Mapping[str, tuple[tuple[int, ...], torch.dtype]], values: dict[str, Any], parts: Mapping[str, Part]
) -> OptimizerState:
    """Room on the host for what this process needs of a saved state.

    saved: shape and dtype of the whole tensors, by name. values: those of the saved state. The 8-bit state of a tensor
    that is cut otherwise here than it was is left out, and its parameter named in `anew`: its scales are of blocks of a
    part, and other parts have other blocks. Raises NibbleError where a shape isn't the parameter's.
    """
    anew = set()
    for name in (name.split(".", 1)[1] for name in saved if name.startswith("absmax")):
        was, here = values.get("blocks", {}).get(name, _layout(None)), _layout(parts.get(name))
        if was != here and (was[1] > 1 or here[1] > 1):
            anew.add(name)
    tensors: dict[str, Tensor] = {}
    cuts: dict[str, Cut] = {}
    for name, (shape, dtype) in saved.items():
        key, parameter_name = name.split(".", 1)
        part = parts.get(parameter_name)
        if part is not None and key in _LIKE_PARAMETER and shape != part.shape:
            text = str(dtype).removeprefix("torch.")
            raise NibbleError(
                _differs(parameter_name, f"{key} is {list(shape)} {text}, here {list(part.shape)} {text}")
            )
        if parameter_name in anew:
            continue
        if part is not None and key in _LIKE_PARAMETER:
            cuts[name], shape = part, part.local_shape
        elif part is not None and key.startswith("absmax"):
            cuts[name] = cut = _scales_cut(part)
            shape = (cut.stop - cut.start,)
        tensors[name] = torch.empty(shape, dtype=dtype)
    steps = {name: step for name, step in values["steps"].items() if name not in anew}
    return OptimizerState(tensors, {**values, "steps": steps}, cuts, tuple(sorted(anew)))


def load_optimizer_state(optimizer: Optimizer, saved: OptimizerState, parts: Mapping[str, Part] | None = None) -> None:
    """Put a saved state into a new optimiser of the same kind over the same parameters, which then goes on bit for bit.

    parts: of the parameters of which the optimiser has a part. What is saved of these is then a part too
    (`room_for_state`).

    Raises NibbleError when kind, parameters or shapes differ.
    """
    kind = saved.values["kind"]
    if kind != _kind(optimizer):
        raise NibbleError(
            f"the checkpoint's optimiser is {kind}, this run's is {_kind(optimizer)}.\n"
            "Set train.optimizer (and the trained dtype) as they were, or start anew in another output.dir."
        )
    parts = parts or {}
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, step in saved.values["steps"].items():
        by_parameter.setdefault(name, {})["step"] = step
    for name, tensor in saved.tensors.items():
        key, parameter_name = name.split(".", 1)
        by_parameter.setdefault(parameter_name, {})[key] = tensor
    for name, parameter, _, _ in _parameters(optimizer):
        state = by_parameter.pop(name, None)
        if state is None:  # a parameter that had no gradient yet, or whose state starts anew
            continue
        if isinstance(optimizer, torch.optim.AdamW):
            _load_torch(optimizer, name, parameter, state)
        else:
            _load_bitsandbytes(optimizer, name, parameter, state)
    # Those of which this process holds nothing.
    for name in [name for name in by_parameter if name in parts and 0 in parts[name].local_shape]:
        del by_parameter[name]
    if by_parameter:
        plural = "s" if len(by_parameter) > 1 else ""
        raise NibbleError(
            f"the checkpoint holds optimiser state of {len(by_parameter)} parameter{plural} that this run doesn't"
            f" train, such as {min(by_parameter)}.\nTrain the same parameters, or start anew in another output.dir."
        )


def _layout(part: Part | None) -> list[int]:
    """The dimension along which a tensor is cut, and the number of parts; None is a whole tensor."""
    if part is None:
        return [0, 1]
    sizes = [part.mesh.size(i) for i, placement in enumerate(part.placements) if placement.is_shard()]
    return [part.dim, math.prod(sizes)]


def _scales_cut(part: Part) -> Cut:
    """Which of the scales of all parts in a row are those of `part`: each part has one for every 256 of its values."""
    size, (_, count) = part.shape[part.dim], _layout(part)
    width = max(1, bounds(size, count, 0)[1])  # of all parts but the last, which may be shorter

    def scales(indices: int) -> int:
        return -(-indices * math.prod(part.shape) // max(1, size) // _BLOCK)

    start = part.start // width * scales(width)
    total = size // width * scales(width) + scales(size % width)
    return _ScalesCut((total,), start, start + scales(part.stop - part.start))


@dataclass(frozen=True)
class _ScalesCut:
    """Scales start .. stop of a one-dimensional tensor of `shape` scales."""

    shape: tuple[int, ...]
    start: int
    stop: int
    dim: int = 0


def _load_torch(optimizer: Optimizer, name: str, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        _check_like(name, key, state.get(key), parameter)
    _check_like(name, "step", state.get("step"), torch.zeros(()))
    optimizer.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in state.items()}


def _load_bitsandbytes(optimizer: Any, name: str, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    # Its own load_state_dict puts paged states into ordinary memory and casts what it doesn't know to the parameter's
    # dtype. So the values are copied into the state that build_optimizer has allocated.
    own = optimizer.state[parameter]
    for key, value in own.items():
        if key == "step":
            own[key] = state.pop("step")
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
