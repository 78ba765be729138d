"""Tiny models of every kind of router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import load_model
from models.decoder import CausalLM
from tests.tiny import save_tiny
from train.config.load import Config, parse_config

CPU = torch.device("cpu")


SOFTMAX, NOT_NORMALISED, SIGMOID = "qwen3_5_moe_text", "qwen3_moe", "glm4_moe_lite"


COEFFICIENT = 0.3  # large, so that gradients show it


def save_routed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and model of transformers, by model_type."""
    changes = {
        SOFTMAX: {
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "router_aux_loss_coef": COEFFICIENT,
        },
        # The first of these layers has no experts.
        NOT_NORMALISED: {
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            "router_aux_loss_coef": COEFFICIENT,
        },
        SIGMOID: {"num_hidden_layers": 3},
    }
    made = {}
    for name, values in changes.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, save_tiny(folder, name, num_experts_per_tok=3, **values)
    return made


def trainable(folder: Path) -> CausalLM:
    model = load_model(folder, storage="none", dtype=torch.float32)
    model.requires_grad_(True)
    return model.train()


def biases(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("correction_bias", "expert_bias"))}


def config_of(folder: Path, *overrides: str) -> Config:
    text = f"model: {{path: {folder}, storage: none, dtype: float32}}\nadapter: {{kind: none}}\n"
    text += "data: {train: x.jsonl, sequence_length: 128}\ntrain: {optimizer: adamw}\noutput: {dir: x}\n"
    return parse_config(text, overrides)
