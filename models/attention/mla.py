"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434 §2.1), as GLM-4.7-Flash and GLM-5 use it.

Keys and values of all heads are expanded from one narrow latent per token; one rotary key is shared by all heads. In
generation only these two are kept, and nothing is expanded: with the expansion multiplied into the queries and into the
output (the paper calls it absorbed), the latent is what all heads attend to.

Shapes: N tokens, H hidden, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.attention.cache import Continued
from models.attention.causal import causal_attention
from models.attention.continued import latent_attention
from models.attention.rope import RopeConfig, partial_rotary_factor, rotate, rotate_last
from models.blocks.configjson import refuse_unread
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.blocks.linear import Linear, room, together
from models.blocks.norm import RMSNorm
from models.kernels.latent_keys import latent_keys, usable
from quant.common.errors import NibbleError
from quant.common.jsonfile import flag, integer, optional_integer

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

    @staticmethod
    def parse(config: dict[str, Any], where: str, defaults: dict[str, Any], rope: RopeConfig) -> LatentAttentionConfig:
        """Reads config.json; `defaults` has the architecture's values for absent keys, by their names in the file."""
        nope_dim = integer(config, "qk_nope_head_dim", 192, where)
        rope_dim = integer(config, "qk_rope_head_dim", 64, where)
        if (share := partial_rotary_factor(config, where)) != 1:
            raise NibbleError(
                f"{where}: partial_rotary_factor is {share}; latent attention rotates all of qk_rope_head_dim "
                f"({rope_dim}).\nSet it to 1.0, and qk_rope_head_dim to what is rotated."
            )
        heads = integer(config, "num_attention_heads", defaults["num_attention_heads"], where)
        refuse_unread(config, where, num_key_value_heads=heads, use_qk_norm=False)
        return LatentAttentionConfig(
            hidden=integer(config, "hidden_size", defaults["hidden_size"], where),
            heads=heads,
            query_rank=optional_integer(config, "q_lora_rank", defaults["q_lora_rank"], where),
            latent_rank=integer(config, "kv_lora_rank", 512, where),
            nope_dim=nope_dim,
            rope_dim=rope_dim,
            value_dim=integer(config, "v_head_dim", 256, where),
            bias=flag(config, "attention_bias", False, where),
            interleaved=flag(config, "rope_interleave", True, where),
            scale=(nope_dim + rope_dim) ** -0.5 * rope.score_scale,
        )


class LatentAttention(nn.Module):
    group: ClassVar[Group] = "attention"

    def __init__(self, config: LatentAttentionConfig, factory: Factory) -> None:
        super().__init__()
        c = self.config = config

        def linear(inputs: int, outputs: int, part: str, bias: bool = False) -> Linear:
            return Linear(inputs, outputs, factory, bias=bias)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, LATENT_NORM_EPS, factory)

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
        query, _, narrow = self.projected(x, tables, room=room(self.q_b_proj) if self.config.query_rank else 0)
        if isinstance(documents, Continued):
            out = self.continued(query, self.kept(narrow, tables), documents)
        else:
            out = causal_attention(query, *self.keys_and_values(narrow, tables), documents, self.config.scale)
        return self.o_proj(out.flatten(1))

    def room(self) -> int:
        """Of the input: see models/blocks/linear.py::room."""
        return room(self.q_proj if self.config.query_rank is None else self.q_a_proj, self.kv_a_proj_with_mqa)

    def projected(self, x: Tensor, tables: tuple[Tensor, Tensor], room: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, h, key_dim]; what they are expanded from, [N, query_rank] or x; what keys and values are made of,
        [N, latent_rank + rope_dim]: their latent before its norm, and the key of all heads before its rotation.
        room: beside what queries are expanded from.
        """
        c = self.config
        if c.query_rank is None:
            latent = x
            query, narrow = together(x, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            latent, narrow = together(x, self.q_a_proj, self.kv_a_proj_with_mqa)
            latent = self.q_a_layernorm(latent, room)
            query = self.q_b_proj(latent)
        query = rotate_last(query.unflatten(-1, (c.heads, c.key_dim)), tables, interleaved=c.interleaved)
        return query, latent, narrow

    def kept(self, narrow: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Latent and key as generation keeps them, normed and rotated: [N, 1, latent_rank + rope_dim]."""
        c = self.config
        latent, shared_key = narrow[:, None].split((c.latent_rank, c.rope_dim), dim=-1)
        return torch.cat((self.kv_a_layernorm(latent), rotate(shared_key, tables, interleaved=c.interleaved)), dim=-1)

    def keys_and_values(self, narrow: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys [N, h, key_dim] and values [N, h, value_dim]."""
        c = self.config
        latent, shared_key = narrow.split((c.latent_rank, c.rope_dim), dim=-1)
        if usable(narrow.device):
            latent = self.kv_a_layernorm(latent, room(self.kv_b_proj))
            return latent_keys(self.wide(latent), shared_key, tables, c.nope_dim, interleaved=c.interleaved)
        latent = self.kv_a_layernorm(latent)
        return self.expanded(latent, rotate(shared_key[:, None], tables, interleaved=c.interleaved))

    def expanded(self, latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        """`keys_and_values` of a normed latent [N, latent_rank] and a rotated key [N, 1, rope_dim]."""
        c = self.config
        key, value = self.wide(latent).split((c.nope_dim, c.value_dim), dim=-1)
        return torch.cat((key, rotated.expand(-1, c.heads, -1)), dim=-1), value

    def wide(self, latent: Tensor) -> Tensor:
        """[N, h, nope_dim + value_dim]: each head's key without positions, and its value."""
        return self.kv_b_proj(latent).unflatten(-1, (self.config.heads, -1))

    def continued(self, query: Tensor, kept: Tensor, documents: Continued) -> Tensor:
        """Attention of queries [N, h, key_dim] to what the cache has and gets, `kept` [N, 1, latent_rank + rope_dim].

        Returns [N, h, value_dim].
        """
        history, scale = documents.cache.history(self, "latent", kept), self.config.scale
        if not documents.are_new:
            return self.absorbed(query, lambda q: latent_attention(q, history, kept, documents, scale))
        documents.store(history, kept)
        latent, rotated = kept.split((self.config.latent_rank, self.config.rope_dim), dim=-1)
        return causal_attention(query, *self.expanded(latent[:, 0], rotated), documents, scale)

    def absorbed(self, query: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """[N, h, value_dim] for queries [N, h, key_dim].

        attend: of queries [N, h, latent_rank + rope_dim] to what is kept: [N, h, latent_rank + rope_dim].
        """
        c = self.config
        matrices = self.kv_b_proj.adapted().unflatten(0, (c.heads, c.nope_dim + c.value_dim))
        to_key, to_value = matrices.split((c.nope_dim, c.value_dim), dim=1)  # [h, nope_dim or value_dim, latent_rank]
        nope, rope = query.split((c.nope_dim, c.rope_dim), dim=-1)
        out = attend(torch.cat((_by_head(nope, to_key), rope), dim=-1))[..., : c.latent_rank]
        return _by_head(out, to_value.transpose(1, 2))


def _by_head(x: Tensor, matrices: Tensor) -> Tensor:
    """x [N, h, a] times a matrix [a, b] of each head, in its dtype: [N, h, b] in that of x."""
    return torch.bmm(x.transpose(0, 1).to(matrices.dtype), matrices).transpose(0, 1).to(x.dtype)
