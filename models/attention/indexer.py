"""Sparse attention with an indexer (DeepSeek-V3.2, arXiv:2512.02556 §2.1): queries attend to their best keys only.

A small scorer, the indexer, compares every query with all keys before it; attention then sees the `topk` keys with
the highest scores. A document of at most `topk` tokens sees everything, and its indexer is not run at all.

Shapes: N tokens of a flat batch, T tokens of one document, H hidden, h heads, S keys that a block of queries can see.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.attention.cache import Continued
from models.attention.causal import causal_attention
from models.attention.rope import rotate
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.blocks.linear import Linear
from models.blocks.precision import KeptInFloat32
from quant.common.devices import on_cpu
from quant.products import product_dtype, without_autocast

# Scores that exist at a time, over all heads: 128 MiB in float32, whatever the length of a document.
SCORES_IN_MEMORY = 2**25
QUERIES_IN_BLOCK = 256

KEY_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of a flat batch: short documents together, or one long document.

    rows: which tokens. documents: the short ones; None for a long document.
    """

    rows: slice
    documents: Documents | None


def parts_by_length(documents: Documents, longest: int) -> tuple[Part, ...]:
    """Cuts a flat batch around every document of more than `longest` tokens."""
    if documents.longest <= longest:
        return (Part(slice(0, len(documents.positions)), documents),)
    if not documents.lengths:
        raise ValueError(f"a recorded pass can't tell documents of more than {longest} tokens (index_topk) from others")
    parts, start = [], 0
    for is_long, group in itertools.groupby(documents.lengths, lambda length: length > longest):
        lengths = list(group)
        for together in [[length] for length in lengths] if is_long else [lengths]:
            stop = start + sum(together)
            short = None if is_long else Documents.from_lengths(together, documents.positions.device)
            parts.append(Part(slice(start, stop), short))
            start = stop
    return tuple(parts)


