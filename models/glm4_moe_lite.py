"""GLM-4.7-Flash (`glm4_moe_lite`): latent attention, sigmoid-routed experts with shared ones, leading dense layers.

Sizes of GLM-4.7-Flash: 47 layers (1 dense), hidden 2048, 20 heads, 64 experts of width 1536 of which 4 are chosen,
one shared expert; 29.9 billion parameters, 3 billion of them active for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.mla import LatentAttention, LatentAttentionConfig, latent_attention_keys
from models.attention.rope import RopeConfig, parse_rope
from models.blocks.configjson import flag, integer, number, refuse_dropout, refuse_unknown_activation
from models.blocks.documents import Documents
from models.blocks.norm import RMSNorm
from models.checkpoint.keymap import KeyMap, KeyMapBuilder
from models.decoder import CausalLM, Decoder
from models.glm_moe import GlmMoEConfig, glm_mlp, glm_mlp_keys
from quant.storage import StorageSpec

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
    def __init__(
        self,
        config: Glm4MoeLiteConfig,
        index: int,
        *,
        spec: StorageSpec,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        c, name = config, f"model.layers.{index}"
        self.input_layernorm = RMSNorm(c.hidden, c.eps, dtype=dtype, device=device)
        self.self_attn = LatentAttention(c.attention, spec=spec, dtype=dtype, device=device, name=f"{name}.self_attn")
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps, dtype=dtype, device=device)
        self.mlp = glm_mlp(c.moe, index, spec=spec, dtype=dtype, device=device, name=f"{name}.mlp")

    def forward(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), documents, tables)
        return x + self.mlp(self.post_attention_layernorm(x))


def build(config: Glm4MoeLiteConfig, *, spec: StorageSpec, dtype: torch.dtype, device: torch.device | str) -> CausalLM:
    """The model with empty tensors; `device` may be "meta"."""
    c = config
    layers = [DecoderLayer(c, index, spec=spec, dtype=dtype, device=device) for index in range(c.layers)]
    norm = RMSNorm(c.hidden, c.eps, dtype=dtype, device=device)
    decoder = Decoder(c.vocabulary, c.hidden, layers, norm, c.rope, dtype=dtype, device=device)
    return CausalLM(c, decoder, model_type="glm4_moe_lite", tied=c.tied, spec=spec, dtype=dtype, device=device)


def key_map(config: Glm4MoeLiteConfig) -> KeyMap:
    c, keys = config, KeyMapBuilder()
    keys.plain("model.embed_tokens.weight", "embedding", (c.vocabulary, c.hidden))
    for index in range(c.layers):
        layer = f"model.layers.{index}"
        keys.plain(f"{layer}.input_layernorm.weight", "norm", (c.hidden,))
        latent_attention_keys(keys, f"{layer}.self_attn", c.attention)
        keys.plain(f"{layer}.post_attention_layernorm.weight", "norm", (c.hidden,))
        glm_mlp_keys(keys, f"{layer}.mlp", c.moe, index)
    keys.plain("model.norm.weight", "norm", (c.hidden,))
    keys.head("lm_head", (c.vocabulary, c.hidden), tied=c.tied)
    return keys.build(carried=[rf"model\.layers\.{c.layers + extra}\..*" for extra in range(c.predicting_layers)])
