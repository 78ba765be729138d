"""Cross-entropy of a linear head, without ever holding the logits of all tokens.

Only labelled rows are projected. The logits exist one [rows, vocabulary slice] chunk at a time; the log-sum-exp and the
gradient run along the slices the way flash attention runs along keys (Milakov and Gimelshein 2018, arXiv:1805.02867).

Shapes: N tokens, n labelled tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quant.common.devices import on_cpu
from quant.common.errors import NibbleError
from quant.products import product_dtype, without_autocast
from train.data import IGNORED

# Float32 bytes of one chunk of logits. On a CPU it should stay near the caches; a GPU needs more columns to be busy.
CPU_CHUNK_BYTES = 16 * 2**20
CUDA_CHUNK_BYTES = 256 * 2**20
# Narrower slices than this make the matrix products inefficient, so rows are split first.
NARROWEST_SLICE = 1024
FEWEST_ROWS = 16


def linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    denominator: float | Tensor,
    *,
    labelled: int | None = None,
    rows: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Sum of the cross-entropy over labelled rows, divided by `denominator`: a float32 scalar.

    hidden [N, H]; head_weight [V, H], trainable or frozen; labels [N] int64 with -100 where there is no loss (already
    shifted: labels[i] is what row i predicts). `denominator` is usually the number of labelled tokens of the whole
    step; a tensor must be a scalar. Equals `F.cross_entropy(hidden @ head_weight.T, labels, reduction="sum") /
    denominator`; 0 with zero gradients when no row is labelled. Products run in the dtype that `product_dtype` gives
    for the head's dtype, everything else in float32. Gradients are computed in the forward pass, and only where they
    are required; under `torch.no_grad()` none are.

    `labelled` is the number of labels that aren't -100, when the caller knows it: on CUDA that saves a wait for the
    device. `rows`, at least as many, is how many rows are computed instead, others without a loss among them: then no
    shape depends on the labels. `chunk_bytes` bounds the logits held at a time (default: 16 MiB on CPU, 256 MiB on
    CUDA) and, where the head has to be upcast, the upcast part of it; no fewer than 16 rows by 64 words are used.

    Raises NibbleError for a label outside 0..V-1 (on CUDA a device-side assertion, which costs no wait).
    """
    if hidden.ndim != 2 or head_weight.ndim != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(f"hidden [N, H] and head [V, H] don't fit: {tuple(hidden.shape)}, {tuple(head_weight.shape)}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be [N] = [{hidden.shape[0]}], not {tuple(labels.shape)}")
    chunk_bytes = chunk_bytes or _chunk_bytes(hidden)
    unlabelled = None
    if rows is None:
        chosen = _labelled_rows(labels, labelled)
        targets = labels.index_select(0, chosen)
    else:
        torch._assert_async((labels != IGNORED).sum() <= rows, "linear_cross_entropy: more labels than `rows`")
        chosen = (labels == IGNORED).to(torch.uint8).argsort(stable=True)[:rows]  # those with a label come first
        targets = labels.index_select(0, chosen)
        unlabelled = targets == IGNORED
        targets = targets.masked_fill(unlabelled, 0)
    _check_targets(targets, chosen, head_weight.shape[0])
    if torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, head_weight, chosen, targets, unlabelled, denominator, chunk_bytes)
    loss, _, _ = _loss_and_gradients(
        hidden, head_weight, chosen, targets, unlabelled, denominator, chunk_bytes, False, False
    )
    return loss


