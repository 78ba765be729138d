"""Tiny models of every architecture with all kernels = with none: loss and gradients of LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.adapters.lora import trainable_parameters
from quant.kernels.choice import KERNELS, using
from tests.architecture_checks import adapted, cross_entropy
from tests.helpers import assert_close, random_tokens
from tests.tiny import save_tiny

CHANGES: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": {"n_routed_experts": 3},
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True, "n_routed_experts": 3},
    "glm_moe_dsa": {"index_topk": 4, "n_routed_experts": 3},  # fewer than a document has tokens
    "afmoe": {"global_attn_every_n_layers": 2, "num_experts": 3},
    "qwen3_moe": {"num_hidden_layers": 1, "num_experts": 3},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"], "num_experts": 3},
}


@pytest.mark.parametrize("architecture", CHANGES)
def test_models(architecture: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, architecture, **{"num_hidden_layers": 2, **CHANGES[architecture]})
    groups = ["attention", "experts", *(["linear_attention"] if "qwen3_5" in architecture else ["shared_experts"])]
    model = adapted(tmp_path, "none", groups[:2] if architecture == "qwen3_moe" else groups)
    model.activation_checkpointing = architecture == "glm4_moe_lite"
    tokens = random_tokens((1, 6))

    def results() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loss = cross_entropy(model(tokens), tokens)
        return loss, list(torch.autograd.grad(loss, [parameter for _, parameter in trainable_parameters(model)]))

    right_loss, right = results()
    with using(KERNELS):
        loss, given = results()
    assert_close(loss, right_loss)
    for (name, _), ours, theirs in zip(trainable_parameters(model), given, right, strict=True):
        assert_close(ours, theirs, what=name)
