"""The loss of a model on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from models.decoder import CausalLM
from parallel.world import ALONE, World
from quant.common.errors import NibbleError
from train.data.batches import Batch
from train.loss import linear_cross_entropy


def batch_loss(model: CausalLM, batch: Batch, denominator: float | Tensor, rows: int | None = None) -> Tensor:
    """Sum of the cross-entropy over the batch's labelled tokens, divided by `denominator`: a float32 scalar.

    `batch` must be on the model's device. The logits of all tokens never exist at once.
    rows: of `linear_cross_entropy`.
    """

    def cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, batch.labels, denominator, labelled=batch.labelled, rows=rows)

    return model.head.reduce(model.hidden(batch.tokens, batch.documents), cross_entropy)


def held_out_loss(
    model: CausalLM,
    batches: Iterable[Batch],
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda done: None,
    world: World = ALONE,
) -> float | None:
    """Mean loss per labelled token, in nats, over all batches; None when `stop` returned true on the way.

    The model is left in the mode (training or not) in which it was. `progress` gets the number of batches done.
    With several processes each has its own batches, as many as the others; the result is that of all of them together,
    and a `stop` on one of them stops all.
    Raises NibbleError, on every process, when no token is labelled or the loss is not finite.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    labelled = 0
    try:
        with torch.no_grad():
            for done, batch in enumerate(batches):
                if world.max(torch.tensor(int(stop()))):
                    return None
                progress(done)
                # The others may wait for this process's part of the weights.
                if batch.labelled or world.size > 1 or (model.usage is not None and model.usage.counting):
                    total += batch_loss(model, batch.to(device), denominator=1.0)
                    labelled += batch.labelled
    finally:
        model.train(was_training)
    loss_sum, labelled_sum = world.sum(torch.stack((total, total.new_tensor(labelled)))).tolist()
    if labelled_sum == 0:
        raise NibbleError("the held-out rows have no token to learn, so there is no loss to measure.\nSee data.eval.")
    loss: float = loss_sum / labelled_sum
    if not math.isfinite(loss):
        raise NibbleError(
            f"the held-out loss is {loss}: the weights give numbers that are not finite.\n"
            "Lower train.learning_rate or lengthen train.warmup_ratio, and look at metrics.jsonl for where it began."
        )
    return loss
