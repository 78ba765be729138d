"""Where documents begin and end in a flat batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.common.devices import without_waiting


@dataclass(frozen=True)
class Documents:
    """D documents laid one after another in a flat batch of N tokens.

    Attention, convolutions and recurrent states stay inside a document, and positions restart at 0 in each,
    so a packed batch computes what its documents would compute alone.

    lengths: tokens of each document, on the host: loops and kernels need them without waiting for the device.
    offsets: int32 [D + 1], where each document starts, and N at the end (`cu_seqlens` of the flash kernels).
    positions: int64 [N], the position of each token in its document.
    padding: tokens at the end that only fill up the batch. They are computed like the others; what is counted over
        tokens leaves them out.
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    positions: Tensor
    padding: int = 0

    @staticmethod
    def from_lengths(lengths: Sequence[int], device: torch.device | str = "cpu", padding: int = 0) -> Documents:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"documents need a length of at least one token each, got {list(lengths)}")
        ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        starts = torch.cat((ends.new_zeros(1), ends))
        # Not repeat_interleave: it wakes every thread for a few hundred numbers, milliseconds on a busy machine.
        positions = torch.cat([torch.arange(length) for length in lengths])
        starts, positions = without_waiting(starts.int(), device), without_waiting(positions, device)
        return Documents(tuple(lengths), starts, positions, padding)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def real_tokens(self) -> int:
        return sum(self.lengths) - self.padding


@dataclass(frozen=True, kw_only=True)
class UnknownDocuments(Documents):
    """Documents of which the host knows only that none has more than `limit` tokens: a pass over them can be recorded
    and replayed with others in `offsets` and `positions`.

    lengths is empty, so that what depends on them fails. Documents at the end may have no tokens.
    """

    limit: int

    @property
    def longest(self) -> int:
        return self.limit
