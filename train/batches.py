"""Packed sequences to the batches of an optimiser step, in an order that can be taken up again exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.documents import Documents
from quant.errors import NibbleError
from train.examples import Examples
from train.loss import IGNORED
from train.packing import Packing, shuffled

MULTIPLE = 64  # flat batches are padded to a multiple of this
_ORDER = 3  # keeps this shuffle apart from the others made with the same seed


@dataclass(frozen=True)
class Batch:
    """One micro-batch: D documents one after another, N tokens in all.

    tokens: int64 [N]. labels: int64 [N], already shifted: labels[i] is what position i must predict, IGNORED where
    there is no loss; the last token of a document predicts nothing. documents: where they begin and end.
    real_tokens: N without padding. labelled: labels that aren't IGNORED.

    The last document may be padding (token 0, no labels), which makes N a multiple of 64: a run then sees few
    different matrix shapes.
    """

    tokens: Tensor
    labels: Tensor
    documents: Documents
    real_tokens: int
    labelled: int

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.tokens.to(device),
            self.labels.to(device),
            Documents.from_lengths(self.documents.lengths, device, self.documents.padding),
            self.real_tokens,
            self.labelled,
        )


def make_batch(examples: Examples, indices: Iterable[int], multiple: int = MULTIPLE) -> Batch:
    """The documents `indices` as one flat batch, padded to a multiple of `multiple` tokens."""
    chosen = [examples[int(index)] for index in indices]
    lengths = [len(tokens) for tokens, _ in chosen]
    real = sum(lengths)
    padding = -real % multiple
    if padding:
        lengths.append(padding)
    flat = np.zeros(real + padding, np.int64)
    labels = np.full(real + padding, IGNORED, np.int64)
    start = 0
    for tokens, mask in chosen:
        end = start + len(tokens)
        flat[start:end] = tokens
        labels[start : end - 1] = np.where(mask[1:], tokens[1:], IGNORED)
        start = end
    labelled = int(np.count_nonzero(labels != IGNORED))
    documents = Documents.from_lengths(lengths, padding=padding)
    return Batch(torch.from_numpy(flat), torch.from_numpy(labels), documents, real, labelled)


class StepBatches:
    """The micro-batches of every optimiser step, epoch after epoch without end.

    A step is up to `gradient_accumulation` micro-batches of up to `micro_batch_size` sequences each. Every epoch
    has all sequences once, in an order that depends on (seed, epoch) only; its last step takes what is left.
    Iterating yields one list of batches per step and advances `epoch` and `position`.
    """

    def __init__(
        self,
        examples: Examples,
        packing: Packing,
        *,
        micro_batch_size: int,
        gradient_accumulation: int = 1,
        seed: int = 0,
    ):
        if len(packing) == 0:
            raise ValueError("there are no sequences to train on")
        self._examples, self._packing, self._seed = examples, packing, seed
        self._micro_batch_size = micro_batch_size
        self._per_step = micro_batch_size * gradient_accumulation
        self._fingerprint: str | None = None
        self.epoch = 0
        self.position = 0  # sequences of this epoch that earlier steps have taken
        self._order = self._epoch_order()

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._packing) // self._per_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The next step; never ends: the caller counts steps."""
        chosen = self._order[self.position : self.position + self._per_step]
        size = self._micro_batch_size
        step = [self._batch(chosen[start : start + size]) for start in range(0, len(chosen), size)]
        self.position += len(chosen)
        if self.position >= len(self._packing):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._epoch_order()
        return step

    def _batch(self, sequences: np.ndarray) -> Batch:
        return make_batch(self._examples, np.concatenate([self._packing[int(s)] for s in sequences]))

    def _epoch_order(self) -> np.ndarray:
        return shuffled(len(self._packing), self._seed, _ORDER, self.epoch)

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as plain values for a checkpoint."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self._seed,
            "sequences": len(self._packing),
            "data": self._data(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state()` was taken.

        Raises NibbleError when the data, their packing or the seed are not the same, since the order would then
        mean other rows. A different batch size is fine: the position counts sequences.
        """
        if state["seed"] != self._seed:
            raise NibbleError(
                f"train.seed is {self._seed}, but the checkpoint was written with {state['seed']}.\n"
                "Use the same seed, or start anew in another output.dir."
            )
        if state["sequences"] != len(self._packing) or state["data"] != self._data():
            raise NibbleError(
                f"the training rows are not those of the checkpoint ({state['sequences']:,} packed sequences there, "
                f"{len(self._packing):,} here,\nor other tokens): a file, the tokenizer, its template or a data.* key "
                "has changed.\nRestore them, or start anew in another output.dir."
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._epoch_order()

    def _data(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self._examples, self._packing)
        return self._fingerprint


class EvalBatches:
    """All sequences once, in fixed order, as often as it is iterated over."""

    def __init__(self, examples: Examples, packing: Packing, *, micro_batch_size: int):
        self._examples, self._packing, self._size = examples, packing, micro_batch_size
        self._fingerprint: str | None = None

    def fingerprint(self) -> str:
        """Changes when any token or its place does: losses are then not to be compared."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self._examples, self._packing)
        return self._fingerprint

    def __len__(self) -> int:
        return -(-len(self._packing) // self._size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._packing), self._size):
            sequences = range(start, min(start + self._size, len(self._packing)))
            yield make_batch(self._examples, np.concatenate([self._packing[s] for s in sequences]))


def _fingerprint(examples: Examples, packing: Packing) -> str:
    digest = hashlib.sha256(examples.fingerprint().encode())
    digest.update(packing.order.astype(np.int64).tobytes())
    digest.update(packing.offsets.astype(np.int64).tobytes())
    return digest.hexdigest()
