"""The loss of a model on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from models.decoder import CausalLM
from quant.errors import NibbleError
from quant.storage import DenseStorage
from train.batches import Batch
from train.loss import linear_cross_entropy


def batch_loss(model: CausalLM, batch: Batch, denominator: float) -> Tensor:
    """Sum of the cross-entropy over the batch's labelled tokens, divided by `denominator`: a float32 scalar.

    `batch` must be on the model's device. The logits of all tokens never exist at once.
    """
    head = model.head.weight
    assert isinstance(head, DenseStorage)  # heads are never quantised
    hidden = model.hidden(batch.tokens, batch.documents)
    return linear_cross_entropy(hidden, head.value, batch.labels, denominator, labelled=batch.labelled)


def held_out_loss(
    model: CausalLM,
    batches: Iterable[Batch],
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda done: None,
) -> float | None:
    """Mean loss per labelled token, in nats, over all batches; None when `stop` said so on the way.

    The model is left in the mode (training or not) in which it was. `progress` gets the number of batches done.
    Raises NibbleError when the loss is not finite.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    labelled = 0
    try:
        with torch.no_grad():
            for done, batch in enumerate(batches):
                if stop():
                    return None
                progress(done)
                if batch.labelled:
                    total += batch_loss(model, batch.to(device), denominator=1.0)
                    labelled += batch.labelled
    finally:
        model.train(was_training)
    if labelled == 0:
        raise NibbleError("the held-out rows have no token to learn, so there is no loss to measure.\nSee data.eval.")
    loss = total.item() / labelled
    if not math.isfinite(loss):
        raise NibbleError(
            f"the held-out loss is {loss}: the weights give numbers that are not finite.\n"
            "Lower train.learning_rate or lengthen train.warmup_ratio, and look at metrics.jsonl for where it began."
        )
    return loss
