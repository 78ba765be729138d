"""Every published size builds, with as many parameters as transformers counts, and with the bytes of its storage.

All on the meta device, where tensors have shapes and no content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from models.checkpoint.conversion import count_parameters
from models.checkpoint.keymap import KeyMap, key_map_of
from models.decoder import CausalLM
from models.registry import ARCHITECTURES, architecture_for
from quant.storage import StorageSpec
from tests.tiny import TINY, classes_of

GLM_45: dict[str, Any] = {
    "num_hidden_layers": 92,
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "n_routed_experts": 160,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
    "routed_scaling_factor": 2.5,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": True,
}
TRINITY: dict[str, Any] = {
    "num_dense_layers": 2,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "sliding_window": 2048,
    "route_scale": 2.826,
    "mup_enabled": True,
    "max_position_embeddings": 131072,
}
QWEN_122B: dict[str, Any] = {
    "num_hidden_layers": 48,
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "linear_num_value_heads": 64,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
}
QWEN_397B = QWEN_122B | {
    "num_hidden_layers": 60,
    "hidden_size": 4096,
    "num_experts": 512,
    "num_experts_per_tok": 10,
}


@dataclass(frozen=True)
class Size:
    """config: what config.json has other than the architecture's defaults. parameters: without the routers' biases,
    but for Trinity's, which are parameters in its checkpoint's reference. gib: in nf4 with double quantisation, the
    rest in bfloat16 and the routers in float32.
    """

    model_type: str
    config: dict[str, Any]
    parameters: int
    gib: float | None = None


SIZES = {
    "GLM-4.7-Flash": Size("glm4_moe_lite", {}, 29_943_390_976, 15.28),
    "GLM-4.5-Air": Size("glm4_moe", {"head_dim": 128, "attention_bias": True}, 106_852_245_504, 53.13),
    # transformers' defaults, in which the heads are a share of the hidden size
    "GLM-4.5-Air with heads of 42": Size(
        "glm4_moe", {"head_dim": 42, "rope_parameters": {"partial_rotary_factor": 1.0}}, 103_481_200_640
    ),
    "GLM-4.7": Size("glm4_moe", GLM_45, 352_797_814_784, 171.88),
    "GLM-5": Size("glm_moe_dsa", {}, 743_911_199_232, 361.46),
    "Qwen3-30B-A3B": Size("qwen3_moe", {"num_hidden_layers": 48, "head_dim": 128}, 30_532_122_624, 15.57),
    "Qwen3-235B-A22B": Size(
        "qwen3_moe",
        {
            "num_hidden_layers": 94,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "head_dim": 128,
            "moe_intermediate_size": 1536,
        },
        235_093_634_560,
        114.83,
    ),
    "Qwen3.5-35B-A3B": Size("qwen3_5_moe_text", {}, 34_660_610_688, 18.13),
    "Qwen3.5-35B-A3B with vision": Size("qwen3_5_moe", {"text_config": {}}, 34_660_610_688, 18.13),
    "Qwen3.5-122B-A10B": Size("qwen3_5_moe", {"text_config": QWEN_122B}, 122_111_526_912, 60.92),
    "Qwen3.5-397B-A17B": Size("qwen3_5_moe", {"text_config": QWEN_397B}, 396_346_350_336, 193.68),
    "Trinity-Nano": Size(
        "afmoe",
        {
            **TRINITY,
            "num_hidden_layers": 56,
            "hidden_size": 1024,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 3072,
            "moe_intermediate_size": 256,
        },
        6_120_003_328,
        3.53,
    ),
    "Trinity-Mini": Size(
        "afmoe",
        {
            **TRINITY,
            "num_hidden_layers": 32,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "intermediate_size": 6144,
            "moe_intermediate_size": 1024,
        },
        26_123_974_400,
        13.71,
    ),
    "Trinity-Large": Size(
        "afmoe",
        {
            **TRINITY,
            "num_hidden_layers": 60,
            "num_dense_layers": 6,
            "hidden_size": 3072,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "intermediate_size": 12288,
            "moe_intermediate_size": 3072,
            "num_experts": 256,
            "num_experts_per_tok": 4,
            "sliding_window": 4096,
            "route_scale": 2.448,
        },
        398_635_286_016,
        193.36,
    ),
}


def native(size: Size, spec: StorageSpec) -> tuple[CausalLM, KeyMap]:
    config_json = {"model_type": size.model_type, **size.config}
    architecture = architecture_for(config_json, "here")
    config = architecture.parse_config(config_json, "here")
    model = architecture.build(config, spec, torch.bfloat16, "meta")
    return model, key_map_of(model)


def counted_by_transformers(size: Size) -> int:
    """Without the vision tower, which isn't loaded for text."""
    config_class, model_class = classes_of(size.model_type)
    with torch.device("meta"):
        model = model_class(config_class(**size.config))
    return sum(tensor.numel() for name, tensor in model.named_parameters() if "visual." not in name)


def test_every_architecture_is_tested_at_a_tiny_and_at_its_real_size() -> None:
    assert set(TINY) == {size.model_type for size in SIZES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", SIZES)
def test_parameters(name: str) -> None:
    size = SIZES[name]
    model, key_map = native(size, StorageSpec("none"))
    assert count_parameters(key_map.keys) == size.parameters
    assert counted_by_transformers(size) == size.parameters
    tensors = [*model.parameters(), *model.buffers()]
    assert len(tensors) == len(key_map.keys)
    assert sum(tensor.numel() for tensor in tensors) == sum(torch.Size(key.shape).numel() for key in key_map.keys)


@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if size.gib is not None])
def test_bytes_in_nf4_with_double_quantisation(name: str) -> None:
    model, _ = native(SIZES[name], StorageSpec("nf4"))
    size = sum(tensor.nbytes for tensor in model.parameters())
    assert size / 2**30 == pytest.approx(SIZES[name].gib, abs=0.006)
