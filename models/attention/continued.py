"""Attention of new tokens to those that a cache has, for generation.

Shapes: B rows of the cache, N tokens of a pass, T tokens of one document of it, S tokens that these can see, K selected
tokens, h heads, g query heads that share one of h / g key heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.cache import Continued, History
from models.attention.causal import causal_attention
from quant.products import product_dtype

# Of queries by keys, which bounds the masks, and of numbers gathered for selected keys.
PAIRS_AT_A_TIME = 2**24
NUMBERS_AT_A_TIME = 2**25


def continued_attention(
    owner: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Continued,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """What `causal_attention` computes, with the keys and values that the cache has for `owner` before the given ones.

    query [N, h, d], key and value [N, h / g, d], which the cache keeps. Returns [N, h, d].
    """
    keys = documents.cache.history(owner, "key", key, window)
    values = documents.cache.history(owner, "value", value, window)
    if documents.are_new:
        documents.store(keys, key)
        documents.store(values, value)
        return causal_attention(query, key, value, documents, scale, window)
    if documents.is_step:
        key, value = (h.step(documents.positions, documents.reach, x) for h, x in ((keys, key), (values, value)))
        return _step(query, key, value, documents.positions, scale)
    pieces = zip(documents.keep(keys, key), documents.keep(values, value), strict=True)
    return torch.cat([_piece(query[piece.tokens], k, v, scale, window) for (piece, k), (_, v) in pieces])


def latent_attention(query: Tensor, history: History, new: Tensor, documents: Continued, scale: float) -> Tensor:
    """Attention in which all heads share what the cache keeps, and values are the keys themselves.

    query [N, h, d], new [N, 1, d]: returns [N, h, d].
    """
    if documents.is_step:
        seen = history.step(documents.positions, documents.reach, new)
        return _step(query, seen, seen, documents.positions, scale)
    return torch.cat([_piece(query[piece.tokens], k, k, scale, None) for piece, k in documents.keep(history, new)])


def selected_latent_attention(
    query: Tensor, history: History, selected: Tensor, documents: Continued, scale: float
) -> Tensor:
    """`latent_attention` of each token to the positions `selected` int32 [N, K] only, which the history has already.

    Those after the token's own are left out. Each token's keys are gathered, some tokens at a time.
    """
    out = torch.empty_like(query)
    size = max(1, NUMBERS_AT_A_TIME // (selected.shape[1] * query.shape[2]))
    for part in (slice(start, start + size) for start in range(0, len(query), size)):
        rows, last, at = documents.rows[part, None], documents.positions[part, None], selected[part].long()
        # Those that are left out may not be there at all.
        seen = history.buffer[rows, 0, torch.minimum(at, last)][:, None]
        out[part] = _attend(query[part, None], seen, seen, (at <= last)[:, None, None], scale)[:, 0]
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """query [B, heads, T, d], key and value [B, heads, S, d], mask that fits [B, heads, T, S]."""
    dtype = product_dtype(query.device, query.dtype)
    same = value is key
    key = key.to(dtype)
    value = key if same else value.to(dtype)
    return F.scaled_dot_product_attention(query.to(dtype), key, value, attn_mask=mask, scale=scale).to(query.dtype)


def _step(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> Tensor:
    """query [B, h, d]; key and value [B, h / g, S, d], of which a row sees as many as its position says: [B, h, d]."""
    slots = torch.arange(key.shape[2], device=key.device)
    mask = (slots <= positions[:, None])[:, None, None]
    # The g heads that share a key stand where a sequence of queries would: no key is copied.
    grouped = query.unflatten(1, (key.shape[1], -1))
    return _attend(grouped, key, value, mask, scale).flatten(1, 2)


def _piece(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """query [T, h, d], key and value [h / g, S, d], of which the last T are the queries' own: [T, h, d].

    Some queries at a time. Key heads stand where a batch would, and each is seen by its g query heads without a copy.
    """
    length, before = len(query), key.shape[1] - len(query)
    groups = query.shape[1] // len(key)
    out = torch.empty_like(query)
    size = max(1, PAIRS_AT_A_TIME // key.shape[1])
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, before + start - window + 1)
        distance = torch.arange(before + start, before + stop, device=key.device)[:, None] - torch.arange(
            first, before + stop, device=key.device
        )
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        k, v = (x[:, None, first : before + stop].expand(-1, groups, -1, -1) for x in (key, value))
        q = query[start:stop].transpose(0, 1).unflatten(0, (len(key), groups))
        out[start:stop] = _attend(q, k, v if value is not key else k, mask, scale).flatten(0, 1).transpose(0, 1)
    return out
