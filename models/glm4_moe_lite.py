"""GLM-4.7-Flash (`glm4_moe_lite`): latent attention, sigmoid-routed experts with shared ones, leading dense layers.

Sizes of GLM-4.7-Flash: 47 layers (1 dense), hidden 2048, 20 heads, 64 experts of width 1536 of which 4 are chosen,
one shared expert; 29.9 billion parameters, 3 billion of them active for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.attention.mla import LatentAttention, LatentAttentionConfig
from models.attention.rope import RopeConfig, parse_rope
from models.blocks.factory import Factory
from models.blocks.norm import RMSNorm
from models.decoder import CausalLM, Decoder, PreNormLayer
from models.glm_moe import GlmConfig, glm_mlp
from quant.common.jsonfile import integer

DEFAULTS = {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "num_hidden_layers": 47,
    "first_k_dense_replace": 1,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "num_attention_heads": 20,
    "q_lora_rank": 768,
}


@dataclass(frozen=True)
class Glm4MoeLiteConfig(GlmConfig):
    attention: LatentAttentionConfig
    rope: RopeConfig

    @staticmethod
    def parse(config: dict[str, Any], where: str) -> Glm4MoeLiteConfig:
        """Reads config.json of either generation; absent keys have the defaults of GLM-4.7-Flash."""
        rope = parse_rope(config, integer(config, "qk_rope_head_dim", 64, where), where)
        attention = LatentAttentionConfig.parse(config, where, DEFAULTS, rope)
        return Glm4MoeLiteConfig(**vars(GlmConfig.common(config, where, DEFAULTS)), attention=attention, rope=rope)


def build(config: Glm4MoeLiteConfig, factory: Factory) -> CausalLM:
    """The model with empty tensors."""
    c = config

    def norm(size: int) -> RMSNorm:
        return RMSNorm(size, c.eps, factory)

    def layer(index: int) -> PreNormLayer:
        return PreNormLayer(c.hidden, LatentAttention(c.attention, factory), glm_mlp(c, index, factory), norm)

    decoder = Decoder(c, [layer(index) for index in range(c.layers)], norm(c.hidden), factory)
    return CausalLM(c, decoder, factory, model_type="glm4_moe_lite", hub=c.hub)
