"""bitsandbytes' AdamW, bit for bit, with one launch for many small tensors and without waiting for the device.

bitsandbytes updates one tensor after another and waits for the device after each. A model has hundreds of LoRA tensors,
most of them so small that launching takes longer than computing. Here the small ones and their states lie next to each
other in memory, each from a block of the 8-bit states on, so that blocks and their scales are what they would be alone.
Their gradients stay where autograd puts them, and are copied side by side just for the update, a few MB at a time:
gradients that always lay there would have to be added to instead of being taken over, one launch for each, and would
take their memory throughout the step.

A bfloat16 parameter, and its gradient, are copied to float32 for the update, in pieces that a scratch of bounded size
holds, and what comes out is rounded stochastically (quant/kernels/rounding.py): bitsandbytes would round it to the
nearest, where an update of less than 2⁻⁹ of a weight is lost each time. The random bits follow from the seed, the
parameter's number of updates, which its state has, and the place of a value among all that are trained: an interrupted
run draws what it would have drawn, and so do processes that hold the same part of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quant.common.devices import on_cpu
from quant.common.errors import NibbleError
from quant.kernels import rounding
from quant.kernels.rounding import keys_of, round_stochastically, wrapped

BLOCK = rounding.BLOCK  # values per scale of bitsandbytes' 8-bit states
# Small tensors are updated together up to so many values: on a CPU the update's float32 copies should stay in caches. A
# tensor of a quarter of it keeps a device busy for longer than a launch takes, and is updated from its own gradient.
CPU_TOGETHER = 2**18
TOGETHER = 2**22
# A bfloat16 parameter of more than so many times what is updated together is updated in pieces.
PIECE = 2


@dataclass(frozen=True)
class _Buffer:
    """Tensors of one group, dtype, device and kind of state: values and states flat, padded with zeros, which an update
    keeps as they are. starts: where each begins. numbers: of bfloat16 values, int32: of each block's first.
    """

    group: dict[str, Any]
    parameters: list[nn.Parameter]
    starts: list[int]
    values: Tensor
    states: dict[str, Tensor]
    numbers: Tensor | None


class BlockwiseAdamW(Optimizer):
    """`inner` is bitsandbytes' optimiser with its states allocated; its groups and states are this one's.

    A parameter's state is bitsandbytes' own, of its shape (for small ones a view). One without a gradient is left as it
    is. join: small parameters may be moved in memory, where each keeps its shape and values, and `data` becomes a view.
    Where their memory belongs to others (FSDP's), all are updated one by one. So are paged states, which bitsandbytes
    allocates one by one; their tensors have 10⁵ values at least. numbers: by parameter's name, of its first value, for
    the random bits of bfloat16 ones, and seed for the same.
    """

    def __init__(self, inner: Any, join: bool, numbers: Mapping[str, int], seed: int = 0) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.state, self.seed = inner, inner.state, seed
        self._numbers: dict[nn.Parameter, int] = {
            parameter: numbers[name]
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        # The name that its states have in checkpoints.
        self.kind = f"bitsandbytes.{type(inner).__name__}"
        self._buffers: list[_Buffer] = []
        self._alone: list[tuple[dict[str, Any], nn.Parameter]] = []
        for group in self.param_groups:
            small: dict[Any, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                state1 = self.state[parameter]["state1"]
                few = parameter.numel() < _together(parameter.device) // 4
                if join and few and not getattr(state1, "is_paged", False):
                    small.setdefault((parameter.dtype, parameter.device, state1.dtype), []).append(parameter)
                else:
                    self._alone.append((group, parameter))
            self._buffers += [self._join(group, parameters) for parameters in small.values()]

    @torch.no_grad()
    def _join(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> _Buffer:
        starts, size = [], 0
        for parameter in parameters:
            starts.append(size)
            size += -(-parameter.numel() // BLOCK) * BLOCK
        first = self.state[parameters[0]]
        keys = [key for key in ("state1", "state2", "absmax1", "absmax2") if key in first]
        sizes = {key: size // BLOCK if key.startswith("absmax") else size for key in keys}
        values = parameters[0].new_zeros(size)
        states = {key: first[key].new_zeros(sizes[key]) for key in keys}
        if "qmap1" in first:  # in 8 bits zero is one of 256 values, elsewhere in either table
            for number in "12":
                states[f"state{number}"].fill_(first[f"qmap{number}"].abs().argmin())
        for parameter, start in zip(parameters, starts, strict=True):
            parameter.data = _moved(parameter.data, values[start:])
            state = self.state[parameter]
            for key in keys:
                at = start // BLOCK if key.startswith("absmax") else start
                state[key] = _moved(state[key], states[key][at:])
        tables = {key: first[key] for key in ("qmap1", "qmap2") if key in first}
        numbers = None
        if values.dtype == torch.bfloat16:
            firsts = [self._numbers[x] + first for x in parameters for first in range(0, x.numel(), BLOCK)]
            numbers = torch.tensor([wrapped(first) for first in firsts], dtype=torch.int32, device=values.device)
        return _Buffer(group, parameters, starts, values, states | tables, numbers)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group, parameter in self._alone:
            if parameter.grad is not None:
                self._update_one(group, parameter)
        for buffer in self._buffers:
            for span in self._spans(buffer):
                if len(span) == 1:
                    self._update_one(buffer.group, buffer.parameters[span.start])
                else:
                    self._update_span(buffer, span)
        if self.inner.is_paged:  # pages move on their own: let them come to rest
            torch.cuda.synchronize()

    def _spans(self, buffer: _Buffer) -> Iterator[range]:
        """The parameters with a gradient: runs of neighbours that have made equally many steps."""
        base, width = buffer.values.data_ptr(), buffer.values.element_size()
        span, steps, most = range(0), 0, _together(buffer.values.device)
        for i, (parameter, start) in enumerate(zip(buffer.parameters, buffer.starts, strict=True)):
            if parameter.grad is None:
                continue
            # Whoever gave it other memory meanwhile finds it updated there, alone.
            here = parameter.is_meta or parameter.data_ptr() == base + width * start
            done = self.state[parameter]["step"] if here else -1
            fits = bool(span) and start + parameter.numel() - buffer.starts[span.start] <= most
            if fits and span.stop == i and done == steps >= 0:
                span = range(span.start, i + 1)
                continue
            if span:
                yield span
            span, steps = range(i, i + 1), done
        if span:
            yield span

    def _update_one(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        if self.inner.is_paged:
            self.inner.prefetch_state(parameter)
        assert parameter.grad is not None
        state["step"] += 1
        parameter.data = parameter.data.contiguous()
        gradient = parameter.grad.contiguous().view(-1)
        self._update(group, parameter.data.view(-1), gradient, state, state["step"], self._numbers[parameter])

    def _update_span(self, buffer: _Buffer, span: range) -> None:
        parameters, starts = buffer.parameters[span.start : span.stop], buffer.starts[span.start : span.stop]
        start, stop = starts[0], starts[-1] + parameters[-1].numel()
        gradients: list[Tensor] = []
        for parameter in parameters:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            self.state[parameter]["step"] += 1
        together = buffer.values.new_zeros(stop - start)
        places = [together[at - start :][: x.numel()].view(x.shape) for at, x in zip(starts, gradients, strict=True)]
        torch._foreach_copy_(places, gradients)
        state, step = _piece(buffer.states, start, stop), self.state[parameters[0]]["step"]
        numbers = buffer.numbers[start // BLOCK :] if buffer.numbers is not None else 0
        self._update(buffer.group, buffer.values[start:stop], together, state, step, numbers)

    def _update(
        self,
        group: dict[str, Any],
        values: Tensor,
        gradient: Tensor,
        state: Mapping[str, Any],
        step: int,
        numbers: Tensor | int,
    ) -> None:
        """values and gradient: flat. numbers: as `round_stochastically` has them."""
        if values.dtype != torch.bfloat16:
            _adamw(group, values, gradient, _piece(state, 0, values.numel()), step)
            return
        keys, most = keys_of(self.seed, step), PIECE * _together(values.device) // BLOCK * BLOCK
        for start in range(0, values.numel(), most):
            stop = min(start + most, values.numel())
            exact, exact_gradient = (values.new_empty(stop - start, dtype=torch.float32) for _ in range(2))
            torch._foreach_copy_([exact, exact_gradient], [values[start:stop], gradient[start:stop]])
            _adamw(group, exact, exact_gradient, _piece(state, start, stop), step)
            here = numbers[start // BLOCK :] if isinstance(numbers, Tensor) else numbers + start
            round_stochastically(exact, here, keys, out=values[start:stop])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "inner"):
            raise NibbleError("this optimiser's parameters are settled: build another one, over all of them.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Any) -> None:
        raise NibbleError(
            "torch's load_state_dict would replace states that lie in one piece of memory, and cast 8-bit ones.\n"
            "Use train.state.optimizer_state.load_optimizer_state."
        )


def _together(device: torch.device) -> int:
    return CPU_TOGETHER if on_cpu(device) else TOGETHER


def _moved(tensor: Tensor, room: Tensor) -> Tensor:
    """A copy in the first values of `room`."""
    view = room[: tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def _piece(states: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The states of the values start .. stop, whole blocks of them."""
    pieces = dict(states)
    for key, value in states.items():
        if key.startswith("absmax"):
            pieces[key] = value[start // BLOCK : -(-stop // BLOCK)]
        elif key.startswith("state"):
            pieces[key] = value.view(-1)[start:stop]
            if getattr(value, "is_paged", False):  # bitsandbytes asks for it, as paged states look like the host's
                pieces[key].is_paged = True
    return pieces


def _adamw(group: dict[str, Any], values: Tensor, gradient: Tensor, state: Mapping[str, Any], step: int) -> None:
    from bitsandbytes import functional

    (beta1, beta2), common = group["betas"], {"eps": group["eps"], "step": step, "lr": group["lr"]}
    if state["state1"].dtype == torch.float32:
        functional.optimizer_update_32bit(
            "adam", gradient, values, state["state1"], beta1, state2=state["state2"], beta2=beta2,
            weight_decay=group["weight_decay"], **common,
        )  # fmt: skip
    else:
        functional.optimizer_update_8bit_blockwise(
            "adam", gradient, values, state["state1"], state["state2"], beta1, beta2, 0.0, 0.0,
            qmap1=state["qmap1"], qmap2=state["qmap2"], absmax1=state["absmax1"], absmax2=state["absmax2"],
            weight_decay=group["weight_decay"], **common,
        )  # fmt: skip
