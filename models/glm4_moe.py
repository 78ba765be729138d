"""GLM-4.5, GLM-4.5-Air, GLM-4.6 and GLM-4.7 (`glm4_moe`): grouped-query attention with half of each head rotated.

Sizes of GLM-4.5-Air: 46 layers (1 dense), hidden 4096, 96 heads on 8 key and value heads, 128 experts of width 1408 of
which 8 are chosen, one shared expert; 106 billion parameters, 12 billion of them active for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.attention.gqa import GroupedQueryAttention, GroupedQueryAttentionConfig, kv_heads
from models.attention.rope import RopeConfig, parse_rope, rotary_dimensions
from models.blocks.factory import Factory
from models.blocks.norm import RMSNorm
from models.decoder import CausalLM, Decoder, PreNormLayer
from models.glm_moe import GlmConfig, glm_mlp
from quant.common.jsonfile import flag, integer

DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "first_k_dense_replace": 1,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 1.0,
}


@dataclass(frozen=True)
class Glm4MoeConfig(GlmConfig):
    attention: GroupedQueryAttentionConfig
    rope: RopeConfig

    @staticmethod
    def parse(config: dict[str, Any], where: str) -> Glm4MoeConfig:
        """Reads config.json of either generation; absent keys have the defaults of GLM-4.5-Air."""
        common = GlmConfig.common(config, where, DEFAULTS)
        hidden, heads = common.hidden, integer(config, "num_attention_heads", 96, where)
        head_dim = integer(config, "head_dim", max(hidden // heads, 1), where)
        return Glm4MoeConfig(
            **vars(common),
            attention=GroupedQueryAttentionConfig(
                hidden=hidden,
                heads=heads,
                kv_heads=kv_heads(config, heads, 8, where),
                head_dim=head_dim,
                bias=flag(config, "attention_bias", False, where),
                norms=flag(config, "use_qk_norm", False, where),
            ),
            rope=parse_rope(config, rotary_dimensions(config, head_dim, 0.5, where), where),
        )


def build(config: Glm4MoeConfig, factory: Factory) -> CausalLM:
    """The model with empty tensors."""
    c = config

    def norm(size: int) -> RMSNorm:
        return RMSNorm(size, c.eps, factory)

    def layer(index: int) -> PreNormLayer:
        attention = GroupedQueryAttention(c.attention, factory, norm=norm)
        return PreNormLayer(c.hidden, attention, glm_mlp(c, index, factory), norm)

    decoder = Decoder(c, [layer(index) for index in range(c.layers)], norm(c.hidden), factory)
    return CausalLM(c, decoder, factory, model_type="glm4_moe", hub=c.hub)
