"""What `benchmarks.step` measures: the model, the adapter and the step that both sides are given.

Free of torch and of everything else, since the peer's environment reads it too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# GLM-4.7-Flash's architecture at 72.6 million parameters, as config.json spells it (transformers 5).
MODEL: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "moe_intermediate_size": 384,
    "num_hidden_layers": 4,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
# The same shape at a size for trying the script itself; every quantised row is a multiple of 64 long.
TINY: dict[str, Any] = MODEL | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}

RANK = 16
ALPHA = 32
LEARNING_RATE = 2e-4
MAX_GRAD_NORM = 1.0
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Request:
    """One measurement in one process.

    checkpoint: folder in the hub's format. dtype: of activations and of unquantised weights. tokens: per step, one
    sequence. warmup: steps that aren't measured. backend: the peer's, see step_peer.py; "" for the native side.
    profile: the native side profiles a few more steps.
    """

    checkpoint: str
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


def config_of(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return found
