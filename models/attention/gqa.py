"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): several query heads share one key and value head.

As Qwen3, Qwen3.5, Trinity and GLM-4.5 use it: with biases or norms on queries and keys, an output gate, rotary
positions on a part of a head's dimensions or on none, and a sliding window.

Shapes: N tokens, H hidden, h heads, d dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from models.attention.cache import Continued
from models.attention.causal import causal_attention
from models.attention.continued import continued_attention
from models.attention.rope import normed_and_rotated
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.blocks.linear import Linear, room, together
from models.blocks.mlp import times_sigmoid
from models.blocks.norm import RMSNorm
from quant.common.errors import NibbleError
from quant.common.jsonfile import optional_integer

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GroupedQueryAttentionConfig:
    """gate: what the output is multiplied by, after a sigmoid: nothing, a projection of its own (`gate_proj`), or a
    part of q_proj, which then holds each head's query and gate one after the other.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False  # of q_proj, k_proj and v_proj
    output_bias: bool = False
    norms: bool = False  # of each head's query and key
    gate: Literal["none", "gate_proj", "q_proj"] = "none"

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def query_width(self) -> int:
        return self.width * 2 if self.gate == "q_proj" else self.width


def kv_heads(config: dict[str, Any], heads: int, default: int, where: str) -> int:
    """num_key_value_heads, which a null makes as many as there are query heads."""
    found = optional_integer(config, "num_key_value_heads", default, where) or heads
    if heads % found:
        raise NibbleError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {found}, so that the query "
            "heads can't share them evenly."
        )
    return found


class GroupedQueryAttention(nn.Module):
    """norm: makes the norm of queries, and of keys, where the config has norms. window: see `causal_attention`."""

    group: ClassVar[Group] = "attention"

    def __init__(
        self,
        config: GroupedQueryAttentionConfig,
        factory: Factory,
        *,
        norm: Callable[[int], RMSNorm] | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config
        self.window = window
        self.q_proj = Linear(c.hidden, c.query_width, factory, bias=c.bias)
        self.k_proj = Linear(c.hidden, c.kv_width, factory, bias=c.bias)
        self.v_proj = Linear(c.hidden, c.kv_width, factory, bias=c.bias)
        if c.gate == "gate_proj":
            self.gate_proj = Linear(c.hidden, c.width, factory)
        self.o_proj = Linear(c.width, c.hidden, factory, bias=c.output_bias)
        if c.norms:
            assert norm is not None
            self.q_norm, self.k_norm = norm(c.head_dim), norm(c.head_dim)

    def projections(self) -> list[Linear]:
        """Of the input."""
        return [self.q_proj, self.k_proj, self.v_proj, *((self.gate_proj,) if self.config.gate == "gate_proj" else ())]

    def room(self) -> int:
        """Of the input: see models/blocks/linear.py::room."""
        return room(*self.projections())

    def forward(self, x: Tensor, documents: Documents, tables: Tables | None) -> Tensor:
        """x [N, H] and the rotary tables of its positions (None: no positions): [N, H]."""
        c = self.config
        query, key, value, *gates = together(x, *self.projections())
        query, key, value = (part.unflatten(-1, (-1, c.head_dim)) for part in (query, key, value))
        gate = gates[0] if gates else None
        if c.gate == "q_proj":
            query, gate = query.unflatten(1, (c.heads, 2)).unbind(2)
        query, key = normed_and_rotated(query, key, (self.q_norm, self.k_norm) if c.norms else None, tables)
        scale = c.head_dim**-0.5
        if isinstance(documents, Continued):
            out = continued_attention(self, query, key, value, documents, scale, self.window)
        else:
            out = causal_attention(query, key, value, documents, scale, self.window)
        if gate is not None:
            out = times_sigmoid(out.reshape(gate.shape), gate)
        return self.o_proj(out.flatten(1))
