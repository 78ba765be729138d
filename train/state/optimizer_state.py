"""The optimiser's state as plain tensors: taken, given room for what this process needs of it, and loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.parts import Cut, Part, bounds
from quant.common.errors import NibbleError
from quant.common.jsonfile import integer, mapping, text
from quant.common.words import shown
from train.blockwise import BLOCK, BlockwiseAdamW
from train.optim import parameters_of
from train.state.fingerprint import START_OVER, require_keys

# bitsandbytes' tables of the 256 values of an 8-bit state: constants that it makes itself, the same for every tensor.
_CONSTANTS = ("qmap1", "qmap2")
# What has the parameter's shape, of torch's AdamW and of bitsandbytes'.
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "state1", "state2")


@dataclass(frozen=True)
class OptimizerState:
    """What an optimiser remembers. `tensors` is named "<what>.<parameter>" (exp_avg.model…); `values` is JSON.

    cuts: for the tensors of which this process holds a part, which part that is. reset: of a saved state, the
    parameters that it has nothing for here (`room_for_state`).
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    cuts: dict[str, Cut] = field(default_factory=dict)
    reset: tuple[str, ...] = ()


def optimizer_state(optimizer: Optimizer, parts: Mapping[str, Part] | None = None) -> OptimizerState:
    """The state as flat tensors (not copied: write them before the next step) and JSON values.

    parts: of the parameters of which the optimiser has a part. Hyperparameters are left out: they come from the config,
    the learning rate from the schedule.
    """
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    cuts: dict[str, Cut] = {}
    layouts: dict[str, list[int]] = {}
    for name, parameter, _, _ in parameters_of(optimizer):
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


def check_values(values: dict[str, Any], where: str) -> None:
    """Raises NibbleError where the JSON values of a saved state are not what `optimizer_state` gives."""
    require_keys(values, ("kind", "steps"), f"{where}: optimizer")
    text(values, "kind", "x", where)
    steps, blocks = (mapping(values, key, where, null=False) for key in ("steps", "blocks"))
    for name in steps:
        integer(steps, name, 0, f"{where}: steps", least=0, most=2**48)
    for name, layout in blocks.items():
        usable = isinstance(layout, list) and len(layout) == len(_layout(None))
        if not usable or not all(type(entry) is int and 0 <= entry < 2**48 for entry in layout):
            raise NibbleError(f"{where}: blocks: {name} must be a list of integers, got {shown(layout)}.")


def room_for_state(
    saved: Mapping[str, tuple[tuple[int, ...], torch.dtype]], values: dict[str, Any], parts: Mapping[str, Part]
) -> OptimizerState:
    """Room on the host for what this process needs of a saved state.

    saved: shape and dtype of the whole tensors, by name. values: those of the saved state. The 8-bit state of a tensor
    that is cut otherwise here than it was is left out, and its parameter named in `reset`: its scales are of blocks of
    a part, and other parts have other blocks. Raises NibbleError where a shape isn't the parameter's.
    """
    reset = set()
    for name in (name.split(".", 1)[1] for name in saved if name.startswith("absmax")):
        was, here = values.get("blocks", {}).get(name, _layout(None)), _layout(parts.get(name))
        if was != here and (was[1] > 1 or here[1] > 1):
            reset.add(name)
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
        if parameter_name in reset:
            continue
        if part is not None and key in _LIKE_PARAMETER:
            cuts[name], shape = part, part.local_shape
        elif part is not None and key.startswith("absmax"):
            cuts[name] = cut = _scales_cut(part)
            shape = (cut.stop - cut.start,)
        tensors[name] = torch.empty(shape, dtype=dtype)
    steps = {name: step for name, step in values["steps"].items() if name not in reset}
    return OptimizerState(tensors, {**values, "steps": steps}, cuts, tuple(sorted(reset)))


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
            f"Set train.optimizer (and the trained dtype) as they were, or {START_OVER}."
        )
    parts = parts or {}
    by_parameter: dict[str, dict[str, Any]] = {}
    for name, step in saved.values["steps"].items():
        by_parameter.setdefault(name, {})["step"] = step
    for name, tensor in saved.tensors.items():
        key, parameter_name = name.split(".", 1)
        by_parameter.setdefault(parameter_name, {})[key] = tensor
    for name, parameter, _, _ in parameters_of(optimizer):
        state = by_parameter.pop(name, None)
        if state is None:  # a parameter that had no gradient yet, or whose state is reset
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
            f" train, such as {min(by_parameter)}.\n"
            f"Train the same parameters, or {START_OVER}."
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
        return -(-indices * math.prod(part.shape) // max(1, size) // BLOCK)

    start = part.start // width * scales(width)
    total = size // width * scales(width) + scales(size % width)
    return Cut((total,), 0, start, start + scales(part.stop - part.start))


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
        f"Train the same parameters in the same dtype, or {START_OVER}."
    )


def _wait_for_paged(state: Tensor, parameter: nn.Parameter) -> None:
    """A paged state is host memory that the GPU writes: wait until it has."""
    if getattr(state, "is_paged", False):
        torch.cuda.synchronize(parameter.device)


def _kind(optimizer: Optimizer) -> str:
    if isinstance(optimizer, BlockwiseAdamW):
        return optimizer.kind
    return f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}"
