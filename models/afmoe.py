"""Trinity (`afmoe`): gated attention in a sliding window, every fourth layer global and without positions.

A norm comes before and after each half of a layer.

Sizes of Trinity-Nano: 56 layers (2 dense), hidden 1024, 8 heads on 2 key and value heads, window 2048, 128 experts of
width 256 of which 8 are chosen, one shared expert; 6.1 billion parameters, 1 billion of them active for a token
(technical report: arXiv:2602.17004).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.attention.gqa import GroupedQueryAttention, GroupedQueryAttentionConfig, kv_heads
from models.attention.rope import RopeConfig, parse_rope
from models.blocks.configjson import MAX_LAYERS, choices, refuse_unread
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.mlp import SwiGLU
from models.blocks.norm import RMSNorm
from models.blocks.router import RoutingRule, expert_counts
from models.decoder import CausalLM, Decoder, HubForm, Run
from models.experts.moe import SharedExpertsMoE
from quant.common.jsonfile import flag, integer, number

HUB = HubForm(
    renamed={
        "mlp.gate.weight": "mlp.router.gate.weight",
        "mlp.gate.e_score_correction_bias": "mlp.expert_bias",
    },
    counted_buffers=("mlp.gate.e_score_correction_bias",),
)

# What files may say of routing and attention; every published Trinity has it alike.
_ALIKE = {
    "score_func": "sigmoid",
    "scoring_func": "sigmoid",
    "route_norm": True,
    "use_qk_norm": True,
    "use_sliding_window": True,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_groups": 1,
    "num_limited_groups": 1,
}


@dataclass(frozen=True)
class AfmoeConfig:
    vocabulary: int
    hidden: int
    sliding: tuple[bool, ...]  # per layer: attention in the window, with rotary positions; else global, without any
    window: int
    dense_layers: int  # the leading ones
    dense_width: int
    expert_width: int
    experts: int
    shared_experts: int
    routing: RoutingRule
    embedding_scale: float  # √H under maximal update parametrisation (mup_enabled), else 1
    eps: float
    tied: bool
    attention: GroupedQueryAttentionConfig
    rope: RopeConfig

    @staticmethod
    def parse(config: dict[str, Any], where: str) -> AfmoeConfig:
        """Reads config.json; absent keys have transformers' defaults, which are no published model's."""
        refuse_unread(config, where, **_ALIKE)
        hidden, heads = integer(config, "hidden_size", 2048, where), integer(config, "num_attention_heads", 16, where)
        head_dim, bias = integer(config, "head_dim", 128, where), flag(config, "attention_bias", False, where)
        experts, chosen = expert_counts(config, 64, 6, where)
        return AfmoeConfig(
            vocabulary=integer(config, "vocab_size", 200192, where),
            hidden=hidden,
            sliding=_sliding_layers(config, where),
            window=integer(config, "sliding_window", 1024, where),
            dense_layers=integer(config, "num_dense_layers", 1, where, least=0),
            dense_width=integer(config, "intermediate_size", 6144, where),
            expert_width=integer(config, "moe_intermediate_size", 1408, where),
            experts=experts,
            shared_experts=integer(config, "num_shared_experts", 2, where),
            routing=RoutingRule(chosen, scale=number(config, "route_scale", 1.0, where)),
            embedding_scale=math.sqrt(hidden) if flag(config, "mup_enabled", False, where) else 1.0,
            eps=number(config, "rms_norm_eps", 1e-5, where),
            tied=flag(config, "tie_word_embeddings", False, where),
            attention=GroupedQueryAttentionConfig(
                hidden=hidden,
                heads=heads,
                kv_heads=kv_heads(config, heads, heads, where),
                head_dim=head_dim,
                bias=bias,
                output_bias=bias,
                norms=True,
                gate="gate_proj",
            ),
            rope=parse_rope(config, head_dim, where),
        )

    @property
    def layers(self) -> int:
        return len(self.sliding)

    @property
    def shared_width(self) -> int:
        return self.expert_width * self.shared_experts


def _sliding_layers(config: dict[str, Any], where: str) -> tuple[bool, ...]:
    layers = integer(config, "num_hidden_layers", 32, where, most=MAX_LAYERS)
    every = integer(config, "global_attn_every_n_layers", 4, where)
    kinds = ["full_attention" if (index + 1) % every == 0 else "sliding_attention" for index in range(layers)]
    types = choices(config, "layer_types", kinds, ("sliding_attention", "full_attention"), where)
    return tuple(kind == "sliding_attention" for kind in types)


class DecoderLayer(nn.Module):
    """Norms before and after the attention, and before and after the feed-forward half, all kept in float32."""

    def __init__(self, config: AfmoeConfig, index: int, factory: Factory) -> None:
        super().__init__()
        c = config

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, c.eps, factory.float32)

        self.sliding = c.sliding[index]
        self.input_layernorm = norm(c.hidden)
        self.self_attn = GroupedQueryAttention(
            c.attention, factory, norm=norm, window=c.window if self.sliding else None
        )
        self.post_attention_layernorm = norm(c.hidden)
        self.pre_mlp_layernorm = norm(c.hidden)
        self.mlp: SwiGLU | SharedExpertsMoE
        if index < c.dense_layers:
            self.mlp = SwiGLU(c.hidden, c.dense_width, "dense_mlp", factory)
        else:
            self.mlp = SharedExpertsMoE(c.experts, c.hidden, c.expert_width, c.shared_width, c.routing, factory)
        self.post_mlp_layernorm = norm(c.hidden)

    def forward(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor], run: Run) -> Tensor:
        # The last norm needs the experts' output for its gradients. Outside of what may be computed again it keeps that
        # output, [N, H]; inside, the experts would be multiplied a second time to get at it.
        x, out = run(self.up_to_last_norm, x, documents, tables)
        return x + self.post_mlp_layernorm(out)

    def up_to_last_norm(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x after the attention, and the output of the feed-forward half: [N, H] each."""
        x, normed = self.input_layernorm.after(x, room=self.self_attn.room())
        attended = self.self_attn(normed, documents, tables if self.sliding else None)
        attended = self.post_attention_layernorm(attended)
        x, *copies = self.pre_mlp_layernorm.after(x, attended, copies=self.mlp.uses)
        return x, self.mlp(*copies)


class AfmoeDecoder(Decoder):
    """Scales embeddings, and passes `run` to each layer, which calls it for the part that may be computed again."""

    def __init__(self, config: AfmoeConfig, layers: Sequence[nn.Module], norm: nn.Module, factory: Factory) -> None:
        super().__init__(config, layers, norm, factory)
        self.embedding_scale = config.embedding_scale

    def forward(self, tokens: Tensor, documents: Documents, run: Run) -> Tensor:
        tables = self.rope.tables(documents.positions)
        x = self.embed_tokens(tokens) * self.embedding_scale
        for layer in self.layers:
            x = layer(x, documents, tables, run)
        return self.norm(x)


def build(config: AfmoeConfig, factory: Factory) -> CausalLM:
    """The model with empty tensors."""
    c = config
    layers = [DecoderLayer(c, index, factory) for index in range(c.layers)]
    decoder = AfmoeDecoder(c, layers, RMSNorm(c.hidden, c.eps, factory.float32), factory)
    return CausalLM(c, decoder, factory, model_type="afmoe", hub=HUB)
