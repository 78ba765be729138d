"""Random tokens as the batch that a native training step takes."""

from __future__ import annotations

from torch import Tensor

from models.blocks.documents import Documents
from train.data.batches import Batch


def one_document(tokens: Tensor) -> Batch:
    """Tokens [N] as a batch in which every token but the last predicts the next, as the peer's `labels` do."""
    labels = tokens.roll(-1)
    labels[-1] = -100
    return Batch(tokens, labels, Documents.from_lengths([len(tokens)]), len(tokens), len(tokens) - 1)
