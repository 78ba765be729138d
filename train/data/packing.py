"""Documents of different lengths into sequences of one length, without splitting any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PACKING = 2  # keeps this shuffle apart from the others made with the same seed


@dataclass(frozen=True)
class Packing:
    """Which documents share a sequence.

    order: int64 [D], document numbers; sequence s holds order[offsets[s]:offsets[s + 1]].
    offsets: int64 [S + 1]. fill: share of S × sequence_length positions that hold a token, 0 to 1.
    """

    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    fill: float

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sequence: int) -> NDArray[np.int64]:
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        return self.order[self.offsets[sequence] : self.offsets[sequence + 1]]


def shuffled(count: int, *seed: int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on the seeds only, not on the version of numpy.

    Sorts raw 64-bit outputs of PCG64, which numpy keeps fixed; its own shuffling methods may change.
    """
    raw = np.random.PCG64(np.random.SeedSequence(list(seed))).random_raw(count)
    return np.argsort(raw, kind="stable")


def pack(lengths: NDArray[np.int32], sequence_length: int, seed: int = 0, enabled: bool = True) -> Packing:
    """Best-fit decreasing: longest documents first, each into the fullest sequence that still has room.

    lengths: tokens of each document, 1 to sequence_length. Documents of equal length are interchangeable, so the
    seed decides which of them meet; the number of sequences doesn't depend on it. enabled False gives every
    document a sequence of its own. Needs at most 11/9 of the fewest sequences possible, + 4 (Johnson et al. 1974).
    """
    if len(lengths) == 0:
        return Packing(np.zeros(0, np.int64), np.zeros(1, np.int64), 0.0)
    if int(lengths.min()) < 1 or int(lengths.max()) > sequence_length:
        raise ValueError(f"lengths must be 1 to {sequence_length}, got {lengths.min()} to {lengths.max()}")
    if enabled:
        documents = shuffled(len(lengths), seed, _PACKING)
        documents = documents[np.argsort(-lengths[documents].astype(np.int64), kind="stable")]
        sequences = np.array(_best_fit(lengths[documents].tolist(), sequence_length), np.int64)
        order = documents[np.argsort(sequences, kind="stable")]
        offsets = np.concatenate(([0], np.cumsum(np.bincount(sequences))))
    else:
        order, offsets = np.arange(len(lengths)), np.arange(len(lengths) + 1)
    fill = float(lengths.sum(dtype=np.int64)) / ((len(offsets) - 1) * sequence_length)
    return Packing(order, offsets, fill)


def _best_fit(lengths: list[int], room: int) -> list[int]:
    """The sequence of each document, for lengths that don't increase.

    `free[r]` holds the sequences with r positions left and bit r of `rooms` is set when there are any, so the
    smallest sufficient r is one shift and one lowest set bit, whatever the number of sequences.
    """
    smallest = lengths[-1]
    free: list[list[int]] = [[] for _ in range(room + 1)]
    rooms = opened = 0
    result = []
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            sequence = free[left].pop()
            if not free[left]:
                rooms ^= 1 << left
        else:
            left, sequence = room, opened
            opened += 1
        result.append(sequence)
        left -= length
        if left >= smallest:
            if not free[left]:
                rooms |= 1 << left
            free[left].append(sequence)
    return result
