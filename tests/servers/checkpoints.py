"""Tiny checkpoints that servers take for the real ones: with a tokenizer, prediction layers, and those keys of
config.json that the published models have and transformers' classes leave out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from tests.export_helpers import World
from tests.hub_forms import fused, tensors_in
from tests.text_helpers import save_checkpoint_texts

VOCABULARY = 448
MODEL_TYPES = ("glm4_moe_lite", "glm_moe_dsa", "glm4_moe", "afmoe", "qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe")
# llama.cpp has one epsilon, one size of DeltaNet's heads, and rotates the indexer's keys by 64 values or more at once.
# Of 4 heads of the indexer two keys are so near to each other that rounding chooses.
_SIZES: dict[str, dict[str, Any]] = {
    "glm_moe_dsa": {"index_head_dim": 128, "index_n_heads": 8},
    "qwen3_5_moe": {"rms_norm_eps": 1e-6, "linear_key_head_dim": 32},
    "qwen3_5_moe_text": {"rms_norm_eps": 1e-6, "linear_key_head_dim": 32},
}
_KEYS: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 1},
    "glm_moe_dsa": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 1},
    "glm4_moe": {"first_k_dense_replace": 1},
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
}


def served_world(folder: Path, model_type: str, **changes: Any) -> World:
    """`World` of an architecture, whose base a server can load."""
    # A merge looks at the base in blocks of 64 values too.
    sizes = {"vocab_size": VOCABULARY, "moe_intermediate_size": 64, **_SIZES.get(model_type, {}), **changes}
    world = World(folder, model_type, **sizes)
    save_checkpoint_texts(world.base)
    tokenizer = Tokenizer.from_file(str(world.base / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(world.base / "tokenizer.json"))
    path = world.base / "config.json"
    config = json.loads(path.read_text())
    config.update(_KEYS.get(model_type, {}))
    text = config.get("text_config", config)
    tensors = tensors_in(world.base)
    if model_type.startswith("qwen3_5"):
        text["mtp_num_hidden_layers"] = 1
        tensors |= predicting(tensors)
    if model_type == "qwen3_5_moe":
        tensors = fused(tensors)
    path.write_text(json.dumps(config, indent=2))
    save_file(tensors, world.base / "model.safetensors", {"format": "pt"})
    return world


def predicting(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Qwen3.5's layer for multi-token prediction: the tensors of its layer of attention, and a few of its own."""
    found = {}
    for name, value in tensors.items():
        layer = re.fullmatch(r"model\.(?:language_model\.)?layers\.3\.(.*)", name)
        if layer:
            found[f"mtp.layers.0.{layer[1]}"] = value.clone()
    norm = found["mtp.layers.0.input_layernorm.weight"]
    hidden = len(norm)
    found["mtp.fc.weight"] = norm.new_ones(hidden, 2 * hidden)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        found[f"mtp.{name}.weight"] = norm.clone()
    return found
