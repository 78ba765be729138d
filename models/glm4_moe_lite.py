"""GLM-4.7-Flash (`glm4_moe_lite`): latent attention, sigmoid-routed experts with shared ones, leading dense layers.

Sizes of GLM-4.7-Flash: 47 layers (1 dense), hidden 2048, 20 heads, 64 experts of width 1536 of which 4 are chosen,
one shared expert; 29.9 billion parameters, 3 billion of them active for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.attention.mla import LatentAttention, LatentAttentionConfig
from models.attention.rope import RopeConfig, parse_rope
from models.blocks.configjson import flag, integer, number, refuse_dropout, refuse_unknown_activation
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.norm import RMSNorm
from models.decoder import CausalLM, Decoder, HubForm, prediction_layers
from models.glm_moe import GlmMoEConfig, glm_mlp

DEFAULTS = {
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
class Glm4MoeLiteConfig:
    vocabulary: int
    hidden: int
    layers: int
    predicting_layers: int  # behind the last layer in the checkpoint, for multi-token prediction; not computed here
    eps: float
    tied: bool
    attention: LatentAttentionConfig
    moe: GlmMoEConfig
    rope: RopeConfig

    @staticmethod
    def parse(config: dict[str, Any], where: str) -> Glm4MoeLiteConfig:
        """Reads config.json of either generation; absent keys have the defaults of GLM-4.7-Flash."""
        refuse_unknown_activation(config, where)
        refuse_dropout(config, where)
        rope = parse_rope(config, integer(config, "qk_rope_head_dim", 64, where), where)
        moe = GlmMoEConfig.parse(config, where, DEFAULTS)
        return Glm4MoeLiteConfig(
            vocabulary=integer(config, "vocab_size", 154880, where),
            hidden=moe.hidden,
            layers=len(moe.dense),
            predicting_layers=integer(config, "num_nextn_predict_layers", 1, where, least=0),
            eps=number(config, "rms_norm_eps", 1e-5, where),
            tied=flag(config, "tie_word_embeddings", False, where),
            attention=LatentAttentionConfig.parse(config, where, DEFAULTS, rope),
            moe=moe,
            rope=rope,
        )


class DecoderLayer(nn.Module):
    def __init__(self, config: Glm4MoeLiteConfig, index: int, factory: Factory) -> None:
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.hidden, c.eps, factory)
        self.self_attn = LatentAttention(c.attention, factory.at("self_attn"))
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps, factory)
        self.mlp = glm_mlp(c.moe, index, factory.at("mlp"))

    def forward(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), documents, tables)
        return x + self.mlp(self.post_attention_layernorm(x))


def build(config: Glm4MoeLiteConfig, factory: Factory) -> CausalLM:
    """The model with empty tensors."""
    c = config
    layers = [DecoderLayer(c, index, factory.at(f"model.layers.{index}")) for index in range(c.layers)]
    decoder = Decoder(c, layers, RMSNorm(c.hidden, c.eps, factory), factory)
    hub = HubForm(carried=prediction_layers(c.layers, c.predicting_layers))
    return CausalLM(c, decoder, factory, model_type="glm4_moe_lite", hub=hub)
