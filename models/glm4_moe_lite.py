"""GLM-4.7-Flash (`glm4_moe_lite`): latent attention, sigmoid-routed experts with shared ones, leading dense layers.

Sizes of GLM-4.7-Flash: 47 layers (1 dense), hidden 2048, 20 heads, 64 experts of width 1536 of which 4 are chosen,
one shared expert; 29.9 billion parameters, 3 billion of them active for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quant.errors import NibbleError
from quant.storage import StorageSpec

from .configjson import flag, integer, number, optional_integer, refuse_dropout, refuse_unknown_activation
from .decoder import CausalLM, Decoder
from .documents import Documents
from .experts import Experts
from .keymap import KeyMap, KeyMapBuilder
from .mla import LatentAttention, LatentAttentionConfig, latent_attention_keys
from .mlp import SwiGLU
from .norm import RMSNorm
from .rope import RopeConfig, parse_rope, partial_rotary_factor
from .router import RoutingRule, SigmoidRouter


@dataclass(frozen=True)
class Glm4MoeLiteConfig:
    vocabulary: int
    hidden: int
    layers: int
    dense: tuple[bool, ...]  # per layer: a dense MLP instead of experts
    dense_width: int
    expert_width: int
    experts: int
    shared_experts: int
    predicting_layers: int  # behind the last layer in the checkpoint, for multi-token prediction; not computed here
    eps: float
    tied: bool
    attention: LatentAttentionConfig
    routing: RoutingRule
    rope: RopeConfig

    @staticmethod
    def parse(config: dict[str, Any], where: str) -> Glm4MoeLiteConfig:
        """Reads config.json of either generation; absent keys have the defaults of GLM-4.7-Flash."""
        layers = integer(config, "num_hidden_layers", 47, where)
        rope_dim = integer(config, "qk_rope_head_dim", 64, where)
        nope_dim = integer(config, "qk_nope_head_dim", 192, where)
        rope = parse_rope(config, rope_dim, where)
        experts = integer(config, "n_routed_experts", 64, where)
        refuse_unknown_activation(config, where)
        refuse_dropout(config, where)
        if (share := partial_rotary_factor(config, where)) != 1:
            raise NibbleError(
                f"{where}: partial_rotary_factor is {share}; latent attention rotates all of qk_rope_head_dim "
                f"({rope_dim}).\nSet it to 1.0, and qk_rope_head_dim to what is rotated."
            )
        return Glm4MoeLiteConfig(
            vocabulary=integer(config, "vocab_size", 154880, where),
            hidden=(hidden := integer(config, "hidden_size", 2048, where)),
            layers=layers,
            dense=_dense_layers(config, layers, where),
            dense_width=integer(config, "intermediate_size", 10240, where),
            expert_width=integer(config, "moe_intermediate_size", 1536, where),
            experts=experts,
            shared_experts=integer(config, "n_shared_experts", 1, where),
            predicting_layers=integer(config, "num_nextn_predict_layers", 1, where, least=0),
            eps=number(config, "rms_norm_eps", 1e-5, where),
            tied=flag(config, "tie_word_embeddings", False, where),
            attention=LatentAttentionConfig(
                hidden=hidden,
                heads=integer(config, "num_attention_heads", 20, where),
                query_rank=optional_integer(config, "q_lora_rank", 768, where),
                latent_rank=integer(config, "kv_lora_rank", 512, where),
                nope_dim=nope_dim,
                rope_dim=rope_dim,
                value_dim=integer(config, "v_head_dim", 256, where),
                bias=flag(config, "attention_bias", False, where),
                interleaved=flag(config, "rope_interleave", True, where),
                scale=(nope_dim + rope_dim) ** -0.5 * rope.score_scale,
            ),
            routing=_routing(config, experts, where),
            rope=rope,
        )


def _dense_layers(config: dict[str, Any], layers: int, where: str) -> tuple[bool, ...]:
    """5.x files name every layer's type, 4.x files count the leading dense ones.

    Types behind the last layer (of prediction layers) don't count.
    """
    types = config.get("mlp_layer_types")
    if types is None:
        leading = integer(config, "first_k_dense_replace", 1, where, least=0)
        return tuple(index < leading for index in range(layers))
    if not isinstance(types, list) or not {"dense", "sparse"}.issuperset(map(str, types)):
        raise NibbleError(f"{where}: mlp_layer_types must be a list of 'dense' and 'sparse', got {types!r}.")
    if len(types) < layers:
        raise NibbleError(
            f"{where}: mlp_layer_types names {len(types)} layers, num_hidden_layers is {layers}; make them agree."
        )
    return tuple(kind == "dense" for kind in types[:layers])


def _routing(config: dict[str, Any], experts: int, where: str) -> RoutingRule:
    rule = RoutingRule(
        chosen=integer(config, "num_experts_per_tok", 4, where),
        groups=integer(config, "n_group", 1, where),
        chosen_groups=integer(config, "topk_group", 1, where),
        normalise=flag(config, "norm_topk_prob", True, where),
        scale=number(config, "routed_scaling_factor", 1.8, where),
    )
    if experts % rule.groups or (rule.groups > 1 and experts < 2 * rule.groups):
        raise NibbleError(
            f"{where}: n_group {rule.groups} doesn't divide n_routed_experts {experts} into groups of two or more.\n"
            "Choose a divisor; 1 is no grouping."
        )
    if rule.chosen_groups > rule.groups:
        raise NibbleError(
            f"{where}: topk_group {rule.chosen_groups} is more than n_group {rule.groups}; choose at most that many."
        )
    open_experts = experts // rule.groups * rule.chosen_groups
    if rule.chosen > open_experts:
        raise NibbleError(
            f"{where}: num_experts_per_tok is {rule.chosen}, but n_routed_experts {experts}, n_group {rule.groups} and "
            f"topk_group {rule.chosen_groups} leave {open_experts} to choose from.\n"
            f"Set num_experts_per_tok to at most {open_experts}, or raise topk_group."
        )
    return rule


class MoE(nn.Module):
    """Routed experts plus shared ones, which see every token."""

    def __init__(
        self,
        config: Glm4MoeLiteConfig,
        *,
        spec: StorageSpec,
        dtype: torch.dtype,
        device: torch.device | str,
        name: str,
    ) -> None:
        super().__init__()
        c, shared_width = config, config.expert_width * config.shared_experts
        self.gate = SigmoidRouter(c.hidden, c.experts, c.routing, device=device, name=f"{name}.gate")
        self.shared_experts = SwiGLU(
            c.hidden, shared_width, spec=spec, dtype=dtype, device=device, name=f"{name}.shared_experts"
        )
        self.experts = Experts(
            c.experts, c.hidden, c.expert_width, spec=spec, dtype=dtype, device=device, name=f"{name}.experts"
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.gate(x)
        shared = self.shared_experts(x)
        # The routed experts come last: a recomputed layer then stops before them (models/experts.py).
        return self.experts(x, chosen, weights) + shared


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
        self.mlp: SwiGLU | MoE
        if c.dense[index]:
            self.mlp = SwiGLU(c.hidden, c.dense_width, spec=spec, dtype=dtype, device=device, name=f"{name}.mlp")
        else:
            self.mlp = MoE(c, spec=spec, dtype=dtype, device=device, name=f"{name}.mlp")

    def forward(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), documents, tables)
        return x + self.mlp(self.post_attention_layernorm(x))


def build(config: Glm4MoeLiteConfig, *, spec: StorageSpec, dtype: torch.dtype, device: torch.device | str) -> CausalLM:
    """The model with empty tensors; `device` may be "meta"."""
    c = config
    layers = [DecoderLayer(c, index, spec=spec, dtype=dtype, device=device) for index in range(c.layers)]
    decoder = Decoder(c.vocabulary, c.hidden, c.eps, layers, dtype=dtype, device=device)
    return CausalLM(c, decoder, c.rope, model_type="glm4_moe_lite", tied=c.tied, spec=spec, dtype=dtype, device=device)


def key_map(config: Glm4MoeLiteConfig) -> KeyMap:
    c, keys = config, KeyMapBuilder()
    keys.plain("model.embed_tokens.weight", "embedding", (c.vocabulary, c.hidden))
    for index in range(c.layers):
        layer = f"model.layers.{index}"
        keys.plain(f"{layer}.input_layernorm.weight", "norm", (c.hidden,))
        latent_attention_keys(keys, f"{layer}.self_attn", c.attention)
        keys.plain(f"{layer}.post_attention_layernorm.weight", "norm", (c.hidden,))
        if c.dense[index]:
            keys.swiglu(f"{layer}.mlp", "dense_mlp", c.hidden, c.dense_width)
            continue
        keys.matrix(f"{layer}.mlp.gate", "router", (c.experts, c.hidden), stored="float32")
        keys.plain(f"{layer}.mlp.gate.e_score_correction_bias", "router", (c.experts,), float32=True)
        keys.swiglu(f"{layer}.mlp.shared_experts", "shared_experts", c.hidden, c.expert_width * c.shared_experts)
        keys.experts(f"{layer}.mlp.experts", c.experts, c.hidden, c.expert_width)
    keys.plain("model.norm.weight", "norm", (c.hidden,))
    if not c.tied:
        keys.matrix("lm_head", "head", (c.vocabulary, c.hidden), stored="dense")
    carried = [rf"model\.layers\.{c.layers + extra}\..*" for extra in range(c.predicting_layers)]
    if c.tied:
        carried.append(r"lm_head\.weight")  # some files hold the copy all the same
    return keys.build(tuple(carried))
