"""The gated delta rule token by token: as it is defined, and for the tokens that generation adds to a state.

Shapes as in models/attention/delta_rule.py; B rows of a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.attention.cache import Continued
from models.attention.delta_rule import chunks_from_state
from models.blocks.documents import Documents
from models.kernels.delta_chunks import NORM_EPS


def continued_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, documents: Continued, owner: nn.Module
) -> Tensor:
    """`gated_delta_rule` from the states that the cache keeps for `owner`: in torch everywhere, without gradients."""
    shape = (value.shape[1], key.shape[2], value.shape[2])
    like = value.new_empty(0, dtype=torch.promote_types(value.dtype, torch.float32))
    states = documents.cache.state(owner, "state", shape, like)
    inputs = (query, key, value, decay, beta)
    if documents.is_step:
        out, after = _step(states, *_prepared(*inputs))
        states.copy_(after)
        return out.to(value.dtype)
    by_document = []
    for piece in documents.pieces:
        q, k, v, g, b = (x[piece.tokens] for x in inputs)
        positions, state = documents.positions[piece.tokens], states[piece.row]
        by_document.append(chunks_from_state(q, k, v, g, b, positions, state))
    return torch.cat(by_document)


def stepwise_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, documents: Documents
) -> Tensor:
    """The definition, token by token: slow, for comparisons. Arguments and result as of `gated_delta_rule`."""
    inputs = _prepared(query, key, value, decay, beta)
    outputs, token = [], 0
    for length in documents.lengths:
        state = inputs[2].new_zeros(1, value.shape[1], key.shape[2], value.shape[2])
        for _ in range(length):
            out, state = _step(state, *(x[token : token + 1] for x in inputs))
            outputs.append(out)
            token += 1
    return torch.cat(outputs).to(value.dtype)


def _prepared(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """q (scaled too) and k of unit length [N, hv, dk], v [N, hv, dv], e^g and β [N, hv]; float32 or float64."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    groups = value.shape[1] // key.shape[1]

    def unit(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)).repeat_interleave(groups, 1)

    q, k = unit(query) * query.shape[-1] ** -0.5, unit(key)
    return q, k, value.to(dtype), decay.to(dtype).exp(), beta.to(dtype)


def _step(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, factor: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """A token of each of B documents, from its state [B, hv, dk, dv]: o [B, hv, dv], and the states after it."""
    state = factor[..., None, None] * state
    missing = value - torch.einsum("bhk,bhkv->bhv", key, state)
    state = state + torch.einsum("bhk,bhv->bhkv", beta[..., None] * key, missing)
    return torch.einsum("bhk,bhkv->bhv", query, state), state
