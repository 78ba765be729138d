"""The log-probabilities of the labelled tokens of any documents, by the model with its adapter and without.

Shapes: D documents, of which each has its tokens and a mask of those that carry loss (train/data/labels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.decoder import CausalLM
from parallel.world import ALONE, World
from train.data.batches import empty_batch, make_batch
from train.data.examples import Examples
from train.data.packing import pack
from train.loss import label_losses

BATCH_TOKENS = 8192  # computed at a time, on each process

Documents = Examples | Sequence[tuple[Sequence[int], Sequence[bool]]]


@dataclass(frozen=True)
class Scores:
    """Of each document: losses float64 [D], the sum of the cross-entropy over its labelled tokens, in nats (not finite
    where the weights give such numbers); correct int64 [D], how many of these tokens have the largest logit.
    """

    losses: NDArray[np.float64]
    correct: NDArray[np.int64]


def score(
    model: CausalLM,
    documents: Documents,
    device: torch.device,
    *,
    batch_tokens: int = BATCH_TOKENS,
    world: World = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """The scores of all documents, which each process of `world` has; the same on all of them.

    Every process computes its share of the batches, which are filled with whole documents up to `batch_tokens` (a
    longer document is a batch by itself). progress: gets the batches done and their number.
    The first token of a document has nothing before it to be predicted from, and no label.
    """
    lengths = np.array([len(documents[index][0]) for index in range(len(documents))], np.int32)
    sums = torch.zeros(2, len(lengths), dtype=torch.float64)
    batches = pack(lengths, max(batch_tokens, int(lengths.max(initial=1))))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(batches), world.size):
                progress(first, len(batches))
                number = first + world.rank
                # The others may wait for this process's part of the weights, so it computes something all the same.
                chosen = batches[number] if number < len(batches) else np.zeros(0, np.int64)
                _add_batch(model, documents, chosen, device, sums)
    finally:
        model.train(was_training)
    losses, correct = world.sum(sums).numpy()
    return Scores(losses, correct.astype(np.int64))


def _add_batch(
    model: CausalLM, documents: Documents, chosen: NDArray[np.int64], device: torch.device, sums: Tensor
) -> None:
    batch = (make_batch(documents, chosen) if len(chosen) else empty_batch()).to(device)
    hidden = model.hidden(batch.tokens, batch.documents)

    def of_labels(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return label_losses(hidden, weight, batch.labels, labelled=batch.labelled)

    losses, correct = model.head.reduce(hidden, of_labels)
    owners = torch.from_numpy(np.repeat(chosen, [np.count_nonzero(documents[int(index)][1][1:]) for index in chosen]))
    sums.index_add_(1, owners, torch.stack((losses.double(), correct.double())).cpu())
