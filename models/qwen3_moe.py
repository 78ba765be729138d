"""Qwen3 mixture-of-experts (`qwen3_moe`): grouped-query attention, softmax-routed experts and no shared one.

Sizes of Qwen3-30B-A3B: 48 layers, hidden 2048, 32 heads of 128 on 4 key and value heads, 128 experts of width 768 of
which 8 are chosen; 30.5 billion parameters, 3.3 billion of them active for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.attention.gqa import GroupedQueryAttention, GroupedQueryAttentionConfig, kv_heads
from models.attention.rope import RopeConfig, parse_rope, partial_rotary_factor
from models.blocks.configjson import MAX_LAYERS, refuse_unread
from models.blocks.factory import Factory
from models.blocks.mlp import FeedForward, SwiGLU
from models.blocks.norm import RMSNorm
from models.blocks.router import SoftmaxRouter, expert_counts
from models.decoder import CausalLM, Decoder, PreNormLayer
from models.experts.block import Experts
from quant.common.errors import NibbleError
from quant.common.jsonfile import flag, integer, number
from quant.common.words import shown


@dataclass(frozen=True)
class Qwen3MoeConfig:
    vocabulary: int
    hidden: int
    dense: tuple[bool, ...]  # per layer: a dense MLP instead of experts; in no published model
    dense_width: int
    expert_width: int
    experts: int
    chosen: int
    normalise: bool  # whether the weights of the chosen experts sum to one
    eps: float
    tied: bool
    attention: GroupedQueryAttentionConfig
    rope: RopeConfig

    @property
    def layers(self) -> int:
        return len(self.dense)

    @staticmethod
    def parse(config: dict[str, Any], where: str) -> Qwen3MoeConfig:
        """Reads config.json; absent keys have transformers' defaults, which are no published model's."""
        refuse_unread(config, where, scoring_func="softmax", n_shared_experts=0, use_qk_norm=True)
        if (share := partial_rotary_factor(config, where)) != 1:  # computed in part by transformers, not by others
            raise NibbleError(f"{where}: partial_rotary_factor is {share}; only 1, whole heads, is implemented.")
        hidden, heads = integer(config, "hidden_size", 2048, where), integer(config, "num_attention_heads", 32, where)
        head_dim = integer(config, "head_dim", max(hidden // heads, 1), where)
        bias = flag(config, "attention_bias", False, where)
        # transformers 5 writes num_local_experts, and takes it where a file has both; the hub's files have num_experts.
        key = "num_local_experts" if "num_local_experts" in config else "num_experts"
        experts, chosen = expert_counts(config, 128, 8, where, key)
        return Qwen3MoeConfig(
            vocabulary=integer(config, "vocab_size", 151936, where),
            hidden=hidden,
            dense=_dense_layers(config, where),
            dense_width=integer(config, "intermediate_size", 6144, where),
            expert_width=integer(config, "moe_intermediate_size", 768, where),
            experts=experts,
            chosen=chosen,
            normalise=flag(config, "norm_topk_prob", False, where),
            eps=number(config, "rms_norm_eps", 1e-6, where),
            tied=flag(config, "tie_word_embeddings", False, where),
            attention=GroupedQueryAttentionConfig(
                hidden=hidden,
                heads=heads,
                kv_heads=kv_heads(config, heads, 4, where),
                head_dim=head_dim,
                bias=bias,
                output_bias=bias,
                norms=True,
            ),
            rope=parse_rope(config, head_dim, where),
        )


def _dense_layers(config: dict[str, Any], where: str) -> tuple[bool, ...]:
    layers, step = (
        integer(config, "num_hidden_layers", 24, where, most=MAX_LAYERS),
        integer(config, "decoder_sparse_step", 1, where),
    )
    named = [] if config.get("mlp_only_layers") is None else config["mlp_only_layers"]
    if not isinstance(named, list) or not all(type(index) is int for index in named):
        raise NibbleError(f"{where}: mlp_only_layers must be a list of layers' numbers, got {shown(named)}.")
    return tuple(index in named or (index + 1) % step != 0 for index in range(layers))


class MoE(FeedForward):
    uses = 2

    def __init__(self, config: Qwen3MoeConfig, factory: Factory) -> None:
        super().__init__()
        c = config
        self.gate = SoftmaxRouter(c.hidden, c.experts, c.chosen, factory, normalise=c.normalise)
        self.experts = Experts(c.experts, c.hidden, c.expert_width, factory)

    def forward(self, x: Tensor, for_experts: Tensor | None = None, *, plus: Tensor | None = None) -> Tensor:
        """x [N, H]: [N, H]. for_experts: x again. plus [N, H]: added to it."""
        for_experts = x if for_experts is None else for_experts
        return self.experts(for_experts, *self.gate(x), plus)


def build(config: Qwen3MoeConfig, factory: Factory) -> CausalLM:
    """The model with empty tensors."""
    c = config

    def norm(size: int) -> RMSNorm:
        return RMSNorm(size, c.eps, factory)

    def layer(dense: bool) -> PreNormLayer:
        attention = GroupedQueryAttention(c.attention, factory, norm=norm)
        mlp = SwiGLU(c.hidden, c.dense_width, "dense_mlp", factory) if dense else MoE(c, factory)
        return PreNormLayer(c.hidden, attention, mlp, norm)

    decoder = Decoder(c, [layer(dense) for dense in c.dense], norm(c.hidden), factory)
    return CausalLM(c, decoder, factory, model_type="qwen3_moe")
