"""Packed sequences to the batches of an optimiser step, in an order that can be resumed exactly.

With several processes a step's sequences are those of one process, distributed: its count sequences are cut into
micro-batches of min(micro_batch_size, ⌈count / ranks⌉), and micro-batch i goes to process i mod ranks. Where
gradient_accumulation is a multiple of the processes, these are one process's micro-batches; a step at the end of an
epoch with fewer than micro_batch_size × ranks sequences has smaller ones, which spread over more processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.blocks.documents import Documents
from quant.common.devices import without_waiting
from quant.common.errors import NibbleError
from train.data import IGNORED
from train.data.examples import Examples
from train.data.packing import Packing, shuffled

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
            without_waiting(self.tokens, device),
            without_waiting(self.labels, device),
            Documents.from_lengths(self.documents.lengths, device, self.documents.padding),
            self.real_tokens,
            self.labelled,
        )


def make_batch(
    examples: Examples | Sequence[tuple[Sequence[int], Sequence[bool]]],
    indices: Iterable[int],
    multiple: int = MULTIPLE,
) -> Batch:
    """The documents `indices` as one flat batch, padded to a multiple of `multiple` tokens.

    examples: of each document its tokens, and for every token whether it is to be learnt; the first one never is, since
    nothing stands before it to predict it from.
    """
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


def filled(batch: Batch, tokens: int, longest: int) -> Batch:
    """`batch`, on the host, with more padding: `tokens` in all, in documents of at most `longest` tokens."""
    missing, documents, pad = tokens - len(batch.tokens), batch.documents, torch.nn.functional.pad
    lengths = list(documents.lengths[:-1] if documents.padding else documents.lengths)
    padding = documents.padding + missing
    lengths += [min(longest, padding - start) for start in range(0, padding, longest)]
    return Batch(
        pad(batch.tokens, (0, missing)),
        pad(batch.labels, (0, missing), value=IGNORED),
        Documents.from_lengths(lengths, padding=padding),
        batch.real_tokens,
        batch.labelled,
    )


def empty_batch() -> Batch:
    """Padding alone: what a process computes while the others have rows and it has none."""
    labels = torch.full((MULTIPLE,), IGNORED, dtype=torch.int64)
    documents = Documents.from_lengths([MULTIPLE], padding=MULTIPLE)
    return Batch(torch.zeros(MULTIPLE, dtype=torch.int64), labels, documents, real_tokens=0, labelled=0)


class StepBatches:
    """The micro-batches of every optimiser step, epoch after epoch without end.

    A step is up to `micro_batch_size` × `gradient_accumulation` sequences, whatever the number of processes. Every
    epoch has all sequences once, in an order that depends on (seed, epoch) only; its last step takes what is left.
    Iterating yields the list of micro-batches that process `rank` of `ranks` computes in a step, of which the last may
    be empty: it is equally long on every process. It advances `epoch` and `position`, which are the same on all.
    """

    def __init__(
        self,
        examples: Examples,
        packing: Packing,
        *,
        micro_batch_size: int,
        gradient_accumulation: int = 1,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ):
        if len(packing) == 0:
            raise ValueError("there are no sequences to train on")
        self._examples, self._packing, self._seed = examples, packing, seed
        self._micro_batch_size, self._rank, self._ranks = micro_batch_size, rank, ranks
        self._per_step = micro_batch_size * gradient_accumulation
        self._fingerprint: str | None = None
        self.epoch = 0
        self.position = 0  # sequences of this epoch that earlier steps have taken, on all processes
        self._order = self._epoch_order()

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._packing) // self._per_step)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The next step; never ends: the caller counts steps."""
        chosen = self._order[self.position : self.position + self._per_step]
        shares = _share(len(chosen), self._micro_batch_size, self._rank, self._ranks)
        step = [_sequences(self._examples, self._packing, chosen[part.start : part.stop]) for part in shares]
        self.position += len(chosen)
        if self.position >= len(self._packing):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._epoch_order()
        return step

    def _epoch_order(self) -> np.ndarray:
        return shuffled(len(self._packing), self._seed, _ORDER, self.epoch)

    def state(self) -> dict[str, Any]:
        """Where the next step begins, as plain values for a checkpoint; the same on every process."""
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
        mean other rows. Another batch size or number of processes is fine: the position counts sequences.
        """
        if state["seed"] != self._seed:
            raise NibbleError(
                f"train.seed is {self._seed}, but the checkpoint was written with {state['seed']}.\n"
                "Use the same seed, or start a new run in another output.dir, or with --restart."
            )
        if state["sequences"] != len(self._packing) or state["data"] != self._data():
            raise NibbleError(
                f"the training rows are not those that the run began with ({state['sequences']:,} packed sequences, "
                f"{len(self._packing):,} now,\nor other tokens): a file, the tokenizer, its template or a data.* key "
                "has changed.\nRestore them, or start a new run in another output.dir, or with --restart."
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._epoch_order()

    def _data(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self._examples, self._packing)
        return self._fingerprint


class EvalBatches:
    """All sequences once, in fixed order, as often as it is iterated over.

    Process `rank` of `ranks` gets its share of the batches. Every process gets as many; the last may be empty.
    """

    def __init__(
        self, examples: Examples, packing: Packing, *, micro_batch_size: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self._examples, self._packing = examples, packing
        self._shares = _share(len(packing), micro_batch_size, rank, ranks)
        self._fingerprint: str | None = None

    def fingerprint(self) -> str:
        """Changes when any token or its place does: losses are then not to be compared. The same on every process."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self._examples, self._packing)
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[Batch]:
        return (_sequences(self._examples, self._packing, part) for part in self._shares)


def _share(count: int, micro_batch_size: int, rank: int, ranks: int) -> list[range]:
    """Which of `count` sequences process `rank` takes, a range per micro-batch; as many ranges on every process."""
    size = max(1, min(micro_batch_size, -(-count // ranks)))
    passes = -(-count // (size * ranks))
    starts = (min((i * ranks + rank) * size, count) for i in range(passes))
    return [range(start, min(start + size, count)) for start in starts]


def _sequences(examples: Examples, packing: Packing, sequences: Sequence[int] | np.ndarray) -> Batch:
    """The documents of `sequences` as one batch; no sequences make an empty one."""
    if len(sequences) == 0:
        return empty_batch()
    return make_batch(examples, np.concatenate([packing[int(sequence)] for sequence in sequences]))


def _fingerprint(examples: Examples, packing: Packing) -> str:
    digest = hashlib.sha256(examples.fingerprint().encode())
    digest.update(packing.order.astype(np.int64).tobytes())
    digest.update(packing.offsets.astype(np.int64).tobytes())
    return digest.hexdigest()
