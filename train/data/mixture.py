"""How often each row is learnt, where `data.train` or `data.eval` gives files weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.config.row_paths import RowFile
from train.data.examples import Examples
from train.data.packing import shuffled

_WEIGHTS = 4  # keeps these shuffles apart from the others made with the same seed


def copies_of_rows(
    examples: Examples, files: Sequence[RowFile], rows: Sequence[int], seed: int
) -> NDArray[np.int32] | None:
    """int32 [rows read]: how often each row is learnt; None where every file has weight 1.

    rows: how many were read of each file. Of a weight the whole part counts for all usable rows of the file, the rest
    for that share of them, drawn by seed; at least one row of a file stays.
    """
    if all(file.weight == 1 for file in files):
        return None
    copies = np.zeros(sum(rows), np.int32)
    usable, start = np.unique(examples.rows), 0
    for number, (file, count) in enumerate(zip(files, rows, strict=True)):
        own = usable[(usable >= start) & (usable < start + count)]
        whole = int(file.weight)
        drawn = round((file.weight - whole) * len(own))
        copies[own] = whole
        copies[own[shuffled(len(own), seed, _WEIGHTS, number)[: drawn if whole else max(drawn, 1)]]] += 1
        start += count
    return copies


def repeated(examples: Examples, copies: NDArray[np.int32] | None) -> Examples:
    """The examples with those of each row as often as `copies` says; no tokens are copied."""
    if copies is None:
        return examples
    return examples.subset(np.repeat(np.arange(len(examples)), copies[examples.rows]))
