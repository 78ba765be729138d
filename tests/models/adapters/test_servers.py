"""The table of matrices that servers can't serve, on each architecture, and targets without them."""

from __future__ import annotations

import pytest
import torch

from models.adapters.servers import served_targets, serving_note, unserved
from models.adapters.targets import AdapterSpec, adaptable, resolve
from models.checkpoint.keymap import KeyMap, key_map_of
from models.registry import ARCHITECTURES
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.tiny import TINY, _reference

LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
UNSERVED = {
    "glm4_moe_lite": {"vllm": ["kv_b_proj"], "sglang": ["kv_b_proj"], "llamacpp": LATENT},
    "glm_moe_dsa": {"vllm": ["kv_b_proj", "gate"], "sglang": ["kv_b_proj"], "llamacpp": LATENT},
    "qwen3_moe": {"vllm": ["gate"]},
    "qwen3_5_moe_text": {"vllm": ["gate", "shared_expert_gate"]},
    "qwen3_5_moe": {"vllm": ["gate", "shared_expert_gate"]},
}


def key_map(model_type: str) -> KeyMap:
    config = _reference(model_type, TINY[model_type]).config.to_dict()
    architecture = ARCHITECTURES[model_type]
    parsed = architecture.parse_config(config, "config.json")
    return key_map_of(architecture.build(parsed, StorageSpec("none"), torch.float32, "meta"))


@pytest.mark.parametrize("model_type", TINY)
def test_what_is_unserved(model_type: str) -> None:
    table = key_map(model_type)
    for server in ("peft", "vllm", "sglang", "llamacpp"):
        found = unserved(server, model_type, adaptable(table))
        names = {key.hub.removesuffix(".weight").rpartition(".")[2] for _, broken in found for key in broken}
        assert names == set(UNSERVED.get(model_type, {}).get(server, ()))
    note = serving_note(model_type, adaptable(table))
    assert (note is None) == (model_type not in UNSERVED)
    assert serving_note(model_type, [key for key in adaptable(table) if key.group == "experts"]) is None


@pytest.mark.parametrize("model_type", TINY)
@pytest.mark.parametrize("server", ["vllm", "llamacpp"])
def test_groups_without_what_is_unserved(model_type: str, server: str) -> None:
    table = key_map(model_type)
    groups = tuple(dict.fromkeys(key.group for key in adaptable(table)))
    targets = served_targets(groups, server, table, model_type)  # type: ignore[arg-type]
    if server not in UNSERVED.get(model_type, {}):
        assert targets == groups
    left = {target.key.native for target in resolve(table, AdapterSpec(targets, 2, 2.0), model_type)}
    lost = {key.native for _, broken in unserved(server, model_type, adaptable(table)) for key in broken}  # type: ignore[arg-type]
    assert left == {key.native for key in adaptable(table)} - lost


def test_targets_that_mean_only_what_is_unserved() -> None:
    table = key_map("qwen3_5_moe_text")
    with pytest.raises(NibbleError) as caught:
        served_targets(("router",), "vllm", table, "qwen3_5_moe_text")
    assert str(caught.value) == (
        "adapter.serve_with: vllm leaves nothing of adapter.targets (router): vLLM can't serve LoRA on that.\n"
        "Add other targets, or set adapter.serve_with: null."
    )
    assert served_targets(("router", "o_proj"), "vllm", table, "qwen3_5_moe_text") == ("o_proj",)
    with pytest.raises(NibbleError, match=r"'mlp.gate.weight' with adapter.serve_with: vllm"):
        served_targets(("mlp.gate.weight",), "vllm", table, "qwen3_5_moe_text")
