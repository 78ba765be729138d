"""GLM-4.5, GLM-4.5-Air, GLM-4.6 and GLM-4.7 (`glm4_moe`): grouped-query attention with half of each head rotated.

Sizes of GLM-4.5-Air: 46 layers (1 dense), hidden 4096, 96 heads on 8 key and value heads, 128 experts of width 1408 of
which 8 are chosen, one shared expert; 106 billion parameters, 12 billion of them active for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.attention.gqa import GroupedQueryAttention, GroupedQueryAttentionConfig, kv_heads
from models.attention.rope import RopeConfig, parse_rope, rotary_dimensions
from models.blocks.configjson import flag, integer, number, refuse_dropout, refuse_unknown_activation
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.norm import RMSNorm
from models.decoder import CausalLM, Decoder, HubForm, prediction_layers
from models.glm_moe import GlmMoEConfig, glm_mlp

DEFAULTS = {
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
class Glm4MoeConfig:
    vocabulary: int
    hidden: int
    layers: int
    predicting_layers: int  # behind the last layer in the checkpoint, for multi-token prediction; not computed here
    eps: float
    tied: bool
    attention: GroupedQueryAttentionConfig
    moe: GlmMoEConfig
    rope: RopeConfig

    @staticmethod
    def parse(config: dict[str, Any], where: str) -> Glm4MoeConfig:
        """Reads config.json of either generation; absent keys have the defaults of GLM-4.5-Air."""
        refuse_unknown_activation(config, where)
        refuse_dropout(config, where)
        moe = GlmMoEConfig.parse(config, where, DEFAULTS)
        heads = integer(config, "num_attention_heads", 96, where)
        head_dim = integer(config, "head_dim", max(moe.hidden // heads, 1), where)
        return Glm4MoeConfig(
            vocabulary=integer(config, "vocab_size", 151552, where),
            hidden=moe.hidden,
            layers=len(moe.dense),
            predicting_layers=integer(config, "num_nextn_predict_layers", 1, where, least=0),
            eps=number(config, "rms_norm_eps", 1e-5, where),
            tied=flag(config, "tie_word_embeddings", False, where),
            attention=GroupedQueryAttentionConfig(
                hidden=moe.hidden,
                heads=heads,
                kv_heads=kv_heads(config, heads, 8, where),
                head_dim=head_dim,
                bias=flag(config, "attention_bias", False, where),
                norms=flag(config, "use_qk_norm", False, where),
            ),
            moe=moe,
            rope=parse_rope(config, rotary_dimensions(config, head_dim, 0.5, where), where),
        )


class DecoderLayer(nn.Module):
    def __init__(self, config: Glm4MoeConfig, index: int, factory: Factory) -> None:
        super().__init__()
        c = config

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, c.eps, factory)

        self.input_layernorm = norm(c.hidden)
        self.self_attn = GroupedQueryAttention(c.attention, factory.at("self_attn"), norm=norm)
        self.post_attention_layernorm = norm(c.hidden)
        self.mlp = glm_mlp(c.moe, index, factory.at("mlp"))

    def forward(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), documents, tables)
        return x + self.mlp(self.post_attention_layernorm(x))


def build(config: Glm4MoeConfig, factory: Factory) -> CausalLM:
    """The model with empty tensors."""
    c = config
    layers = [DecoderLayer(c, index, factory.at(f"model.layers.{index}")) for index in range(c.layers)]
    decoder = Decoder(c, layers, RMSNorm(c.hidden, c.eps, factory), factory)
    hub = HubForm(carried=prediction_layers(c.layers, c.predicting_layers))
    return CausalLM(c, decoder, factory, model_type="glm4_moe", hub=hub)
