"""From a router's input to its logits, the experts chosen and their weights in one launch, and back in one.

Products with the router's float32 matrix are as exact as float32's: on tensor cores, of three parts each (tf32x3).

Shapes: N tokens, H hidden, E experts in G groups, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels.rows import rows_of
from quant.kernels.choice import Arguments, kernel, uses
from quant.kernels.language import blocks, capability, jit, launch, power_of_two, tl
from quant.storage import DenseStorage

EPSILON = 1e-20  # beside the sum that sigmoid scores are divided by
_VALUES_AT_A_TIME = 4096  # of scores, by a program


@jit
def _scores(logits, there, SOFTMAX: tl.constexpr):
    """Of a tile [T, E]; where none is there, what comes out has no meaning."""
    if SOFTMAX:
        logits = tl.where(there, logits, float("-inf"))
        powers = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = powers / tl.sum(powers, 1)[:, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    return scores


@jit
def _router(
    x, matrix, bias, logits, chosen, weights, tokens, hidden, experts, x_row, each, open_groups, scale, epsilon,
    SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr, K_WIDTH: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Program i: T tokens. Experts lie in a tile [T, G · EACH], where groups of `each` are filled up to EACH."""
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    place = tl.arange(0, G * EACH)
    group, member = place // EACH, place % EACH
    expert = group * each + member
    inside = (group < GROUPS) & (member < each)
    product = tl.zeros((T, G * EACH), tl.float32)
    for start in range(0, hidden, B):
        column = start + tl.arange(0, B)
        known = (token < tokens)[:, None] & (column < hidden)[None, :]
        rows = tl.load(x + token[:, None] * x_row + column[None, :], mask=known, other=0.0).to(tl.float32)
        known = inside[None, :] & (column < hidden)[:, None]
        columns = tl.load(matrix + expert[None, :] * hidden + column[:, None], mask=known, other=0.0)
        product = tl.dot(rows, columns, product, input_precision="tf32x3")
    there = (token < tokens)[:, None] & inside[None, :]
    tl.store(logits + token[:, None] * experts + expert[None, :], product, mask=there)
    scores = _scores(product, inside[None, :], SOFTMAX)
    choice = scores
    if not SOFTMAX:
        choice += tl.load(bias + expert, mask=inside, other=0.0)[None, :]
    choice = tl.where(inside[None, :], choice, float("-inf"))
    if GROUPS > 1:
        # A group is as good as its two best experts.
        grouped = tl.reshape(choice, (T, G, EACH))
        best = tl.max(grouped, 2)
        at = tl.arange(0, EACH)[None, None, :]
        first = tl.min(tl.where(grouped == best[:, :, None], at, EACH), 2)
        worth = best + tl.max(tl.where(at == first[:, :, None], float("-inf"), grouped), 2)
        number = tl.arange(0, G)[None, :]
        worth = tl.where(number < GROUPS, worth, float("-inf"))
        is_open = tl.zeros((T, G), tl.int32)
        for _ in range(open_groups):
            most = tl.max(worth, 1)[:, None]
            taken = number == tl.min(tl.where(worth == most, number, G - 1), 1)[:, None]
            is_open = tl.where(taken, 1, is_open)
            worth = tl.where(taken, float("-inf"), worth)
        grouped = tl.where(is_open[:, :, None] == 1, grouped, float("-inf"))
        choice = tl.reshape(grouped, (T, G * EACH))
    rank = tl.arange(0, K_WIDTH)[None, :]
    picked, indices = tl.zeros((T, K_WIDTH), tl.float32), tl.zeros((T, K_WIDTH), tl.int32)
    for k in tl.static_range(K):
        most = tl.max(choice, 1)[:, None]
        index = tl.min(tl.where(choice == most, place[None, :], G * EACH), 1)[:, None]
        taken = place[None, :] == index
        picked = tl.where(rank == k, tl.sum(tl.where(taken, scores, 0.0), 1)[:, None], picked)
        indices = tl.where(rank == k, tl.sum(tl.where(taken, expert[None, :], 0), 1)[:, None], indices)
        choice = tl.where(taken, float("-inf"), choice)
    if NORMALISE:
        picked = picked / (tl.sum(picked, 1)[:, None] + epsilon)
    at, there = token[:, None] * K + rank, (token < tokens)[:, None] & (rank < K)
    tl.store(weights + at, picked * scale, mask=there)
    tl.store(chosen + at, indices.to(tl.int64), mask=there)


