"""Tiny random models of transformers, one of each architecture, against which the native models are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# Every matrix that may be quantised has an input dimension that is a multiple of the block size, 64.
_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    # Larger than the default 0.02, so that every part of the model has a visible effect on the logits.
    "initializer_range": 0.15,
    # With a padding token, transformers gives its embedding no gradient; here every row of the embedding is compared.
    "pad_token_id": None,
}
_GLM = {"intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
}
_QWEN = {
    "num_key_value_heads": 2,
    "head_dim": 32,
    "shared_expert_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    # DeltaNet's output is normalised; where it happens to be near zero, a small epsilon would magnify round-off.
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.1,
}
TINY: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": {**_COMMON, **_GLM, **_LATENT},
    "glm4_moe": {**_COMMON, **_GLM, "num_key_value_heads": 2, "head_dim": 16},
    "glm_moe_dsa": {**_COMMON, **_GLM, **_LATENT, "index_topk": 16, "index_n_heads": 4, "index_head_dim": 16},
    "afmoe": {
        **_COMMON,
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "route_scale": 1.7,
        "sliding_window": 16,
        "mup_enabled": True,
    },
    "qwen3_moe": {
        **_COMMON,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "qwen3_5_moe_text": {**_COMMON, **_QWEN},
    "qwen3_5_moe": {**_COMMON, **_QWEN},
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_OUTER = ("tie_word_embeddings",)  # keys of a vision-language config that stand outside its text_config


def classes_of(model_type: str) -> tuple[Any, Any]:
    """transformers' config and model."""
    import transformers as tf

    return {
        "glm4_moe_lite": (tf.Glm4MoeLiteConfig, tf.Glm4MoeLiteForCausalLM),
        "glm4_moe": (tf.Glm4MoeConfig, tf.Glm4MoeForCausalLM),
        "glm_moe_dsa": (tf.GlmMoeDsaConfig, tf.GlmMoeDsaForCausalLM),
        "afmoe": (tf.AfmoeConfig, tf.AfmoeForCausalLM),
        "qwen3_moe": (tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM),
        "qwen3_5_moe_text": (tf.Qwen3_5MoeTextConfig, tf.Qwen3_5MoeForCausalLM),
        "qwen3_5_moe": (tf.Qwen3_5MoeConfig, tf.Qwen3_5MoeForConditionalGeneration),
    }[model_type]


def _reference(model_type: str, settings: dict[str, Any]) -> Any:
    config_class, model_class = classes_of(model_type)
    if model_type == "qwen3_5_moe":
        outer = {key: settings[key] for key in _OUTER if key in settings}
        settings = {"text_config": settings, "vision_config": _VISION, **outer}
    return model_class(config_class(**settings))


def tiny(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of transformers, with norms, biases and routers' biases not trivial."""
    torch.manual_seed(seed)
    model = _reference(model_type, {**TINY[model_type], **changes}).float().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name and not name.endswith(".bias"):
                centred = 0.0 if model_type.startswith("qwen3_5") and "linear_attn" not in name else 1.0
                tensor.copy_(centred + 0.2 * torch.randn_like(tensor))
            elif name.endswith(("e_score_correction_bias", "expert_bias", ".bias", "dt_bias")):
                tensor.copy_(0.2 * torch.randn_like(tensor))
            elif name.endswith("A_log"):
                # Decay of a third per token at most: stronger ones cost the reference digits, since it takes
                # differences of sums over a chunk of 64 tokens.
                tensor.copy_(-2 + 0.5 * torch.randn_like(tensor))
            elif name.endswith(("router.gate.weight", "mlp.gate.weight", "conv1d.weight")):
                tensor.copy_(0.15 * torch.randn_like(tensor))
    return model


def save_tiny(directory: Path, model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Saves :func:`tiny` as transformers does, and returns the model."""
    model = tiny(model_type, seed, **changes)
    model.save_pretrained(directory)
    return model
