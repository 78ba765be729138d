"""The native GLM-4.5 to GLM-4.7 against transformers, on tiny random checkpoints that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint.hub import HubCheckpoint
from models.checkpoint.stream import HubReader
from models.glm4_moe import Glm4MoeConfig, build
from tests import architecture_checks as checks
from tests.helpers import assert_close, key_map_for, random_tokens, relative_error
from tests.tiny import save_tiny

GLM = "glm4_moe"
GROUPS = ("attention", "experts", "shared_experts", "dense_mlp", "router")


def rope(**entries: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **entries}}


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "two-dense-layers": {"first_k_dense_replace": 2},
    "no-dense-layer": {"first_k_dense_replace": 0},
    "three-experts": {"num_experts_per_tok": 3},
    "groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    "groups-normalised-and-scaled": {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
    "two-shared-experts": {"n_shared_experts": 2},
    "attention-bias": {"attention_bias": True},
    "qk-norm": {"use_qk_norm": True},
    "bias-and-qk-norm": {"attention_bias": True, "use_qk_norm": True},
    "as-many-key-heads": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "a-quarter-rotated": rope(partial_rotary_factor=0.25),
    "all-rotated": rope(partial_rotary_factor=1.0),
    "yarn": rope(**YARN, partial_rotary_factor=0.5),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_all_gradients_equal_transformers(tmp_path: Path, variant: str) -> None:
    reference = save_tiny(tmp_path, GLM, **VARIANTS[variant])
    checks.check_parity(tmp_path, reference, random_tokens((2, 48)))


def test_the_groups_have_an_effect_that_the_comparisons_see(tmp_path: Path) -> None:
    save_tiny(tmp_path, GLM, **VARIANTS["groups"])
    tokens = random_tokens((2, 48))
    logits = checks.load(tmp_path)(tokens)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_group": 1, "topk_group": 1}))
    assert relative_error(checks.load(tmp_path)(tokens), logits) > 1e-3


@pytest.mark.parametrize(("storage", "double_quant"), checks.QUANTISED)
def test_quantised_model_equals_transformers_with_dequantised_weights(
    tmp_path: Path, storage: str, double_quant: bool
) -> None:
    reference = save_tiny(tmp_path, GLM, n_shared_experts=2, attention_bias=True)
    checks.check_quantised(tmp_path, reference, storage, double_quant)


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_packed_documents_equal_documents_alone(tmp_path: Path, storage: str) -> None:
    save_tiny(tmp_path, GLM, attention_bias=True)
    checks.check_packing(tmp_path, storage, [5, 33, 1, 17], GROUPS)


def test_activation_checkpointing_changes_nothing_and_skips_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, GLM)
    calls, calls_recomputed = checks.check_recomputation(tmp_path, GROUPS, monkeypatch)
    assert calls == 3, "one call for each of the three sparse layers"
    assert calls_recomputed == 3, "the recomputation stops before the experts' products"


def test_casting_the_model_leaves_the_routers_in_float32(tmp_path: Path) -> None:
    save_tiny(tmp_path, GLM, use_qk_norm=True)
    checks.check_cast(tmp_path)
    assert checks.float32_names(tmp_path) == {"mlp.gate.weight.value", "mlp.gate.e_score_correction_bias"}


@pytest.mark.parametrize("storage", ["none", "nf4", "fp4", "int8"])
def test_bfloat16_is_near_float32(tmp_path: Path, storage: str) -> None:
    save_tiny(tmp_path, GLM, attention_bias=True)
    checks.check_bfloat16(tmp_path, storage)


def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, GLM, num_experts_per_tok=8)
    checks.check_bfloat16_against_transformers(tmp_path, reference)


def test_prediction_layers_are_carried(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path, GLM)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {"model.layers.4.eh_proj.weight", "model.layers.4.mlp.experts.0.up_proj.weight"}
    save_file(tensors | {name: torch.zeros(2, 2) for name in extra}, tmp_path / "model.safetensors")
    checkpoint = HubCheckpoint(tmp_path)
    keys = key_map_for(build, Glm4MoeConfig.parse(checkpoint.config, ""))
    assert set(HubReader(checkpoint, keys).carried) == extra
    assert not keys.is_carried("model.layers.3.mlp.experts.0.up_proj.weight")
    assert not keys.is_carried("model.layers.5.eh_proj.weight")


# --- config.json

# As GLM-4.5-Air's file has it.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": GLM,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}


def test_the_published_file_is_read() -> None:
    config = Glm4MoeConfig.parse(PUBLISHED, "")
    assert (config.layers, sum(config.dense), config.experts, config.routing.chosen) == (46, 1, 128, 8)
    attention = config.attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (96, 8, 128)
    assert (attention.bias, attention.output_bias, attention.norms) == (True, False, False)
    assert len(config.rope.frequencies) == 32, "half of a head's 128 dimensions, in pairs"
    assert config.rope.frequencies[1] == pytest.approx(1e6 ** (-1 / 32))
    keys = key_map_for(build, config)
    assert keys.is_carried("model.layers.46.shared_head.norm.weight")
    assert not keys.is_carried("model.layers.45.input_layernorm.weight")


def test_both_generations_of_config_json_read_alike() -> None:
    new = {key: value for key, value in PUBLISHED.items() if not key.startswith(("rope_", "partial", "torch_dtype"))}
    new |= {"dtype": "bfloat16", "eos_token_id": 151329}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    assert Glm4MoeConfig.parse(new, "new") == Glm4MoeConfig.parse(PUBLISHED, "old")
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}  # then half of a head is rotated
    assert Glm4MoeConfig.parse(new, "new") == Glm4MoeConfig.parse(PUBLISHED, "old")
    named = {key: value for key, value in new.items() if key != "first_k_dense_replace"}
    named["mlp_layer_types"] = ["dense"] + ["sparse"] * 45
    assert Glm4MoeConfig.parse(named, "named") == Glm4MoeConfig.parse(PUBLISHED, "old")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"partial_rotary_factor": 0.25},
        {"partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.75}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "partial_rotary_factor": 0.25},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.25, "attention_factor": 0.9}},
    ],
)
def test_positions_are_read_as_transformers_reads_them(change: dict[str, Any]) -> None:
    from transformers import Glm4MoeConfig as Reference
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    given = {key: value for key, value in (PUBLISHED | change).items() if key not in ("model_type", "torch_dtype")}
    rotary = Glm4MoeRotaryEmbedding(Reference(**given))
    found = Glm4MoeConfig.parse(PUBLISHED | change, "").rope
    assert_close(torch.tensor(found.frequencies), rotary.inv_freq, 1e-6)
    assert found.magnitude == pytest.approx(rotary.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_rotary_factor": 1.5}, "where: partial_rotary_factor is 1.5; it is a share of a head, at most 1"),
        ({"partial_rotary_factor": "half"}, "where: partial_rotary_factor must be a positive number, got 'half'"),
        ({"head_dim": 42}, "where: 21 rotary dimensions of a head can't be paired; the number must be even"),
        ({"head_dim": 0}, "where: head_dim must be a positive integer, got 0"),
        (
            {"num_key_value_heads": 7},
            "where: num_attention_heads 96 is no multiple of num_key_value_heads 7, so that the query heads can't",
        ),
        ({"use_qk_norm": "yes"}, "where: use_qk_norm must be true or false, got 'yes'"),
        ({"attention_bias": None}, "where: attention_bias must be true or false, got None"),
        ({"attention_dropout": 0.1}, "where: attention_dropout is 0.1; only 0.0 is implemented"),
        ({"hidden_act": "gelu"}, "where: hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "where: rope_type 'linear' is not supported"),
        ({"first_k_dense_replace": -1}, "where: first_k_dense_replace must be an integer of at least 0, got -1"),
        ({"mlp_layer_types": ["dense"]}, "where: mlp_layer_types names 1 layers, num_hidden_layers is 46"),
        ({"num_nextn_predict_layers": -1}, "where: num_nextn_predict_layers must be an integer of at least 0, got -1"),
        ({"n_group": 3}, "where: n_group 3 doesn't divide n_routed_experts 128 into groups of two or more"),
        ({"topk_group": 2}, "where: topk_group 2 is more than n_group 1; choose at most that many"),
        ({"n_group": 64, "topk_group": 2}, "where: num_experts_per_tok is 8, but .* leave 4 to choose from"),
        ({"routed_scaling_factor": "2.5"}, "where: routed_scaling_factor must be a positive number, got '2.5'"),
        ({"norm_topk_prob": 1}, "where: norm_topk_prob must be true or false, got 1"),
    ],
)
def test_errors_of_config_json(change: dict[str, Any], message: str) -> None:
    checks.check_refused(PUBLISHED | change, message)
