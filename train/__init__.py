"""A training run: configuration, data, loss, optimiser, loop and outputs. Start one with `python -m train`.

For a loop of one's own, docs/research.md goes through the names below.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as`: public, for type checkers
    from parallel.shards import Shards as Shards
    from train.data.batches import make_batch as make_batch
    from train.loop import training_step as training_step
    from train.loss import linear_cross_entropy as linear_cross_entropy
    from train.optim import build_optimizer as build_optimizer
    from train.optim import clip_gradients as clip_gradients

# Imported when they are first asked for: `python -m train --help` answers without importing torch.
_HOMES = {
    "Shards": "parallel.shards",
    "build_optimizer": "train.optim",
    "clip_gradients": "train.optim",
    "linear_cross_entropy": "train.loss",
    "make_batch": "train.data.batches",
    "training_step": "train.loop",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
