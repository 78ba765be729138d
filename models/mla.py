"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 §2.1), as GLM-4.7-Flash and GLM-5 use it.

Keys and values of all heads are expanded from one narrow latent per token; one rotary key is shared by all heads.

Shapes: N tokens, H hidden, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.storage import StorageSpec

from .attention import causal_attention
from .documents import Documents
from .keymap import KeyMapBuilder
from .linear import Linear
from .norm import RMSNorm
from .rope import rotate

# The norms inside the attention keep the reference's default instead of following rms_norm_eps.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True)
class LatentAttentionConfig:
    hidden: int
    heads: int
    query_rank: int | None  # None: queries come straight from the hidden state
    latent_rank: int
    nope_dim: int  # of a head's query and key, without positions
    rope_dim: int  # of a head's query and key, rotated
    value_dim: int
    bias: bool
    interleaved: bool
    scale: float  # of the scores before the softmax

    @property
    def key_dim(self) -> int:
        return self.nope_dim + self.rope_dim


class LatentAttention(nn.Module):
    def __init__(
        self,
        config: LatentAttentionConfig,
        *,
        spec: StorageSpec,
        dtype: torch.dtype,
        device: torch.device | str,
        name: str,
    ) -> None:
        super().__init__()
        c = self.config = config

        def linear(inputs: int, outputs: int, part: str, bias: bool = False) -> Linear:
            full = f"{name}.{part}"
            return Linear(inputs, outputs, bias=bias, spec=spec, dtype=dtype, device=device, name=full)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, LATENT_NORM_EPS, dtype=dtype, device=device)

        if c.query_rank is None:
            self.q_proj = linear(c.hidden, c.heads * c.key_dim, "q_proj")
        else:
            self.q_a_proj = linear(c.hidden, c.query_rank, "q_a_proj", c.bias)
            self.q_a_layernorm = norm(c.query_rank)
            self.q_b_proj = linear(c.query_rank, c.heads * c.key_dim, "q_b_proj")
        self.kv_a_proj_with_mqa = linear(c.hidden, c.latent_rank + c.rope_dim, "kv_a_proj_with_mqa", c.bias)
        self.kv_a_layernorm = norm(c.latent_rank)
        self.kv_b_proj = linear(c.latent_rank, c.heads * (c.nope_dim + c.value_dim), "kv_b_proj")
        self.o_proj = linear(c.heads * c.value_dim, c.hidden, "o_proj", c.bias)

    def forward(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x [N, H] and the rotary tables float32 [N, rope_dim/2] of its positions: [N, H]."""
        c = self.config
        query = self.q_proj(x) if c.query_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.unflatten(-1, (c.heads, c.key_dim))
        latent, shared_key = self.kv_a_proj_with_mqa(x).split((c.latent_rank, c.rope_dim), dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (c.heads, c.nope_dim + c.value_dim))
        key, value = expanded.split((c.nope_dim, c.value_dim), dim=-1)

        query_nope, query_rope = query.split((c.nope_dim, c.rope_dim), dim=-1)
        query = torch.cat((query_nope, rotate(query_rope, tables, interleaved=c.interleaved)), dim=-1)
        rotated = rotate(shared_key[:, None], tables, interleaved=c.interleaved).expand(-1, c.heads, -1)
        key = torch.cat((key, rotated), dim=-1)
        return self.o_proj(causal_attention(query, key, value, documents, c.scale).flatten(1))


def latent_attention_keys(keys: KeyMapBuilder, name: str, c: LatentAttentionConfig) -> None:
    if c.query_rank is None:
        keys.linear(f"{name}.q_proj", "attention", (c.heads * c.key_dim, c.hidden))
    else:
        keys.linear(f"{name}.q_a_proj", "attention", (c.query_rank, c.hidden), bias=c.bias)
        keys.plain(f"{name}.q_a_layernorm.weight", "norm", (c.query_rank,))
        keys.linear(f"{name}.q_b_proj", "attention", (c.heads * c.key_dim, c.query_rank))
    keys.linear(f"{name}.kv_a_proj_with_mqa", "attention", (c.latent_rank + c.rope_dim, c.hidden), bias=c.bias)
    keys.plain(f"{name}.kv_a_layernorm.weight", "norm", (c.latent_rank,))
    keys.linear(f"{name}.kv_b_proj", "attention", (c.heads * (c.nope_dim + c.value_dim), c.latent_rank))
    keys.linear(f"{name}.o_proj", "attention", (c.hidden, c.heads * c.value_dim), bias=c.bias)
