"""Qwen3.5 and Qwen3.6 mixture-of-experts (`qwen3_5_moe`, its text model `qwen3_5_moe_text`).

Three of four layers mix tokens with a gated delta rule (Gated DeltaNet, Yang et al. 2024, arXiv:2412.06464), a state of
fixed size per head; every fourth with gated attention. Every layer has softmax-routed experts and a gated shared one.

Sizes of Qwen3.5-35B-A3B: 40 layers, hidden 2048, 16 attention heads of 256 on 2 key and value heads, 32 DeltaNet heads
of 128 on 16 query and key heads, 256 experts of width 512 of which 8 are chosen; 34.7 billion parameters of text.

The hub's files hold a vision-language model, whose text model lies under `model.language_model`; the vision tower and
the layers for multi-token prediction are left where they are.

Shapes: N tokens, H hidden, k and v heads of keys and of values, d dimensions of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.delta_rule import gated_delta_rule
from models.attention.gqa import (
    GroupedQueryAttention,
    GroupedQueryAttentionConfig,
    grouped_query_attention_keys,
    kv_heads,
)
from models.attention.rope import RopeConfig, parse_rope, rotary_dimensions
from models.attention.short_conv import short_convolution
from models.blocks.configjson import choices, flag, integer, number, refuse_dropout, refuse_unknown_activation
from models.blocks.documents import Documents
from models.blocks.experts import Experts
from models.blocks.linear import Linear
from models.blocks.mlp import SwiGLU
from models.blocks.norm import RMSNorm, ZeroCentredRMSNorm
from models.blocks.router import SoftmaxRouter
from models.checkpoint.keymap import Group, KeyMap, KeyMapBuilder
from models.decoder import CausalLM, Decoder
from quant.common.errors import NibbleError
from quant.storage import StorageSpec


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
                f"{where}: text_config must be an object that describes the text model, got {text!r}.\n"
                "The file of a text model alone has model_type qwen3_5_moe_text, and no text_config."
            )
        # transformers ties what the outer section says, whatever the inner one has.
        tied = flag(config, "tie_word_embeddings", False, where)
        return Qwen3_5MoeConfig._parse(text, f"{where}, text_config", tied, True)

    @staticmethod
    def _parse(config: dict[str, Any], where: str, tied: bool, vision_language: bool) -> Qwen3_5MoeConfig:
        refuse_unknown_activation(config, where)
        refuse_dropout(config, where)
        _refuse_other_layers(config, where)
        hidden, eps = integer(config, "hidden_size", 2048, where), number(config, "rms_norm_eps", 1e-6, where)
        heads, head_dim = integer(config, "num_attention_heads", 16, where), integer(config, "head_dim", 256, where)
        bias = flag(config, "attention_bias", False, where)
        experts, chosen = integer(config, "num_experts", 256, where), integer(config, "num_experts_per_tok", 8, where)
        if chosen > experts:
            raise NibbleError(
                f"{where}: num_experts_per_tok is {chosen}, but num_experts is {experts}; choose at most that many."
            )
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
    layers = integer(config, "num_hidden_layers", 40, where)
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


def _refuse_other_layers(config: dict[str, Any], where: str) -> None:
    """What files may say of layers, and every published model has alike."""
    for key, only in {"attn_output_gate": True, "mlp_only_layers": []}.items():
        if config.get(key, only) not in (only, None):
            raise NibbleError(f"{where}: {key} is {config[key]!r}; only {only!r} is implemented.")


class Filters(nn.Module):
    """The short convolution's `weight` [C, 1, width], in the shape of a depthwise Conv1d's."""

    def __init__(self, channels: int, width: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, dtype=dtype, device=device))

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        """x [N, C]: [N, C]."""
        return short_convolution(x, self.weight.squeeze(1), documents)


class GatedDeltaNet(nn.Module):
    """Linear attention whose state forgets (decay) and overwrites (beta) by what the token says."""

    def __init__(
        self,
        config: GatedDeltaNetConfig,
        *,
        spec: StorageSpec,
        dtype: torch.dtype,
        device: torch.device | str,
        name: str,
    ) -> None:
        super().__init__()
        self.config = c = config

        def linear(inputs: int, outputs: int, part: str, spec: StorageSpec) -> Linear:
            return Linear(inputs, outputs, spec=spec, dtype=dtype, device=device, name=f"{name}.{part}")

        def per_head() -> nn.Parameter:
            return nn.Parameter(torch.zeros(c.value_heads, dtype=torch.float32, device=device))

        self.in_proj_qkv = linear(c.hidden, 2 * c.keys + c.values, "in_proj_qkv", spec)
        self.in_proj_z = linear(c.hidden, c.values, "in_proj_z", spec)
        # A few numbers a token, which steer the whole state: too small to be worth quantising.
        self.in_proj_b = linear(c.hidden, c.value_heads, "in_proj_b", StorageSpec("none"))
        self.in_proj_a = linear(c.hidden, c.value_heads, "in_proj_a", StorageSpec("none"))
        self.conv1d = Filters(2 * c.keys + c.values, c.convolution, dtype=dtype, device=device)
        self.A_log, self.dt_bias = per_head(), per_head()
        self.norm = RMSNorm(c.value_dim, c.eps, dtype=torch.float32, device=device)
        self.out_proj = linear(c.values, c.hidden, "out_proj", spec)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        """x [N, H]: [N, H]."""
        c = self.config
        mixed = self.conv1d(self.in_proj_qkv(x), documents)
        query, key, value = mixed.split((c.keys, c.keys, c.values), dim=-1)
        query, key = (part.unflatten(-1, (c.key_heads, c.key_dim)) for part in (query, key))
        value = value.unflatten(-1, (c.value_heads, c.value_dim))
        beta = self.in_proj_b(x).to(torch.float32).sigmoid()
        step = F.softplus(self.in_proj_a(x).to(torch.float32) + self.dt_bias)
        out = gated_delta_rule(query, key, value, -self.A_log.exp() * step, beta, documents)
        gate = self.in_proj_z(x).unflatten(-1, (c.value_heads, c.value_dim))
        return self.out_proj((self.norm(out) * F.silu(gate)).flatten(1))


class MoE(nn.Module):
    """Routed experts plus a shared one, which sees every token as much as its gate lets it."""

    def __init__(
        self, config: Qwen3_5MoeConfig, *, spec: StorageSpec, dtype: torch.dtype, device: torch.device | str, name: str
    ) -> None:
        super().__init__()
        c = config
        self.gate = SoftmaxRouter(c.hidden, c.experts, c.chosen, device=device, name=f"{name}.gate")
        self.shared_expert = SwiGLU(
            c.hidden, c.shared_width, spec=spec, dtype=dtype, device=device, name=f"{name}.shared_expert"
        )
        gate = f"{name}.shared_expert_gate"
        self.shared_expert_gate = Linear(c.hidden, 1, spec=StorageSpec("none"), dtype=dtype, device=device, name=gate)
        self.experts = Experts(
            c.experts, c.hidden, c.expert_width, spec=spec, dtype=dtype, device=device, name=f"{name}.experts"
        )

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.gate(x)
        shared = self.shared_expert(x) * self.shared_expert_gate(x).sigmoid()
        # The routed experts come last: a recomputed layer then stops before them (models/blocks/experts.py).
        return self.experts(x, chosen, weights) + shared


class DecoderLayer(nn.Module):
    def __init__(
        self,
        config: Qwen3_5MoeConfig,
        index: int,
        *,
        spec: StorageSpec,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        c, name = config, f"model.layers.{index}"

        def norm(size: int) -> ZeroCentredRMSNorm:
            return ZeroCentredRMSNorm(size, c.eps, dtype=dtype, device=device)

        self.linear = c.linear[index]
        self.input_layernorm = norm(c.hidden)
        if self.linear:
            self.linear_attn = GatedDeltaNet(
                c.delta_net, spec=spec, dtype=dtype, device=device, name=f"{name}.linear_attn"
            )
        else:
            self.self_attn = GroupedQueryAttention(
                c.attention, norm=norm, spec=spec, dtype=dtype, device=device, name=f"{name}.self_attn"
            )
        self.post_attention_layernorm = norm(c.hidden)
        self.mlp = MoE(c, spec=spec, dtype=dtype, device=device, name=f"{name}.mlp")

    def forward(self, x: Tensor, documents: Documents, tables: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.input_layernorm(x)
        if self.linear:
            x = x + self.linear_attn(normed, documents)
        else:
            x = x + self.self_attn(normed, documents, tables)
        return x + self.mlp(self.post_attention_layernorm(x))


def build(config: Qwen3_5MoeConfig, *, spec: StorageSpec, dtype: torch.dtype, device: torch.device | str) -> CausalLM:
    """The text model with empty tensors; `device` may be "meta"."""
    c = config
    layers = [DecoderLayer(c, index, spec=spec, dtype=dtype, device=device) for index in range(c.layers)]
    norm = ZeroCentredRMSNorm(c.hidden, c.eps, dtype=dtype, device=device)
    decoder = Decoder(c.vocabulary, c.hidden, layers, norm, c.rope, dtype=dtype, device=device)
    model_type = "qwen3_5_moe" if c.vision_language else "qwen3_5_moe_text"
    return CausalLM(c, decoder, model_type=model_type, tied=c.tied, spec=spec, dtype=dtype, device=device)


def _delta_net_keys(keys: KeyMapBuilder, name: str, c: GatedDeltaNetConfig) -> None:
    group: Group = "linear_attention"
    channels = 2 * c.keys + c.values
    keys.linear(f"{name}.in_proj_qkv", group, (channels, c.hidden))
    keys.linear(f"{name}.in_proj_z", group, (c.values, c.hidden))
    keys.linear(f"{name}.in_proj_b", group, (c.value_heads, c.hidden), stored="dense")
    keys.linear(f"{name}.in_proj_a", group, (c.value_heads, c.hidden), stored="dense")
    keys.plain(f"{name}.conv1d.weight", group, (channels, 1, c.convolution))
    keys.plain(f"{name}.A_log", group, (c.value_heads,), float32=True)
    keys.plain(f"{name}.dt_bias", group, (c.value_heads,), float32=True)
    keys.plain(f"{name}.norm.weight", "norm", (c.value_dim,), float32=True)
    keys.linear(f"{name}.out_proj", group, (c.hidden, c.values))


def key_map(config: Qwen3_5MoeConfig) -> KeyMap:
    c = config
    keys = KeyMapBuilder(hub_model="model.language_model" if c.vision_language else "model")
    keys.plain("model.embed_tokens.weight", "embedding", (c.vocabulary, c.hidden))
    for index in range(c.layers):
        layer = f"model.layers.{index}"
        keys.plain(f"{layer}.input_layernorm.weight", "norm", (c.hidden,))
        if c.linear[index]:
            _delta_net_keys(keys, f"{layer}.linear_attn", c.delta_net)
        else:
            grouped_query_attention_keys(keys, f"{layer}.self_attn", c.attention)
        keys.plain(f"{layer}.post_attention_layernorm.weight", "norm", (c.hidden,))
        keys.matrix(f"{layer}.mlp.gate", "router", (c.experts, c.hidden), stored="float32")
        keys.swiglu(f"{layer}.mlp.shared_expert", "shared_experts", c.hidden, c.shared_width)
        keys.linear(f"{layer}.mlp.shared_expert_gate", "shared_experts", (1, c.hidden), stored="dense")
        keys.experts(f"{layer}.mlp.experts", c.experts, c.hidden, c.expert_width, fused=c.vision_language)
    keys.plain("model.norm.weight", "norm", (c.hidden,))
    keys.head("lm_head", (c.vocabulary, c.hidden), tied=c.tied)
    return keys.build(carried=[r"model\.visual\..*", r"mtp\..*"])