@torch.no_grad()
@without_autocast
def label_losses(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, *, labelled: int | None = None, chunk_bytes: int | None = None
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each labelled row, float32 [n], and whether its label has the largest logit, bool [n].

    Arguments and errors as for `linear_cross_entropy`, whose result is the sum of these losses; chunks as there. Of
    equal logits the first is the largest, as for torch.argmax on a CPU.
    """
    chunk_bytes = chunk_bytes or _chunk_bytes(hidden)
    rows = _labelled_rows(labels, labelled)
    targets = labels.index_select(0, rows)
    _check_targets(targets, rows, head_weight.shape[0])
    n, vocabulary = len(rows), head_weight.shape[0]
    losses = hidden.new_empty(n, dtype=torch.float32)
    correct = torch.empty(n, dtype=torch.bool, device=hidden.device)
    dtype = product_dtype(hidden.device, head_weight.dtype)
    width = head_weight.shape[1] if dtype != head_weight.dtype else 0
    block, columns = _chunk_shape(max(n, 1), vocabulary, width, chunk_bytes)
    buffer = hidden.new_empty(block * columns, dtype=torch.float32)
    for start in range(0, n, block):
        x = hidden.index_select(0, rows[start : start + block]).to(dtype)
        target = targets[start : start + block, None]
        top = torch.full_like(target, float("-inf"), dtype=torch.float32)
        total, picked, best = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(target)
        for first in range(0, vocabulary, columns):
            part = slice(first, min(first + columns, vocabulary))
            w = head_weight[part].to(dtype)
            logits = _product(x, w.T, buffer[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0]))
            column, inside = _columns_of(target, part)
            picked = torch.where(inside, logits.gather(1, column), picked)
            highest, where = logits.max(1, keepdim=True)
            best = torch.where(highest > top, where + first, best)
            higher = torch.maximum(top, highest)
            total.mul_((top - higher).exp_()).add_(logits.sub_(higher).exp_().sum(1, keepdim=True))
            top = higher
        losses[start : start + block] = (top - picked).add_(total.log()).squeeze(1)
        correct[start : start + block] = (best == target).squeeze(1)
    return losses, correct


def _chunk_bytes(hidden: Tensor) -> int:
    return CPU_CHUNK_BYTES if on_cpu(hidden.device) else CUDA_CHUNK_BYTES


def _labelled_rows(labels: Tensor, labelled: int | None) -> Tensor:
    """Indices [n] of the rows with a label."""
    mask = labels != IGNORED
    if not on_cpu(labels.device) and labelled is not None:
        torch._assert_async(mask.sum() == labelled, "linear_cross_entropy: `labelled` isn't the number of labels")
        return torch.nonzero_static(mask, size=labelled).squeeze(1)
    return mask.nonzero().squeeze(1)


def _check_targets(targets: Tensor, rows: Tensor, vocabulary: int) -> None:
    if targets.numel() == 0:
        return
    wrong = (targets < 0) | (targets >= vocabulary)
    if not on_cpu(targets.device):
        torch._assert_async(~wrong.any(), f"linear_cross_entropy: a label lies outside 0..{vocabulary - 1}")
    elif wrong.any():
        first = int(wrong.nonzero()[0])
        raise NibbleError(
            f"label {int(targets[first])} at token {int(rows[first])} of the batch lies outside the model's vocabulary"
            f" of {vocabulary:,}.\n"
            f"Do tokenizer and model belong together? Labels are 0..{vocabulary - 1}, or {IGNORED} for no loss."
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves the finished gradients [n, H] and [V, H]; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor,
        targets: Tensor,
        unlabelled: Tensor | None,
        denominator: float | Tensor,
        chunk_bytes: int,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss, d_hidden, d_weight = _loss_and_gradients(
            hidden, weight, rows, targets, unlabelled, denominator, chunk_bytes, need_hidden, need_weight
        )
        ctx.tokens = hidden.shape[0]
        ctx.save_for_backward(rows, d_hidden, d_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        rows, d_hidden, d_weight = ctx.saved_tensors
        full = None
        if d_hidden is not None:
            full = d_hidden.new_zeros(ctx.tokens, d_hidden.shape[1])
            full.index_copy_(0, rows, d_hidden * grad_loss)
        return full, None if d_weight is None else d_weight * grad_loss, None, None, None, None, None


@without_autocast
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    unlabelled: Tensor | None,
    denominator: float | Tensor,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss (float32 scalar), its gradient for the labelled rows [n, H] and for the head [V, H].

    For a row with label y, e_v = exp(logit_v - max) and R = sum of e_v over v ≠ y, the gradient of the loss is
    (sum_{v≠y} e_v w_v - R w_y) / (R + e_y). Leaving y out of the sum keeps the small gradients of confident rows exact:
    p_y - 1 is never formed by subtraction, nor rounded to bfloat16.
    unlabelled: bool [n], the rows without a loss, whose targets are any; None: there are none.
    """
    n, width, vocabulary = rows.shape[0], hidden.shape[1], weight.shape[0]
    dtype = product_dtype(hidden.device, weight.dtype)
    loss = hidden.new_zeros((), dtype=torch.float32)
    d_hidden = hidden.new_zeros(n, width) if need_hidden else None
    d_weight = hidden.new_zeros(vocabulary, width, dtype=torch.float32) if need_weight else None
    if n == 0:  # before the division: the denominator may be 0 too
        return loss, d_hidden, None if d_weight is None else d_weight.to(weight.dtype)

    upcast = dtype != weight.dtype
    block, columns = _chunk_shape(n, vocabulary, width if upcast else 0, chunk_bytes)
    slices = [slice(v, min(v + columns, vocabulary)) for v in range(0, vocabulary, columns)]
    buffer = hidden.new_empty(block * columns, dtype=torch.float32)
    scratch = hidden.new_empty(columns, width, dtype=dtype) if upcast else None

    def head(part: slice) -> Tensor:
        if scratch is None:
            return weight[part]
        return scratch[: part.stop - part.start].copy_(weight[part])

    def logits_of(x: Tensor, w: Tensor) -> Tensor:
        return _product(x, w.T, buffer[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0]))

    for start in range(0, n, block):
        x = hidden.index_select(0, rows[start : start + block]).to(dtype)
        target = targets[start : start + block, None]
        top = torch.full_like(target, float("-inf"), dtype=torch.float32)  # running maximum of the logits
        rest = torch.zeros_like(top)  # R, relative to `top`
        picked = torch.zeros_like(top)  # the label's logit
        d_x = torch.zeros_like(x, dtype=torch.float32) if need_hidden else None
        for part in slices:
            w = head(part)
            logits = logits_of(x, w)
            column, inside = _columns_of(target, part)
            picked = torch.where(inside, logits.gather(1, column), picked)
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            decay = (top - higher).exp_()
            top = higher
            e = logits.sub_(top).exp_()
            e.scatter_(1, column, e.gather(1, column).masked_fill_(inside, 0.0))
            rest.mul_(decay).add_(e.sum(1, keepdim=True))
            if d_x is not None:
                _add_product(d_x.mul_(decay), e.to(dtype), w)
        total = rest + (picked - top).exp_()
        none = None if unlabelled is None else unlabelled[start : start + block, None]
        loss += _without((top - picked).add_(total.log()), none).sum()

        if d_x is not None and d_hidden is not None:
            own = weight.index_select(0, target.squeeze(1)).float()
            d_hidden[start : start + block] = _without(d_x.sub_(own.mul_(rest)).div_(total.mul(denominator)), none)
        if d_weight is not None:
            for part in slices:
                if len(slices) == 1:  # the buffer still holds e
                    p = e.div_(total)
                else:
                    p = logits_of(x, head(part)).sub_(top).exp_().div_(total)
                column, inside = _columns_of(target, part)
                p.scatter_(1, column, torch.where(inside, -rest / total, p.gather(1, column)))
                _add_product(d_weight[part], _without(p, none).to(dtype).T, x)

    if d_weight is not None:
        d_weight = d_weight.div_(denominator).to(weight.dtype)
    return loss / denominator, d_hidden, d_weight


