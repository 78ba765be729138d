"""What generation keeps of the tokens so far, so that the next ones needn't compute them again.

A cache has a row for each document. A forward pass takes `Continued` documents: the next tokens of some rows, any
number of them each. Every module that mixes tokens keeps its own: attention what keys and values are made of, token by
token (`Cache.history`), linear attention a state of fixed size (`Cache.state`). No token is padding; the slots behind a
row's last token are never attended to.

Shapes: B rows, N tokens of a pass, T tokens of one document of it, S tokens that these can see, C channels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.documents import Documents


class History:
    """A vector of every head for each token of each row: `buffer` [B, heads, slots, width].

    The token at position p is in slot p, or, where only a window of tokens is kept, in slot p % window. Slots without a
    token are zeros, so that a score of -inf is enough to leave them out.
    """

    def __init__(self, rows: int, like: Tensor, window: int | None) -> None:
        """like: tokens [N, heads, width] as they will come."""
        self.window = window
        self.buffer = like.new_zeros(rows, like.shape[1], 0, like.shape[2])

    def extend(self, row: int, before: int, new: Tensor) -> Tensor:
        """Keeps `new` [T, heads, width], the tokens of a row from position `before` on.

        Returns [heads, S, width], in the order of positions: the tokens that at least one of the new ones can see, the
        new ones last.
        """
        end, new, window = before + len(new), new.transpose(0, 1), self.window
        if window is None:
            self._reserve(end)
            self.buffer[row, :, before:end] = new
            return self.buffer[row, :, :end]
        self._reserve(min(end, window))
        kept = self.buffer[row]

        def slots(start: int, stop: int) -> Tensor:
            return torch.arange(start, stop, device=new.device) % window

        seen = torch.cat((kept.index_select(1, slots(max(0, before - window + 1), before)), new), dim=1)
        first = max(before, end - window)
        kept.index_copy_(1, slots(first, end), new[:, first - before :])
        return seen

    def step(self, positions: Tensor, longest: int, new: Tensor) -> Tensor:
        """Keeps one token of each row, `new` [B, heads, width] at `positions` int64 [B], all below `longest`.

        Returns [B, heads, S, width], where row b sees the first positions[b] + 1 slots, or all.
        """
        size = longest if self.window is None else min(longest, self.window)
        self._reserve(size)
        slots = positions if self.window is None else positions % self.window
        self.buffer[torch.arange(len(new), device=slots.device), :, slots] = new
        return self.buffer[:, :, :size]

    def _reserve(self, slots: int) -> None:
        """Makes room by a quarter at a time, so that a token's share of all the copying stays the same."""
        there = self.buffer.shape[2]
        if slots > there:
            roomy = max(slots, there + there // 4 + 64)
            more = (roomy if self.window is None else min(roomy, self.window)) - there
            self.buffer = F.pad(self.buffer, (0, 0, 0, more))


class Cache:
    """Everything that a model keeps of B rows, by the module that keeps it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._histories: dict[tuple[nn.Module, str], History] = {}
        self._states: dict[tuple[nn.Module, str], Tensor] = {}

    def history(self, owner: nn.Module, name: str, like: Tensor, window: int | None = None) -> History:
        """The owner's history of that name, empty at first; see `History` for the arguments."""
        key = (owner, name)
        if key not in self._histories:
            self._histories[key] = History(self.rows, like, window)
        return self._histories[key]

    def state(self, owner: nn.Module, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """The owner's tensor [B, *shape] of that name, to be written to in place; zeros at first, as `like` is."""
        key = (owner, name)
        if key not in self._states:
            self._states[key] = like.new_zeros(self.rows, *shape)
        return self._states[key]

    def select(self, rows: Sequence[int]) -> None:
        """Leaves these rows, in this order, and forgets the others."""
        self.rows = len(rows)
        for history in self._histories.values():
            history.buffer = history.buffer[list(rows)]
        for key, state in self._states.items():
            self._states[key] = state[list(rows)]

    @property
    def nbytes(self) -> int:
        return sum(h.buffer.nbytes for h in self._histories.values()) + sum(s.nbytes for s in self._states.values())


@dataclass(frozen=True)
class Piece:
    """The tokens of a pass that continue one row.

    tokens: where they are in the flat batch. before: tokens of the row that were there already. total: tokens that the
    row will have when everything is computed that is known of it: more than there are now in the first pieces of a long
    prompt.
    """

    row: int
    tokens: slice
    before: int
    total: int

    @property
    def end(self) -> int:
        return self.before + self.tokens.stop - self.tokens.start


@dataclass(frozen=True, kw_only=True)
class Continued(Documents):
    """Documents whose earlier tokens are in a cache. `positions` go on from there; `rows` int64 [N]: of each token."""

    cache: Cache
    pieces: tuple[Piece, ...]
    rows: Tensor

    @staticmethod
    def of(cache: Cache, pieces: Sequence[tuple[int, int, int, int]], device: torch.device) -> Continued:
        """pieces: row, tokens, tokens before, and tokens in total as in `Piece`, of every document."""
        rows, lengths, before, totals = zip(*pieces, strict=True)
        plain = Documents.from_lengths(lengths, device)
        ends = list(itertools.accumulate(lengths))
        slices = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

        def by_token(values: Sequence[int]) -> Tensor:
            """A number of each document, for each of its tokens."""
            return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(device)

        return Continued(
            plain.lengths,
            plain.offsets,
            plain.positions + by_token(before),
            cache=cache,
            pieces=tuple(map(Piece, rows, slices, before, totals)),
            rows=by_token(rows),
        )

    @functools.cached_property
    def is_step(self) -> bool:
        """Whether it is one token of every row, in the order of rows."""
        each = set(self.lengths) == {1} and len(self.pieces) == self.cache.rows
        return each and all(piece.row == index for index, piece in enumerate(self.pieces))

    @functools.cached_property
    def are_new(self) -> bool:
        """Whether nothing came before, so that the documents can be computed like any others."""
        return not any(piece.before for piece in self.pieces)

    @functools.cached_property
    def reach(self) -> int:
        """Tokens of the longest row, with those of this pass."""
        return max(piece.end for piece in self.pieces)

    def keep(self, history: History, new: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Keeps `new` [N, heads, width]; yields each piece with what `History.extend` returns for it."""
        for piece in self.pieces:
            yield piece, history.extend(piece.row, piece.before, new[piece.tokens])

    def store(self, history: History, new: Tensor) -> None:
        """`keep` for when nothing is read."""
        if self.is_step:
            history.step(self.positions, self.reach, new)
        else:
            for _ in self.keep(history, new):
                pass
