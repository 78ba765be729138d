"""The routed experts: a SwiGLU per expert, computed for the tokens that chose it.

One token's way: its K choices become K rows, sorted by expert (`Routing`); each expert's rows go through gate and up
[2I, H], SwiGLU and down [H, I], with the expert's weights made dense for just as long; every row is written to its
own slot (token, choice), and a token's K slots are summed with its routing weights in float32, in the order of its
choices.

Memory: what lives for the backward pass is the block's input and the routing. Dense weights exist for a few experts
at a time (one on CPU), in both directions, so the working memory does not grow with the number of experts.

Several processes may own the experts between them (`Experts.own`). `Experts.exchange` then brings the tokens to their
experts, wherever those are, and calls the same block for the ones that are here.

`torch_form` computes it in torch's operations, `kernel_form` with kernels of our own, where they have shown that
they compute the same.

Shapes: N tokens, E experts, K chosen per token, H hidden, I expert width, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.blocks.linear import ExpertWeights, trained
from models.blocks.recomputed import kept
from models.experts import kernel_form, torch_form
from models.experts.routing import Routing
from quant.kinds import new_storage
from quant.products import without_autocast


class LocalExperts(Protocol):
    """The block of the experts that are here, numbered from 0: as `Experts.forward`, for n rows that may be none.

    rows: how many choices each expert has, where the host knows it already; else it waits for the device to say so.
    """

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, rows: tuple[int, ...] | None = None) -> Tensor: ...


class Exchange(Protocol):
    """Computes what `Experts.forward` does where several processes own the experts; `compute` does it for those of
    this process. Every process calls it as often as the others, forward and backward.
    """

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, compute: LocalExperts) -> Tensor: ...


class Experts(nn.Module):
    """All routed experts of a layer. `gate_up_proj` [E, 2I, H] holds gate above up; `down_proj` is [E, H, I].

    owned: which of the layer's experts this process has, all of them before a call of `own`; E above is their number.
    exchange: how tokens reach the others; None: all are here.
    """

    group: ClassVar[Group] = "experts"

    def __init__(self, experts: int, hidden: int, width: int, factory: Factory) -> None:
        super().__init__()
        self.experts = experts
        self.owned = range(experts)
        self.exchange: Exchange | None = None

        shape = (experts, 2 * width, hidden)
        self.gate_up_proj = ExpertWeights(shape, ("gate_proj", "up_proj"), factory)
        self.down_proj = ExpertWeights((experts, hidden, width), ("down_proj",), factory)
        self.experts_at_a_time: int | None = None  # that are dense; None: what suits the device

    def own(self, owned: range) -> None:
        """Keep only these consecutive experts of the layer, with their LoRA. For tensors on the meta device: those
        that are kept are new ones. Raises ValueError elsewhere, or for a range that is none of the layer's.
        """
        if owned.step != 1 or not 0 <= owned.start < owned.stop <= self.experts:
            raise ValueError(f"no experts {owned}: there are {self.experts}")

        def fewer(stack: nn.Parameter) -> nn.Parameter:
            return nn.Parameter(stack.new_empty(len(owned), *stack.shape[1:]), requires_grad=stack.requires_grad)

        for projection in (self.gate_up_proj, self.down_proj):
            whole, lora = projection.weight, projection.lora
            if whole.device.type != "meta":
                raise ValueError(f"{whole.name} has values already; experts are divided before that")
            shape = (len(owned), *whole.shape[1:])
            kept = new_storage(whole.spec, shape, whole.dtype, "meta", whole.name)
            for name, tensor in whole.named_parameters():
                kept.get_parameter(name).requires_grad_(tensor.requires_grad)
            projection.weight = kept
            if lora is not None:
                lora.A, lora.B = fewer(lora.A), fewer(lora.B)
        self.experts, self.owned = len(owned), owned

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor, *plus: Tensor | None) -> Tensor:
        """x [N, H], chosen int64 [N, K] of all experts, weights float32 [N, K]: [N, H] in the dtype of x.

        plus: up to two of this shape, which are added to it one after the other.
        """
        added = [part for part in plus if part is not None]
        if self.exchange is None and kernel_form.usable(x.device, chosen.numel(), self.experts):
            return self._local(x, chosen, weights, plus=added)
        compute = self._local if self.exchange is None else functools.partial(self.exchange, compute=self._local)
        return sum(added, compute(x, chosen, weights))

    def _local(
        self,
        x: Tensor,
        chosen: Tensor,
        weights: Tensor,
        rows: tuple[int, ...] | None = None,
        *,
        plus: Sequence[Tensor] = (),
    ) -> Tensor:
        """A LocalExperts. plus: as in `forward`, for kernels."""
        way = kernel_form if kernel_form.usable(x.device, chosen.numel(), self.experts) else torch_form

        def route() -> Routing:
            routing = Routing.by_expert(chosen, self.experts, rows)
            return routing.on_host() if way is torch_form else routing  # the block's one wait for the device

        routing = kept(route)
        tensors: list[Tensor | None] = []
        for projection in (self.gate_up_proj, self.down_proj):
            lora = projection.lora
            a, b = (lora.A, lora.B) if lora is not None else (None, None)
            tensors += [a, b, trained(projection.weight)]
        stacks = (self.gate_up_proj, self.down_proj, self.experts_at_a_time)
        saved = _SaveForBackward.apply(x, weights, *tensors, routing, functools.partial(way.backward, *stacks))
        x, weights = x.detach(), weights.detach()
        if way is torch_form:
            return _Compute.apply(saved, lambda: torch_form.forward(*stacks, x, weights, routing))
        return _Compute.apply(saved, lambda *plus: kernel_form.forward(*stacks, x, weights, routing, plus), *plus)


# The block is two autograd functions in a row. `_SaveForBackward` comes first and computes nothing: it saves what the
# backward pass needs, and its backward is the whole block's. `_Compute` comes second, computes the output and saves
# nothing. Under activation checkpointing a layer's recomputation ends as soon as everything saved has been seen
# again, so the experts, last in their layer, are not multiplied a second time only to reach their own backward.


class _SaveForBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_a: Tensor | None,
        gate_up_b: Tensor | None,
        gate_up_value: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        down_value: Tensor | None,
        routing: Routing,
        gradients: Callable[..., tuple[Tensor | None, ...]],
    ) -> Tensor:
        # The routing passes through save_for_backward like the rest: a recomputation replaces all of it together.
        ctx.save_for_backward(x, weights, routing.slots, routing.ends)
        ctx.rows, ctx.gradients = routing.rows, gradients
        return x.new_empty(()).expand(x.shape)  # stands for the output, so that its gradient comes back here

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weights, slots, ends = ctx.saved_tensors
        routing = Routing(slots, ends, ctx.rows)
        return (*ctx.gradients(x, weights, routing, grads[0], ctx.needs_input_grad), None, None)


class _Compute(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, saved: Tensor, run: Callable[..., Tensor], *plus: Tensor) -> Tensor:
        ctx.plus = len(plus)
        return run(*plus)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, *[grads[0]] * ctx.plus
