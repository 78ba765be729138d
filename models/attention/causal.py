"""Causal attention within the documents of a flat batch."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.blocks.documents import Documents
from quant.common.devices import on_cpu
from quant.products import product_dtype


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) v, where a token sees itself and earlier tokens of its own document.

    query [N, heads, d], key [N, kv_heads, d], value [N, kv_heads, d_v]; heads is a multiple of kv_heads.
    window: a token sees the last `window` tokens only, itself among them, at a cost of O(N · window).
    Returns [N, heads, d_v]. On CUDA in half precision all documents go through one variable-length flash kernel;
    elsewhere through scaled_dot_product_attention, document by document. Tokens never meet those of another
    document, and no [N, N] mask exists.
    """
    value_width = value.shape[-1]
    if not on_cpu(query.device) and query.dtype in (torch.bfloat16, torch.float16):
        # Unlike scaled_dot_product_attention, the variable-length kernel doesn't pad to the multiples of 8 it needs.
        out = _flash(*_same_width(query, key, value, multiple=8), documents, scale, window)
    else:
        out = _by_document(*_same_width(query, key, value), documents, scale, window)
    return out if out.shape[-1] == value_width else out[..., :value_width]


def _same_width(query: Tensor, key: Tensor, value: Tensor, *, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernels want one head size. Zero columns change neither scores nor the columns that are kept."""
    width = max(query.shape[-1], value.shape[-1])
    width += -width % multiple

    def widened(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x

    return widened(query), widened(key), widened(value)


def _flash(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {}
    if groups > 1 and _takes_groups():
        options["enable_gqa"] = True
    elif groups > 1:  # torch 2.11: a copy of keys and values for every query head
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    offsets, longest = documents.offsets, documents.longest
    # How far to the left and to the right a query sees; -1 is as far as there are keys.
    sees = (-1 if window is None else window - 1, 0)
    out = varlen_attn(query, key, value, offsets, offsets, longest, longest, scale=scale, window_size=sees, **options)
    assert isinstance(out, Tensor)
    return out


@functools.cache
def _takes_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor:
    dtype, lengths = query.dtype, documents.lengths
    query, key, value = (x.to(product_dtype(x.device, dtype)) for x in (query, key, value))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if window is None or q.shape[1] <= window:
            return _attend(q, k, v, scale=scale)
        return _attend_window(q, k, v, scale, window)

    if len(set(lengths)) == 1:  # a plain batch: one call for all documents
        shape = (len(lengths), lengths[0])
        out = attend(*(x.unflatten(0, shape) for x in (query, key, value))).flatten(0, 1)
    else:
        pieces = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        out = torch.cat([attend(q[None], k[None], v[None])[0] for q, k, v in pieces])
    return out.to(dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """query [B, T, heads, d], key and value [B, S, kv_heads, d], mask [T, S] or None (causal): [B, T, heads, d]."""
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _attend_window(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """Like `_attend`, for T > window.

    The sequence is cut into blocks of `window` tokens. What a query of one block sees lies in this block and the one
    before, so blocks are computed as a batch: the first one for itself, and the last one where it is shorter.
    """
    batch, length = query.shape[:2]
    blocks, rest = divmod(length, window)
    query_at = torch.arange(window, 2 * window, device=query.device)[:, None]
    key_at = torch.arange(2 * window, device=query.device)
    mask = (key_at <= query_at) & (key_at > query_at - window)

    out = [_attend(*(x[:, :window] for x in (query, key, value)), scale=scale)]
    if blocks > 1:
        whole = (x[:, : blocks * window].unflatten(1, (blocks, window)) for x in (query, key, value))
        q, k, v = whole
        pairs = (torch.cat((x[:, :-1], x[:, 1:]), dim=2).flatten(0, 1) for x in (k, v))
        out.append(
            _attend(q[:, 1:].flatten(0, 1), *pairs, scale=scale, mask=mask).unflatten(0, (batch, -1)).flatten(1, 2)
        )
    if rest:
        seen = (x[:, (blocks - 1) * window :] for x in (key, value))
        last = mask[:rest, : window + rest]
        out.append(_attend(query[:, blocks * window :], *seen, scale=scale, mask=last))
    return torch.cat(out, dim=1)