@jit
def _router_backward(
    grad, logits, chosen, matrix, d_logits, dx, tokens, hidden, experts, scale, epsilon,
    SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr, K: tl.constexpr, T: tl.constexpr, E: tl.constexpr,
    B: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Program i: T tokens."""
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    expert = tl.arange(0, E)[None, :]
    there = (token < tokens)[:, None] & (expert < experts)
    at = token[:, None] * experts + expert
    scores = _scores(tl.load(logits + at, mask=there, other=0.0), expert < experts, SOFTMAX)
    # Gradients of the weights where the experts are: [T, E].
    d, is_chosen = tl.zeros((T, E), tl.float32), tl.zeros((T, E), tl.int32)
    for k in tl.static_range(K):
        index = tl.load(chosen + token * K + k, mask=token < tokens, other=0)[:, None]
        value = tl.load(grad + token * K + k, mask=token < tokens, other=0.0)[:, None] * scale
        d = tl.where(expert == index, value, d)
        is_chosen = tl.where(expert == index, 1, is_chosen)
    if NORMALISE:
        own = tl.where(is_chosen == 1, scores, 0.0)
        total = tl.sum(own, 1)[:, None] + epsilon
        d = tl.where(is_chosen == 1, (d - tl.sum(d * own, 1)[:, None] / total) / total, 0.0)
    if SOFTMAX:
        d = scores * (d - tl.sum(tl.where(expert < experts, d * scores, 0.0), 1)[:, None])
    else:
        d = d * scores * (1.0 - scores)
    # Read again in parts, since registers don't hold a whole operand of so many experts.
    tl.store(d_logits + at, d, mask=there)
    tl.debug_barrier()
    for start in range(0, hidden, B):
        column = start + tl.arange(0, B)
        result = tl.zeros((T, B), tl.float32)
        for first in range(0, experts, PART):
            row = first + tl.arange(0, PART)
            in_part = (token < tokens)[:, None] & (row < experts)[None, :]
            part = tl.load(d_logits + token[:, None] * experts + row[None, :], mask=in_part, other=0.0)
            in_matrix = (row < experts)[:, None] & (column < hidden)[None, :]
            columns = tl.load(matrix + row[:, None] * hidden + column[None, :], mask=in_matrix, other=0.0)
            result = tl.dot(part, columns, result, input_precision="tf32x3")
        in_rows = (token < tokens)[:, None] & (column < hidden)[None, :]
        tl.store(dx + token[:, None] * hidden + column[None, :], result.to(dx.dtype.element_ty), mask=in_rows)


def _rows_and_warps(experts: int) -> tuple[int, int]:
    """Tokens of a program, for so many experts as a power of two."""
    return max(16, min(32, _VALUES_AT_A_TIME // experts)), 8 if experts >= 128 else 4


def _run(
    x: Tensor, matrix: Tensor, bias: Tensor | None, groups: int, open_groups: int, normalise: bool, scale: float,
    *, logits: Tensor, chosen: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    tokens, experts = logits.shape
    k, each = chosen.shape[1], experts // groups
    g = power_of_two(groups)
    width = power_of_two(each, max(2, 16 // g))
    rows, warps = _rows_and_warps(g * width)
    spills = capability(x.device)[0] >= 10 and g * width >= 256  # loads ahead, by Triton 3.6
    launch(
        _router, (blocks(tokens, rows),),
        x, matrix, matrix if bias is None else bias, logits, chosen, weights, tokens, x.shape[1], experts,
        x.stride(0), each, open_groups, scale, 0.0 if bias is None else EPSILON, SOFTMAX=bias is None,
        NORMALISE=normalise, GROUPS=groups, K=k, T=rows, G=g, EACH=width, K_WIDTH=power_of_two(k),
        B=32 if g * width < 256 else 16, warps=warps, stages=1 if spills else 2,
    )  # fmt: skip


def _scores_reference(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits.softmax(-1) if bias is None else logits.sigmoid()


def _reference(
    x: Tensor, matrix: Tensor, bias: Tensor | None, groups: int, open_groups: int, normalise: bool, scale: float,
    *, logits: Tensor, chosen: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    logits.copy_(x.float() @ matrix.t())
    scores = _scores_reference(logits, bias)
    choice = (scores if bias is None else scores + bias).unflatten(1, (groups, -1))
    if groups > 1:
        best = choice.topk(2, dim=-1).values.sum(-1).topk(open_groups, dim=-1).indices
        closed = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        choice = choice.masked_fill(closed[..., None], float("-inf"))
    chosen.copy_(choice.flatten(1).topk(chosen.shape[1], dim=-1).indices)
    picked = scores.gather(-1, chosen)
    if normalise:
        picked = picked / (picked.sum(-1, keepdim=True) + (0.0 if bias is None else EPSILON))
    weights.copy_(picked * scale)


def _run_backward(
    grad: Tensor, logits: Tensor, chosen: Tensor, matrix: Tensor, softmax: bool, normalise: bool, scale: float,
    *, d_logits: Tensor, dx: Tensor,
) -> None:  # fmt: skip
    tokens, experts = logits.shape
    width = power_of_two(experts, 16)
    rows, warps = _rows_and_warps(width)
    launch(
        _router_backward, (blocks(tokens, rows),),
        grad, logits, chosen, matrix, d_logits, dx, tokens, dx.shape[1], experts, scale, 0.0 if softmax else EPSILON,
        SOFTMAX=softmax, NORMALISE=normalise, K=chosen.shape[1], T=rows, E=width, B=64, PART=32, warps=warps,
    )  # fmt: skip


def _reference_backward(
    grad: Tensor, logits: Tensor, chosen: Tensor, matrix: Tensor, softmax: bool, normalise: bool, scale: float,
    *, d_logits: Tensor, dx: Tensor,
) -> None:  # fmt: skip
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    d = grad * scale
    if normalise:
        own = scores.gather(-1, chosen)
        total = own.sum(-1, keepdim=True) + (0.0 if softmax else EPSILON)
        d = (d - (d * own).sum(-1, keepdim=True) / total) / total
    d_scores = torch.zeros_like(scores).scatter_(-1, chosen, d)
    if softmax:
        d_logits.copy_(scores * (d_scores - (d_scores * scores).sum(-1, keepdim=True)))
    else:
        d_logits.copy_(d_scores * scores * (1 - scores))
    dx.copy_(d_logits @ matrix)


_TRIALS = (
    # tokens, hidden, experts, chosen, groups, open groups, sigmoid, normalise, dtype
    (33, 192, 64, 4, 1, 1, True, True, torch.float32),
    (9, 72, 48, 5, 4, 2, True, False, torch.float32),
    (7, 20, 12, 3, 3, 2, True, True, torch.float32),
    (17, 64, 256, 8, 1, 1, False, True, torch.bfloat16),
    (5, 64, 10, 1, 1, 1, False, False, torch.bfloat16),
)


def _trials(device: torch.device) -> Iterator[Arguments]:
    generator = torch.Generator().manual_seed(0)
    for tokens, hidden, experts, k, groups, open_groups, sigmoid, normalise, dtype in _TRIALS:
        x = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
        matrix = (torch.randn(experts, hidden, generator=generator) / hidden**0.5).to(device)
        bias = torch.randn(experts, generator=generator).to(device) if sigmoid else None
        chosen = torch.empty(tokens, k, dtype=torch.int64, device=device)
        yield (x, matrix, bias, groups, open_groups, normalise, 1.8), {
            "logits": matrix.new_empty(tokens, experts), "chosen": chosen, "weights": matrix.new_empty(tokens, k)
        }  # fmt: skip


def _trials_backward(device: torch.device) -> Iterator[Arguments]:
    for (x, matrix, bias, _, _, normalise, scale), outputs in _trials(device):
        logits = x.float() @ matrix.t()
        chosen = logits.topk(outputs["chosen"].shape[1]).indices
        grad = logits.flip(1)[:, : chosen.shape[1]].contiguous()
        yield (grad, logits, chosen, matrix, bias is None, normalise, scale), {
            "d_logits": torch.empty_like(logits), "dx": torch.empty_like(x)
        }  # fmt: skip


# x [N, H] with any distance between rows, matrix float32 [E, H]; bias float32 [E]: scores are sigmoids then, without it
# a softmax; the K best of the experts of the `open_groups` best of `groups`; normalise: whether weights are divided by
# their sum before `scale`. Outputs float32 [N, E], int64 and float32 [N, K]; among equals the first expert is chosen.
router_forward = kernel(
    "router",
    "(Tensor x, Tensor matrix, Tensor? bias, int groups, int open_groups, bool normalise, float scale, *,"
    " Tensor(a!) logits, Tensor(b!) chosen, Tensor(c!) weights) -> ()",
    run=_run,
    reference=_reference,
    trials=_trials,
    tolerance=1e-5,
)

# grad float32 [N, K]: of the weights; those of the logits, float32 [N, E], and of x, [N, H]. All contiguous.
router_backward = kernel(
    "router_backward",
    "(Tensor grad, Tensor logits, Tensor chosen, Tensor matrix, bool softmax, bool normalise, float scale, *,"
    " Tensor(a!) d_logits, Tensor(b!) dx) -> ()",
    run=_run_backward,
    reference=_reference_backward,
    trials=_trials_backward,
    tolerance=1e-5,
)


def usable(device: torch.device) -> bool:
    return uses(router_forward, device) and uses(router_backward, device)


def choose(
    x: Tensor,
    matrix: DenseStorage,
    bias: Tensor | None,
    chosen: int,
    *,
    groups: int = 1,
    open_groups: int = 1,
    normalise: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """What `router_forward` computes, differentiable in x: chosen int64 [N, K], weights float32 [N, K]."""
    out: tuple[Tensor, Tensor] = _Choose.apply(x, matrix, bias, chosen, groups, open_groups, normalise, scale)
    return out


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: DenseStorage, bias: Tensor | None, count: int, groups: int, open_groups: int,
        normalise: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        value, rows = matrix.value.detach(), rows_of(x)
        logits, weights = (value.new_empty(len(rows), columns) for columns in (len(value), count))
        chosen = torch.empty_like(weights, dtype=torch.int64)
        router_forward(
            rows, value, bias, groups, open_groups, normalise, scale, logits=logits, chosen=chosen, weights=weights
        )
        ctx.save_for_backward(logits, chosen)
        ctx.matrix, ctx.like = matrix, x.new_empty(0)
        ctx.options = bias is None, normalise, scale
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        return chosen, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, chosen = ctx.saved_tensors
        if grads[1] is None:
            return (None,) * 8
        value = ctx.matrix.value.detach()
        dx = ctx.like.new_empty(len(logits), value.shape[1])
        router_backward(
            grads[1].contiguous(), logits, chosen, value, *ctx.options, d_logits=torch.empty_like(logits), dx=dx
        )
        return (dx, *(None,) * 7)