def _blocks(queries: int, keys: int, heads: int) -> Iterator[tuple[int, int]]:
    """Where blocks of queries of one document begin and end."""
    rows = max(1, min(QUERIES_IN_BLOCK, SCORES_IN_MEMORY // (heads * keys)))
    for start in range(0, queries, rows):
        yield start, min(start + rows, queries)


def _is_later(start: int, stop: int, device: torch.device) -> Tensor:
    """bool [stop - start, stop]: which keys come after each query of a block."""
    return torch.arange(stop, device=device) > torch.arange(start, stop, device=device)[:, None]


@dataclass(frozen=True)
class IndexerConfig:
    hidden: int
    query_rank: int  # of the attention's compressed queries, from which the indexer makes its own
    heads: int
    dim: int  # of a head's query, and of the key that all heads share
    rope_dim: int  # of these, the first ones, rotated
    topk: int


class _KeyNorm(KeptInFloat32):
    """LayerNorm in float32; the result has the dtype of x."""

    def __init__(self, size: int, factory: Factory) -> None:
        super().__init__()
        self.weight, self.bias = factory.float32.full(1.0, size), factory.float32.full(0.0, size)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.to(torch.float32), self.weight.shape, self.weight, self.bias, KEY_NORM_EPS).to(x.dtype)


class _HeadWeights(KeptInFloat32, Linear):
    """x [T, H]: how much each head's scores count, float32 [T, h]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.float32))


class Indexer(nn.Module):
    """Chooses keys. The choice has no gradient, so nothing trains an indexer, and it is never quantised."""

    group: ClassVar[Group] = "indexer"
    never_trained: ClassVar[bool] = True

    def __init__(self, config: IndexerConfig, factory: Factory) -> None:
        super().__init__()
        self.config = c = config
        self.wq_b = Linear(c.query_rank, c.heads * c.dim, factory.dense)
        self.wk = Linear(c.hidden, c.dim, factory.dense)
        self.k_norm = _KeyNorm(c.dim, factory)
        self.weights_proj = _HeadWeights(c.hidden, c.heads, factory.float32)

    @torch.no_grad()
    def forward(
        self, x: Tensor, latent: Tensor, parts: tuple[Part, ...], tables: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """x [N, H], compressed queries [N, query_rank], rotary tables float32 [N, rope_dim/2].

        Returns int32 [M, topk] for the M tokens of the long documents: positions of keys within the document, in no
        order. A query with fewer keys before it gets later ones too, which attention has to leave out. None where no
        document is long.
        """
        chosen = []
        for rows in (part.rows for part in parts if part.documents is None):
            own, length = (tables[0][rows], tables[1][rows]), rows.stop - rows.start
            chosen.append(self._select(x[rows], latent[rows], self._keys(x[rows], own), own, 0, length))
        return torch.cat(chosen) if chosen else None

    @torch.no_grad()
    def continued(
        self, x: Tensor, latent: Tensor, documents: Continued, tables: tuple[Tensor, Tensor]
    ) -> Tensor | None:
        """`forward` for documents with a cache, which keeps the keys.

        Returns int32 [N, K] for all tokens, K at most topk; None where nothing has more than topk tokens.
        """
        c = self.config
        keys = self._keys(x, tables)[:, None]
        history = documents.cache.history(self, "key", keys)
        longest = max(piece.total for piece in documents.pieces)
        # What a token sees that has too few others to choose from.
        selected = torch.arange(min(c.topk, longest), dtype=torch.int32, device=x.device).repeat(len(x), 1)
        for piece, seen in documents.keep(history, keys):
            if piece.total > c.topk:
                tokens = piece.tokens
                own = (tables[0][tokens], tables[1][tokens])
                selected[tokens] = self._select(x[tokens], latent[tokens], seen[0], own, piece.before, piece.total)
        return selected if longest > c.topk else None

    def _keys(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """[N, dim], in the dtype of x."""
        return self._rotate(self.k_norm(self.wk(x))[:, None], tables)[:, 0]

    def _select(
        self, x: Tensor, latent: Tensor, keys: Tensor, tables: tuple[Tensor, Tensor], before: int, width: int
    ) -> Tensor:
        """Tokens of one document: Σ over heads of weight · relu(q · k), and where it is highest.

        keys [before + T, dim], of all tokens so far; before: how many come before the T of x. width: tokens of the
        whole document, more than have keys where it is computed by pieces.
        """
        c = self.config
        query = self._rotate(self.wq_b(latent).unflatten(-1, (c.heads, c.dim)), tables).to(torch.float32)
        weights, key = self.weights_proj(x) * c.heads**-0.5, keys.to(torch.float32)
        chosen = torch.empty(len(x), c.topk, dtype=torch.int32, device=x.device)
        for start, stop in _blocks(len(x), width, c.heads):
            seen = before + stop
            by_head = torch.relu(torch.matmul(query[start:stop], key[:seen].t()) * c.dim**-0.5)
            scores = torch.matmul(weights[start:stop, None], by_head)[:, 0]
            scores = scores.masked_fill(_is_later(before + start, seen, x.device), float("-inf"))
            # Rows as long as the document: among equal scores (zero, often), topk's choice depends on the length.
            scores = F.pad(scores, (0, width - seen), value=float("-inf"))
            chosen[start:stop] = scores.topk(c.topk, dim=-1).indices
        return chosen

    def _rotate(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        rope, rest = x.split((self.config.rope_dim, self.config.dim - self.config.rope_dim), dim=-1)
        return torch.cat((rotate(rope, tables, interleaved=True), rest), dim=-1)


def selected_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: tuple[Part, ...], selected: Tensor | None, scale: float
) -> Tensor:
    """Causal attention, in which the tokens of long documents see only their selected keys.

    query and key [N, h, d], value [N, h, d_v]; selected int32 [M, topk] as an Indexer returns it. Returns [N, h, d_v].
    """
    out, row = [], 0
    for part in parts:
        # Not a slice of everything, whose gradient is a copy.
        q, k, v = (x if len(parts) == 1 else x[part.rows] for x in (query, key, value))
        if part.documents is not None:
            out.append(causal_attention(q, k, v, part.documents, scale))
        else:
            assert selected is not None
            out.append(_SelectedAttention.apply(q, k, v, selected[row : row + len(q)], scale))
            row += len(q)
    return torch.cat(out) if len(out) > 1 else out[0]


class _SelectedAttention(torch.autograd.Function):
    """One document, block of queries by block. Saves its inputs and computes probabilities again for the gradients.

    Scores are computed for all earlier keys and masked: gathering every query's own keys would move far more memory.
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, selected: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value, selected)
        ctx.scale = scale
        q, k, v = _heads_first(query, key, value)
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for start, stop in _blocks(len(query), len(query), query.shape[1]):
            chances = _probabilities(q, k, selected, start, stop, scale)
            out[start:stop] = torch.matmul(chances.to(v.dtype), v[:, :stop]).transpose(0, 1)
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, selected = ctx.saved_tensors
        q, k, v, dy = _heads_first(query, key, value, grad)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))  # sums over blocks
        for start, stop in _blocks(len(query), len(query), query.shape[1]):
            block, seen = slice(start, stop), slice(0, stop)
            chances = _probabilities(q, k, selected, start, stop, ctx.scale)
            dv[:, seen] += torch.matmul(chances.to(v.dtype).transpose(1, 2), dy[:, block])
            d_chances = _float32_product(dy[:, block], v[:, seen].transpose(1, 2))
            d_scores = chances * (d_chances - (chances * d_chances).sum(-1, keepdim=True)) * ctx.scale
            d_scores = d_scores.to(q.dtype)
            dq[:, block] = torch.matmul(d_scores, k[:, seen])
            dk[:, seen] += torch.matmul(d_scores.transpose(1, 2), q[:, block])
        grads = (x.transpose(0, 1).to(query.dtype) for x in (dq, dk, dv))
        return *grads, None, None


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[T, h, d] to [h, T, d], in the dtype of products."""
    return tuple(x.transpose(0, 1).to(product_dtype(x.device, x.dtype)).contiguous() for x in tensors)


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two batches without rounding the sums to the operands' dtype, as fused attention kernels have them."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if not on_cpu(a.device):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.to(torch.float32), b.to(torch.float32))


def _probabilities(query: Tensor, key: Tensor, selected: Tensor, start: int, stop: int, scale: float) -> Tensor:
    """Of the block's queries, over the keys up to its end: float32 [h, stop - start, stop]."""
    scores = _float32_product(query[:, start:stop], key[:, :stop].transpose(1, 2)) * scale
    hidden = torch.ones(stop - start, key.shape[1], dtype=torch.bool, device=key.device)
    hidden.scatter_(-1, selected[start:stop].long(), False)
    return scores.masked_fill_(hidden[:, :stop] | _is_later(start, stop, key.device), float("-inf")).softmax(-1)
