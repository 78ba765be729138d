"""The demo's small models: for each architecture a config.json spelled as in the hub's files, and extra tensors.

The sizes are alike: 4 layers, hidden 128, 8 experts of width 64 of which 2 are chosen, about a million parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quant.common.errors import NibbleError

VOCABULARY, POSITIONS = 512, 1024
DEFAULT = "glm4_moe_lite"
LAYERS, HIDDEN = 4, 128

Shapes = dict[str, tuple[int, ...]]


def _nothing(shapes: Shapes) -> Shapes:
    return {}


@dataclass(frozen=True)
class DemoModel:
    """config: config.json. carried(shapes): names and shapes of the hub's tensors that nothing here computes with,
    given those of the tensors that the model has, experts one by one.
    """

    config: dict[str, Any]
    carried: Callable[[Shapes], Shapes] = _nothing


def demo_model(model_type: str) -> DemoModel:
    if model_type not in MODELS:
        raise NibbleError(f"the demo has no architecture {model_type!r}. Choose one of {', '.join(sorted(MODELS))}.")
    return MODELS[model_type]


def _renamed(shapes: Shapes, before: str, after: str) -> Shapes:
    return {name.replace(before, after): shape for name, shape in shapes.items() if name.startswith(before)}


def _glm_prediction_layer(shapes: Shapes) -> Shapes:
    """GLM's layer for multi-token prediction comes after the last one."""
    extra = f"model.layers.{LAYERS}."
    layer = _renamed(shapes, f"model.layers.{LAYERS - 1}.", extra)
    layer |= {f"{extra}{norm}.weight": (HIDDEN,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    return {**layer, f"{extra}eh_proj.weight": (HIDDEN, 2 * HIDDEN)}


def _qwen_prediction_and_vision(shapes: Shapes) -> Shapes:
    """Qwen's prediction layer is a section of its own, with experts one by one; the vision tower is another."""
    mtp = _renamed(shapes, f"model.language_model.layers.{LAYERS - 1}.", "mtp.layers.0.")
    mtp |= {f"mtp.{norm}.weight": (HIDDEN,) for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    mtp["mtp.fc.weight"] = (HIDDEN, 2 * HIDDEN)

    v = VISION
    width, inner, merged = v["hidden_size"], v["intermediate_size"], v["hidden_size"] * v["spatial_merge_size"] ** 2
    patch = (v["in_channels"], v["temporal_patch_size"], v["patch_size"], v["patch_size"])
    linears: Shapes = {"merger.linear_fc1": (merged, merged), "merger.linear_fc2": (v["out_hidden_size"], merged)}
    norms = ["merger.norm"]
    for block in (f"blocks.{index}" for index in range(v["depth"])):
        linears |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linears |= {f"{block}.mlp.linear_fc1": (inner, width), f"{block}.mlp.linear_fc2": (width, inner)}
        norms += [f"{block}.norm1", f"{block}.norm2"]
    weights = {"patch_embed.proj": (width, *patch), **linears, **dict.fromkeys(norms, (width,))}
    tower: Shapes = {"model.visual.pos_embed.weight": (v["num_position_embeddings"], width)}
    for name, shape in weights.items():
        tower |= {f"model.visual.{name}.weight": shape, f"model.visual.{name}.bias": shape[:1]}
    return {**mtp, **tower}


_COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "float32",
    "eos_token_id": [0, 7, 9],
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    # Wider than the 0.02 of large models: the matrices here are narrow, and the base has a minute to learn.
    "initializer_range": 0.09,
    "max_position_embeddings": POSITIONS,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
}
# Written as in the hub's 4.x files: rope_theta at the top level, first_k_dense_replace.
_GLM: dict[str, Any] = {
    **_COMMON,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    **_GLM,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "v_head_dim": 32,
}
_QWEN_TEXT: dict[str, Any] = {
    **_COMMON,
    "model_type": "qwen3_5_moe_text",
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "head_dim": 64,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 64,
    "mamba_ssm_dtype": "float32",
    "mlp_only_layers": [],
    "mtp_num_hidden_layers": 1,
    "num_experts": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [4, 2, 2],
        "partial_rotary_factor": 0.25,
        # The large models' 10,000,000 would spend most of these 8 frequencies on distances beyond a document.
        "rope_theta": 10000,
        "rope_type": "default",
    },
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 64,
}
VISION: dict[str, Any] = {
    "model_type": "qwen3_5_moe_vision",
    "depth": 1,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "in_channels": 3,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": HIDDEN,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MODELS: dict[str, DemoModel] = {
    "glm4_moe_lite": DemoModel(
        {"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", **_LATENT},
        _glm_prediction_layer,
    ),
    "glm4_moe": DemoModel(
        {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            **_GLM,
            "attention_bias": True,
            "head_dim": 32,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
            "routed_scaling_factor": 1.0,
            "use_qk_norm": False,
        },
        _glm_prediction_layer,
    ),
    "glm_moe_dsa": DemoModel(
        {
            "architectures": ["GlmMoeDsaForCausalLM"],
            "model_type": "glm_moe_dsa",
            **_LATENT,
            "index_head_dim": 32,
            "index_n_heads": 4,
            # Less than the longer documents have, so that keys are left out there.
            "index_topk": 40,
            "indexer_rope_interleave": True,
            "routed_scaling_factor": 2.5,
        },
        _glm_prediction_layer,
    ),
    "afmoe": DemoModel(
        {
            "architectures": ["AfmoeForCausalLM"],
            "model_type": "afmoe",
            **_COMMON,
            "global_attn_every_n_layers": 4,
            "head_dim": 32,
            "intermediate_size": 256,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "mup_enabled": True,
            "n_group": 1,
            "num_dense_layers": 1,
            "num_expert_groups": 1,
            "num_experts": 8,
            "num_key_value_heads": 2,
            "num_limited_groups": 1,
            "num_shared_experts": 1,
            "rope_scaling": None,
            "rope_theta": 10000,
            "route_norm": True,
            "route_scale": 2.826,
            "score_func": "sigmoid",
            "sliding_window": 16,  # less than a document has
            "topk_group": 1,
        }
    ),
    "qwen3_moe": DemoModel(
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **_COMMON,
            "decoder_sparse_step": 1,
            "head_dim": 32,
            "intermediate_size": 256,
            "max_window_layers": LAYERS,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 10000,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "use_sliding_window": False,
        }
    ),
    "qwen3_5_moe_text": DemoModel({"architectures": ["Qwen3_5MoeForCausalLM"], **_QWEN_TEXT}),
    "qwen3_5_moe": DemoModel(
        {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "dtype": "float32",
            "eos_token_id": [0, 7, 9],
            "image_token_id": 1,
            "pad_token_id": 0,
            "text_config": _QWEN_TEXT,
            "tie_word_embeddings": False,
            "video_token_id": 3,
            "vision_config": VISION,
            "vision_end_token_id": 5,
            "vision_start_token_id": 5,
        },
        _qwen_prediction_and_vision,
    ),
}
