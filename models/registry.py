"""Which model_type is which architecture: the only place that decides by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from models import afmoe, glm4_moe, glm4_moe_lite, glm_moe_dsa, qwen3_5_moe
from models.checkpoint.keymap import KeyMap
from models.decoder import CausalLM
from quant.common.errors import NibbleError
from quant.storage import StorageSpec


@dataclass(frozen=True)
class Architecture:
    """What a model file offers.

    parse_config(config_json, where) reads a hub config.json; build_model(config, spec=, dtype=, device=) makes the
    model with empty tensors; key_map(config) is the table between hub keys and native tensors.
    """

    model_type: str
    parse_config: Callable[[dict[str, Any], str], Any]
    build_model: Callable[..., CausalLM]
    key_map: Callable[[Any], KeyMap]

    def build(self, config: Any, spec: StorageSpec, dtype: torch.dtype, device: torch.device | str) -> CausalLM:
        return self.build_model(config, spec=spec, dtype=dtype, device=device)


_QWEN = qwen3_5_moe.Qwen3_5MoeConfig

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(
            "glm4_moe_lite", glm4_moe_lite.Glm4MoeLiteConfig.parse, glm4_moe_lite.build, glm4_moe_lite.key_map
        ),
        Architecture("glm_moe_dsa", glm_moe_dsa.GlmMoeDsaConfig.parse, glm_moe_dsa.build, glm_moe_dsa.key_map),
        Architecture("glm4_moe", glm4_moe.Glm4MoeConfig.parse, glm4_moe.build, glm4_moe.key_map),
        Architecture("afmoe", afmoe.AfmoeConfig.parse, afmoe.build, afmoe.key_map),
        Architecture("qwen3_5_moe", _QWEN.parse_vision_language, qwen3_5_moe.build, qwen3_5_moe.key_map),
        Architecture("qwen3_5_moe_text", _QWEN.parse_text, qwen3_5_moe.build, qwen3_5_moe.key_map),
    )
}


def architecture_for(config_json: dict[str, Any], where: str) -> Architecture:
    """The architecture of a config.json. `where` names the file in messages."""
    model_type = config_json.get("model_type")
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise NibbleError(f"{where}: model_type {model_type!r} is not supported. Supported: {known}.")
    return ARCHITECTURES[model_type]
