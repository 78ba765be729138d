"""Qwen3.5 and Qwen3.6 mixture-of-experts (`qwen3_5_moe`, its text model `qwen3_5_moe_text`).

Three of four layers mix tokens with a gated delta rule (Gated DeltaNet, Yang et al. 2024, arXiv:2412.06464), a state of
fixed size per head; every fourth with gated attention. Every layer has softmax-routed experts and a gated shared one.

Sizes of Qwen3.5-35B-A3B: 40 layers, hidden 2048, 16 attention heads of 256 on 2 key and value heads, 32 DeltaNet heads
of 128 on 16 query and key heads, 256 experts of width 512 of which 8 are chosen; 34.7 billion parameters of text.

The hub's files hold a vision-language model, whose text model is at `model.language_model`; the vision tower and
the layers for multi-token prediction are left where they are.

Shapes: N tokens, H hidden, k and v heads of keys and of values, d dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from models.attention.cache import Continued
from models.attention.delta_rule import gated_delta_rule
from models.attention.delta_step import continued_gated_delta_rule
from models.attention.gqa import GroupedQueryAttention, GroupedQueryAttentionConfig, kv_heads
from models.attention.rope import RopeConfig, parse_rope, rotary_dimensions
from models.attention.short_conv import continued_convolution, split_convolution
from models.blocks.configjson import MAX_LAYERS, choices, refuse_unread
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.groups import Group
from models.blocks.linear import Linear, together
from models.blocks.mlp import FeedForward, SwiGLU, times_sigmoid, times_silu
from models.blocks.norm import RMSNorm, ZeroCentredRMSNorm
from models.blocks.router import SoftmaxRouter, expert_counts
from models.decoder import CausalLM, Decoder, HubForm
from models.experts.block import Experts
from models.kernels.delta_gates import delta_gates
from quant.common.errors import NibbleError
from quant.common.jsonfile import flag, integer, number
from quant.common.words import shown

# What files may say of layers and routing; every published model has it alike.
_LAYERS = {
    "attn_output_gate": True,
    "use_qk_norm": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "scoring_func": "softmax",
}


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    hidden: int
    key_heads: int
    value_heads: int  # a multiple of key_heads
    key_dim: int  # of a head
    value_dim: int  # of a head
    convolution: int  # tokens that the convolution sees, the last one included
    eps: float

    @property
    def keys(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class Qwen3_5MoeConfig:
    vision_language: bool  # the checkpoint's form: keys under model.language_model, experts fused
    vocabulary: int
    hidden: int
    linear: tuple[bool, ...]  # per layer: Gated DeltaNet instead of attention
    expert_width: int
    shared_width: int
    experts: int
    chosen: int
    eps: float
    tied: bool
    attention: GroupedQueryAttentionConfig
    delta_net: GatedDeltaNetConfig
    rope: RopeConfig

    @staticmethod
    def parse_text(config: dict[str, Any], where: str) -> Qwen3_5MoeConfig:
        """Reads the config.json of a text model; absent keys have the defaults of Qwen3.5-35B-A3B."""
        return Qwen3_5MoeConfig._parse(config, where, flag(config, "tie_word_embeddings", False, where), False)

    @staticmethod
    def parse_vision_language(config: dict[str, Any], where: str) -> Qwen3_5MoeConfig:
        """Reads the config.json of a vision-language model, for its text model."""
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise NibbleError(
                f"{where}: text_config must be an object that describes the text model, got {shown(text)}.\n"
                "The file of a text model alone has model_type qwen3_5_moe_text, and no text_config."
            )
        # transformers ties what the outer section says, whatever the inner one has.
        tied = flag(config, "tie_word_embeddings", False, where)
        return Qwen3_5MoeConfig._parse(text, f"{where}, text_config", tied, True)

    @staticmethod
    def _parse(config: dict[str, Any], where: str, tied: bool, vision_language: bool) -> Qwen3_5MoeConfig:
        refuse_unread(config, where, **_LAYERS)
        hidden, eps = integer(config, "hidden_size", 2048, where), number(config, "rms_norm_eps", 1e-6, where)
        heads, head_dim = integer(config, "num_attention_heads", 16, where), integer(config, "head_dim", 256, where)
        bias = flag(config, "attention_bias", False, where)
        experts, chosen = expert_counts(config, 256, 8, where)
        return Qwen3_5MoeConfig(
            vision_language=vision_language,
            vocabulary=integer(config, "vocab_size", 248320, where),
            hidden=hidden,
            linear=_linear_layers(config, where),
            expert_width=integer(config, "moe_intermediate_size", 512, where),
            shared_width=integer(config, "shared_expert_intermediate_size", 512, where),
            experts=experts,
            chosen=chosen,
            eps=eps,
            tied=tied,
            attention=GroupedQueryAttentionConfig(
                hidden=hidden,
                heads=heads,
                kv_heads=kv_heads(config, heads, 2, where),
                head_dim=head_dim,
                bias=bias,
                output_bias=bias,
                norms=True,
                gate="q_proj",
            ),
            delta_net=_delta_net(config, hidden, eps, where),
            # For text the three position streams of mrope are the same, and it is plain rotary embedding.
            rope=parse_rope(config, rotary_dimensions(config, head_dim, 0.25, where), where),
        )

    @property
    def layers(self) -> int:
        return len(self.linear)


def _linear_layers(config: dict[str, Any], where: str) -> tuple[bool, ...]:
    layers = integer(config, "num_hidden_layers", 40, where, most=MAX_LAYERS)
    every = integer(config, "full_attention_interval", 4, where)
    kinds = ["full_attention" if (index + 1) % every == 0 else "linear_attention" for index in range(layers)]
    types = choices(config, "layer_types", kinds, ("linear_attention", "full_attention"), where)
    return tuple(kind == "linear_attention" for kind in types)


def _delta_net(config: dict[str, Any], hidden: int, eps: float, where: str) -> GatedDeltaNetConfig:
    key_heads = integer(config, "linear_num_key_heads", 16, where)
    value_heads = integer(config, "linear_num_value_heads", 32, where)
    if value_heads % key_heads:
        raise NibbleError(
            f"{where}: linear_num_value_heads {value_heads} is no multiple of linear_num_key_heads {key_heads}."
        )
    return GatedDeltaNetConfig(
        hidden=hidden,
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=integer(config, "linear_key_head_dim", 128, where),
        value_dim=integer(config, "linear_value_head_dim", 128, where),
        convolution=integer(config, "linear_conv_kernel_dim", 4, where),
        eps=eps,
    )


class Filters(nn.Module):
    """The short convolution's `weight` [C, 1, width], in the shape of a depthwise Conv1d's."""

    def __init__(self, channels: int, width: int, factory: Factory) -> None:
        super().__init__()
        self.weight = factory.empty(channels, 1, width)

    def forward(self, x: Tensor, documents: Documents, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        """x [N, C]: [N, C], split into so many channels."""
        weight = self.weight.squeeze(1)
        if isinstance(documents, Continued):
            return continued_convolution(x, weight, documents, self).split(list(sizes), 1)
        return split_convolution(x, weight, documents, sizes)


class GatedDeltaNet(nn.Module):
    """Linear attention whose state forgets (decay) and overwrites (beta) by what the token says."""

    group: ClassVar[Group] = "linear_attention"

    def __init__(self, config: GatedDeltaNetConfig, factory: Factory) -> None:
        super().__init__()
        self.config = c = config
        self.in_proj_qkv = Linear(c.hidden, 2 * c.keys + c.values, factory)
        self.in_proj_z = Linear(c.hidden, c.values, factory)
        # A few numbers a token, which steer the whole state: too small to be worth quantising.
        self.in_proj_b = Linear(c.hidden, c.value_heads, factory.dense)
        self.in_proj_a = Linear(c.hidden, c.value_heads, factory.dense)
        self.conv1d = Filters(2 * c.keys + c.values, c.convolution, factory)
        self.A_log, self.dt_bias = factory.float32.full(0.0, c.value_heads), factory.float32.full(0.0, c.value_heads)
        self.norm = RMSNorm(c.value_dim, c.eps, factory.float32)
        self.out_proj = Linear(c.values, c.hidden, factory)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        """x [N, H]: [N, H]."""
        c = self.config
        mixed, gate, write, step = together(x, self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        query, key, value = self.conv1d(mixed, documents, (c.keys, c.keys, c.values))
        query, key = (part.unflatten(-1, (c.key_heads, c.key_dim)) for part in (query, key))
        value = value.unflatten(-1, (c.value_heads, c.value_dim))
        inputs = (query, key, value, *delta_gates(step, write, self.A_log, self.dt_bias))
        if isinstance(documents, Continued):
            out = continued_gated_delta_rule(*inputs, documents, self)
        else:
            out = gated_delta_rule(*inputs, documents)
        gate = gate.unflatten(-1, (c.value_heads, c.value_dim))
        return self.out_proj(times_silu(self.norm(out), gate).flatten(1))


class MoE(FeedForward):
    """Routed experts plus a shared one, which sees every token as much as its gate lets it."""

    group: ClassVar[Group] = "shared_experts"  # of what has no group of its own: the gate

    uses = 4

    def __init__(self, config: Qwen3_5MoeConfig, factory: Factory) -> None:
        super().__init__()
        c = config
        self.gate = SoftmaxRouter(c.hidden, c.experts, c.chosen, factory)
        self.shared_expert = SwiGLU(c.hidden, c.shared_width, "shared_experts", factory)
        self.shared_expert_gate = Linear(c.hidden, 1, factory.dense)
        self.experts = Experts(c.experts, c.hidden, c.expert_width, factory)

    def forward(self, x: Tensor, *same: Tensor, plus: Tensor | None = None) -> Tensor:
        """x [N, H]: [N, H]. same: x again, for the shared expert, its gate and the routed ones. plus: added to it."""
        for_shared, for_gate, for_experts = same or (x, x, x)
        chosen, weights = self.gate(x)
        shared = times_sigmoid(self.shared_expert(for_shared), self.shared_expert_gate(for_gate))
        # The routed experts come last: a recomputed layer then stops before them (models/experts/block.py).
        return self.experts(for_experts, chosen, weights, shared, plus)


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3_5MoeConfig, index: int, factory: Factory) -> None:
        super().__init__()
        c = config

        def norm(size: int) -> ZeroCentredRMSNorm:
            return ZeroCentredRMSNorm(size, c.eps, factory)

        self.linear = c.linear[index]
        self.input_layernorm = norm(c.hidden)
        if self.linear:
            self.linear_attn = GatedDeltaNet(c.delta_net, factory)
        else:
            self.self_attn = GroupedQueryAttention(c.attention, factory, norm=norm)
        self.post_attention_layernorm = norm(c.hidden)
        self.mlp = MoE(c, factory)

    def forward(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor]) -> Tensor:
        x, normed = self.input_layernorm.after(x, room=0 if self.linear else self.self_attn.room())
        mixed = self.linear_attn(normed, documents) if self.linear else self.self_attn(normed, documents, tables)
        x, *copies = self.post_attention_layernorm.after(x, mixed, copies=self.mlp.uses)
        return self.mlp(*copies, plus=x)


def build(config: Qwen3_5MoeConfig, factory: Factory) -> CausalLM:
    """The text model with empty tensors."""
    c = config
    layers = [DecoderLayer(c, index, factory) for index in range(c.layers)]
    decoder = Decoder(c, layers, ZeroCentredRMSNorm(c.hidden, c.eps, factory), factory)
    model_type = "qwen3_5_moe" if c.vision_language else "qwen3_5_moe_text"
    hub = HubForm(carried=(r"model\.visual\..*", r"mtp\..*"), vision_language=c.vision_language, two_classes=True)
    return CausalLM(c, decoder, factory, model_type=model_type, hub=hub)