def _without(x: Tensor, rows: Tensor | None) -> Tensor:
    """x [n, …] with zeros in the rows bool [n, 1], in place."""
    return x if rows is None else x.masked_fill_(rows, 0.0)


def _chunk_shape(rows: int, vocabulary: int, upcast_width: int, chunk_bytes: int) -> tuple[int, int]:
    """Rows and columns of a chunk: float32 [rows, columns] and [columns, upcast_width] fit in chunk_bytes."""
    numbers = chunk_bytes // 4
    block = min(rows, max(FEWEST_ROWS, numbers // min(vocabulary, NARROWEST_SLICE)))
    columns = max(64, min(vocabulary, numbers // max(block, upcast_width)))
    slices = -(-vocabulary // columns)
    return block, -(-vocabulary // slices)  # evenly wide: no sliver at the end


def _columns_of(target: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Column of each row's label in the vocabulary slice (clamped into it), and whether it lies there: [rows, 1]."""
    column = target - part.start
    inside = (column >= 0) & (column < part.stop - part.start)
    return column.clamp_(0, part.stop - part.start - 1), inside


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out (float32) = a @ b, accumulated in float32; a CPU rounds a bfloat16 product to bfloat16 on the way."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if not on_cpu(a.device):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (float32) += a @ b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif not on_cpu(a.device):
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.add_(torch.mm(a, b))
