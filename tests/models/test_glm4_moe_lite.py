"""The native GLM-4.7-Flash against transformers, on tiny random checkpoints that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.glm4_moe_lite import Glm4MoeLiteConfig
from tests import architecture_checks as checks
from tests.helpers import random_tokens, save_tiny_glm

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "n_shared_experts": 2},
    "direct-queries": {
        "q_lora_rank": None,
        "mlp_layer_types": ["dense", "dense", "sparse"],
        "attention_bias": True,
    },
    "yarn-tied": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
    },
    "not-interleaved": {"rope_interleave": False},
    "bias-of-compressed-queries": {"attention_bias": True},
}


GROUPS = ("attention", "experts", "router")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_all_gradients_equal_transformers(tmp_path: Path, variant: str) -> None:
    reference = save_tiny_glm(tmp_path, **VARIANTS[variant])
    checks.check_parity(tmp_path, reference, random_tokens((2, 48)))


@pytest.mark.parametrize(("storage", "double_quant"), checks.QUANTISED)
def test_quantised_model_equals_transformers_with_dequantised_weights(
    tmp_path: Path, storage: str, double_quant: bool
) -> None:
    reference = save_tiny_glm(tmp_path, n_shared_experts=2)
    checks.check_quantised(tmp_path, reference, storage, double_quant)


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_packed_documents_equal_documents_alone(tmp_path: Path, storage: str) -> None:
    save_tiny_glm(tmp_path)
    checks.check_packing(tmp_path, storage, [5, 33, 1, 17], GROUPS)


def test_activation_checkpointing_changes_nothing_and_skips_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_glm(tmp_path)
    calls, calls_recomputed = checks.check_recomputation(tmp_path, GROUPS, monkeypatch)
    assert calls == 2, "one call for each of the two sparse layers"
    assert calls_recomputed == 2, "the recomputation stops before the experts' products"


def test_casting_the_model_leaves_the_routers_in_float32(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path)
    checks.check_cast(tmp_path)
    assert checks.float32_names(tmp_path) == {"mlp.gate.weight.value", "mlp.gate.e_score_correction_bias"}


@pytest.mark.parametrize("storage", ["none", "nf4", "fp4", "int8"])
def test_bfloat16_is_near_float32(tmp_path: Path, storage: str) -> None:
    save_tiny_glm(tmp_path)
    checks.check_bfloat16(tmp_path, storage)


def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    reference = save_tiny_glm(tmp_path, num_experts_per_tok=8)
    checks.check_bfloat16_against_transformers(tmp_path, reference)


def test_both_generations_of_config_json_read_alike(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path, mlp_layer_types=["dense", "dense", "sparse"], rope_parameters={
        "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    })  # fmt: skip
    new = json.loads((tmp_path / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("mlp_layer_types", "rope_parameters", "dtype")}
    old |= {
        "first_k_dense_replace": 2,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "torch_dtype": "float32",
        "eos_token_id": [1, 2],
    }
    parsed = Glm4MoeLiteConfig.parse(new, "new")
    assert Glm4MoeLiteConfig.parse(old, "old") == parsed
    # What real files say besides: a null that stands for nothing, a factor of one, a type for the prediction layer.
    plain = {"rope_scaling": None, "rope_theta": 1000000, "partial_rotary_factor": 1.0, "eos_token_id": 2}
    assert Glm4MoeLiteConfig.parse(plain, "").rope == Glm4MoeLiteConfig.parse({"rope_theta": 1e6}, "").rope
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_scaling": old["rope_scaling"]}
    assert Glm4MoeLiteConfig.parse(both, "").rope == Glm4MoeLiteConfig.parse(both | {"rope_parameters": None}, "").rope
    longer = new | {"mlp_layer_types": [*new["mlp_layer_types"], "sparse"]}
    assert Glm4MoeLiteConfig.parse(longer, "longer") == parsed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "where: model_type 'mamba' is not supported. Supported: .*glm4_moe_lite"),
        ({"hidden_size": "wide"}, "where: hidden_size must be a positive integer, got 'wide'"),
        ({"attention_dropout": 0.1}, "where: attention_dropout is 0.1; only 0.0 is implemented"),
        ({"hidden_act": "gelu"}, "where: hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"rope_scaling": {"type": "llama3"}}, "where: rope_type 'llama3' is not supported; 'default' and 'yarn' are"),
        ({"rope_scaling": ["yarn"]}, r"where: rope_scaling must be an object, got \['yarn'\]"),
        ({"rope_scaling": []}, r"where: rope_scaling must be an object, got \[\]"),
        ({"rope_parameters": []}, r"where: rope_parameters must be an object, got \[\]"),
        ({"rope_parameters": {"rope_type": []}}, r"where: rope_type must be text, got \[\]"),
        ({"rope_parameters": {"rope_theta": ""}}, "where: rope_theta must be a positive number, got ''"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "where: truncate must be true or false"),
        ({"rope_theta": "big"}, "where: rope_theta must be a positive number, got 'big'"),
        ({"rope_scaling": {"type": "yarn", "factor": "four"}}, "where: factor must be a positive number, got 'four'"),
        ({"partial_rotary_factor": 0.5}, r"where: partial_rotary_factor is 0\.5; .* qk_rope_head_dim \(64\)\.\nSet it"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"where: partial_rotary_factor is 0\.5; latent attention",
        ),
        ({"qk_rope_head_dim": 7}, "where: 7 rotary dimensions of a head can't be paired; the number must be even"),
        ({"rms_norm_eps": None}, "where: rms_norm_eps must be a positive number, got None"),
        ({"attention_bias": "no"}, "where: attention_bias must be true or false, got 'no'"),
        (
            {"num_nextn_predict_layers": None},
            "where: num_nextn_predict_layers must be an integer of at least 0, got None",
        ),
        ({"n_shared_experts": 0}, "where: n_shared_experts must be a positive integer, got 0"),
        (
            {"mlp_layer_types": ["dense", "moe"]},
            r"where: mlp_layer_types must be a list of 'dense' and 'sparse', got \[",
        ),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types names 1 layers, num_hidden_layers is 47; make them agree"),
        (
            {"n_group": 3},
            "where: n_group 3 doesn't divide n_routed_experts 64 into groups of two or more.\nChoose a divisor",
        ),
        ({"n_group": 64}, "where: n_group 64 doesn't divide n_routed_experts 64 into groups of two or more"),
        ({"topk_group": 2}, "where: topk_group 2 is more than n_group 1; choose at most that many"),
        (
            {"n_group": 32, "topk_group": 1},
            "num_experts_per_tok is 4, but n_routed_experts 64, n_group 32 and topk_group 1 leave 2 to choose from.\n"
            "Set num_experts_per_tok to at most 2",
        ),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok is 65, but .* leave 64 to choose from"),
    ],
)
def test_errors_of_config_json(change: dict[str, Any], message: str) -> None:
    checks.check_refused({"model_type": "glm4_moe_lite", **change}, message)
