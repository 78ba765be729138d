"""Which model_type is which architecture: the only place that decides by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from models import afmoe, glm4_moe, glm4_moe_lite, glm_moe_dsa, qwen3_5_moe, qwen3_moe
from models.blocks.factory import Factory
from models.decoder import CausalLM
from quant.common.errors import NibbleError
from quant.common.words import shown
from quant.storage import StorageSpec


@dataclass(frozen=True)
class Architecture:
    """What a model file offers.

    parse_config(config_json, where) reads a hub config.json; build_model(config, factory) makes the model with empty
    tensors.
    """

    model_type: str
    parse_config: Callable[[dict[str, Any], str], Any]
    build_model: Callable[[Any, Factory], CausalLM]

    def build(self, config: Any, spec: StorageSpec, dtype: torch.dtype, device: torch.device | str) -> CausalLM:
        """The model with empty tensors; see Factory for the arguments."""
        return self.build_model(config, Factory(spec, dtype, device))


ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("glm4_moe_lite", glm4_moe_lite.Glm4MoeLiteConfig.parse, glm4_moe_lite.build),
        Architecture("glm_moe_dsa", glm_moe_dsa.GlmMoeDsaConfig.parse, glm_moe_dsa.build),
        Architecture("glm4_moe", glm4_moe.Glm4MoeConfig.parse, glm4_moe.build),
        Architecture("afmoe", afmoe.AfmoeConfig.parse, afmoe.build),
        Architecture("qwen3_moe", qwen3_moe.Qwen3MoeConfig.parse, qwen3_moe.build),
        Architecture("qwen3_5_moe", qwen3_5_moe.Qwen3_5MoeConfig.parse_vision_language, qwen3_5_moe.build),
        Architecture("qwen3_5_moe_text", qwen3_5_moe.Qwen3_5MoeConfig.parse_text, qwen3_5_moe.build),
    )
}


def architecture_for(config_json: dict[str, Any], where: str) -> Architecture:
    """The architecture of a config.json. `where` names the file in messages."""
    model_type = config_json.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise NibbleError(f"{where}: model_type {shown(model_type)} is not supported. Supported: {known}.")
    return ARCHITECTURES[model_type]
