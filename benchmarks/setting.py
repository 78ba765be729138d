"""What `benchmarks.step` measures: the model, the adapter and the step that both sides are given.

Free of torch and of everything else, since the peer's environment reads it too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Setting:
    """One architecture. config: as config.json spells it (transformers 5). tiny: changes of it for trying the script
    itself; every quantised row is a multiple of 64 long. attention: the projections that get LoRA, by PEFT's names.
    dense: linear layers that stay unquantised, by the ends of their names.
    """

    config: dict[str, Any]
    tiny: dict[str, Any]
    attention: tuple[str, ...]
    dense: tuple[str, ...] = ("lm_head",)

    def sized(self, tiny: bool) -> dict[str, Any]:
        return self.config | self.tiny if tiny else self.config


# Shapes alike: hidden 512, 4 layers, 32 experts of width 384, 4 of them chosen.
_COMMON: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GLM: dict[str, Any] = {
    "intermediate_size": 2048,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_key_value_heads": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 0,
}
_GLM_TINY: dict[str, Any] = {
    "intermediate_size": 256,
    "mlp_layer_types": ["dense", "sparse"],
    "n_routed_experts": 8,
    "num_key_value_heads": 4,
}
_LATENT = {"q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64}
_LATENT_TINY = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32
}  # fmt: skip
_LATENT_PROJECTIONS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

SETTINGS: dict[str, Setting] = {
    "glm4_moe_lite": Setting(
        _COMMON | _GLM | _LATENT | {"model_type": "glm4_moe_lite", "architectures": ["Glm4MoeLiteForCausalLM"]},
        _TINY | _GLM_TINY | _LATENT_TINY,
        _LATENT_PROJECTIONS,
    ),
    "glm4_moe": Setting(
        _COMMON
        | _GLM
        | {
            "model_type": "glm4_moe",
            "architectures": ["Glm4MoeForCausalLM"],
            "first_k_dense_replace": 1,
            "attention_bias": True,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": True,
        },
        _TINY | _GLM_TINY | {"num_key_value_heads": 2, "head_dim": 32},
        _PROJECTIONS,
    ),
    # Fewer keys are selected than a step has tokens.
    "glm_moe_dsa": Setting(
        _COMMON
        | _GLM
        | _LATENT
        | {
            "model_type": "glm_moe_dsa",
            "architectures": ["GlmMoeDsaForCausalLM"],
            "index_n_heads": 8,
            "index_head_dim": 64,
            "index_topk": 256,
        },
        _TINY | _GLM_TINY | _LATENT_TINY | {"index_topk": 32},
        _LATENT_PROJECTIONS,
        ("lm_head", "indexer.wq_b", "indexer.wk", "indexer.weights_proj"),
    ),
    "afmoe": Setting(
        _COMMON
        | {
            "model_type": "afmoe",
            "architectures": ["AfmoeForCausalLM"],
            "intermediate_size": 2048,
            "num_dense_layers": 1,
            "num_experts": 32,
            "num_shared_experts": 1,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 256,
            "mup_enabled": True,
            "route_norm": True,
            "route_scale": 2.826,
            "score_func": "sigmoid",
        },
        _TINY
        | {
            "intermediate_size": 256,
            "num_experts": 8,
            "head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 32,
        },
        # Not the attention's gate_proj: PEFT 0.19.1 takes it for a part of the experts' gate_up_proj, and refuses.
        _PROJECTIONS,
        ("lm_head", "router.gate"),
    ),
    "qwen3_moe": Setting(
        _COMMON
        | {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "intermediate_size": 2048,
            "mlp_only_layers": [0],  # a dense layer, as the others have
            "num_experts": 32,
            "norm_topk_prob": True,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "rms_norm_eps": 1e-6,
        },
        _TINY | {"intermediate_size": 256, "num_experts": 8, "head_dim": 32},
        _PROJECTIONS,
    ),
    "qwen3_5_moe_text": Setting(
        _COMMON
        | {
            "model_type": "qwen3_5_moe_text",
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            "num_experts": 32,
            "shared_expert_intermediate_size": 384,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        _TINY
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 8,
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
        (*_PROJECTIONS, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
        ("lm_head", "in_proj_b", "in_proj_a", "shared_expert_gate"),
    ),
}
DEFAULT = "glm4_moe_lite"

RANK = 16
ALPHA = 32
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Request:
    """One measurement in one process.

    checkpoint: folder in the hub's format. arch: of SETTINGS. dtype: of activations and of unquantised weights.
    tokens: per step, one sequence. warmup: steps that aren't measured. backend: the peer's, see step_peer.py; "" for
    the native side. profile: the native side profiles a few more steps.
    """

    checkpoint: str
    arch: str = DEFAULT
    dtype: Dtype = "bfloat16"
    tokens: int = 1024
    warmup: int = 2
    steps: int = 6
    threads: int = 1
    seed: int = 0
    backend: str = ""
    profile: bool = False

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Request:
        return Request(**json.loads(text))
