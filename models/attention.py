"""Causal attention within the documents of a flat batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.products import product_dtype

from .documents import Documents


def causal_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, where a token sees itself and earlier tokens of its own document.

    query [N, heads, d], key [N, kv_heads, d], value [N, kv_heads, d_v]; heads is a multiple of kv_heads.
    Returns [N, heads, d_v]. On CUDA in half precision all documents go through one variable-length flash kernel;
    elsewhere through scaled_dot_product_attention, document by document. Tokens never meet those of another
    document, and no [N, N] mask exists.
    """
    value_width = value.shape[-1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        # Unlike scaled_dot_product_attention, the variable-length kernel doesn't pad to the multiples of 8 it needs.
        out = _flash(*_same_width(query, key, value, multiple=8), documents, scale)
    else:
        out = _by_document(*_same_width(query, key, value), documents, scale)
    return out[..., :value_width]


def _same_width(query: Tensor, key: Tensor, value: Tensor, *, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernels want one head size. Zero columns change neither scores nor the columns that are kept."""
    width = max(query.shape[-1], value.shape[-1])
    width += -width % multiple

    def widened(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x

    return widened(query), widened(key), widened(value)


def _flash(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    offsets, longest = documents.offsets, documents.longest
    # A window of (-1, 0) is the causal mask: everything to the left, nothing to the right.
    out = varlen_attn(query, key, value, offsets, offsets, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out


def _by_document(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> Tensor:
    dtype, lengths = query.dtype, documents.lengths
    query, key, value = (x.to(product_dtype(x.device, dtype)) for x in (query, key, value))
    if len(set(lengths)) == 1:  # a plain batch: one call for all documents
        shape = (len(lengths), lengths[0])
        out = _attend(*(x.unflatten(0, shape) for x in (query, key, value)), scale=scale).flatten(0, 1)
    else:
        pieces = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        out = torch.cat([_attend(q[None], k[None], v[None], scale=scale)[0] for q, k, v in pieces])
    return out.to(dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """query [B, T, heads, d], key and value [B, T, kv_heads, d]: [B, T, heads, d]."""
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
