"""The native Qwen3-MoE against transformers, on tiny random checkpoints that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.qwen3_moe import Qwen3MoeConfig
from tests import architecture_checks as checks
from tests.helpers import assert_close, random_tokens, relative_error
from tests.tiny import save_tiny

QWEN = "qwen3_moe"
GROUPS = ("attention", "experts", "dense_mlp", "router")
DENSE = {"mlp_only_layers": [0]}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "not-normalised": {"norm_topk_prob": False},
    "one-expert-not-normalised": {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "three-experts": {"num_experts_per_tok": 3},
    "every-second-layer-dense": {"decoder_sparse_step": 2},
    "named-dense-layers": {"mlp_only_layers": [0, 2, 9]},
    "both-kinds-of-dense-layers": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "attention-bias": {"attention_bias": True},
    "heads-of-the-hidden-size": {"head_dim": 16},
    "as-many-key-heads": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "another-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "yarn": {"rope_parameters": YARN},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_all_gradients_equal_transformers(tmp_path: Path, variant: str) -> None:
    reference = save_tiny(tmp_path, QWEN, **VARIANTS[variant])
    checks.check_parity(tmp_path, reference, random_tokens((2, 48)))


@pytest.mark.parametrize(
    "change",
    [{"norm_topk_prob": False}, {"num_experts_per_tok": 1}, {"rms_norm_eps": 0.5}, {"rope_parameters": YARN}],
    ids=str,
)
def test_the_switches_have_an_effect_that_the_comparisons_see(tmp_path: Path, change: dict[str, Any]) -> None:
    save_tiny(tmp_path, QWEN)
    tokens = random_tokens((2, 48))
    logits = checks.load(tmp_path)(tokens)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert relative_error(checks.load(tmp_path)(tokens), logits) > 1e-3


@pytest.mark.parametrize(("storage", "double_quant"), checks.QUANTISED)
def test_quantised_model_equals_transformers_with_dequantised_weights(
    tmp_path: Path, storage: str, double_quant: bool
) -> None:
    reference = save_tiny(tmp_path, QWEN, **DENSE, attention_bias=True)
    checks.check_quantised(tmp_path, reference, storage, double_quant)


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_packed_documents_equal_documents_alone(tmp_path: Path, storage: str) -> None:
    save_tiny(tmp_path, QWEN, **DENSE)
    checks.check_packing(tmp_path, storage, [5, 33, 1, 17], GROUPS)


def test_activation_checkpointing_changes_nothing_and_skips_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, QWEN, **DENSE)
    calls, calls_recomputed = checks.check_recomputation(tmp_path, GROUPS, monkeypatch)
    assert calls == 3, "one call for each of the three sparse layers"
    assert calls_recomputed == 3, "the recomputation stops before the experts' products"


def test_casting_the_model_leaves_the_routers_in_float32(tmp_path: Path) -> None:
    save_tiny(tmp_path, QWEN)
    checks.check_cast(tmp_path)
    assert checks.float32_names(tmp_path) == {"mlp.gate.weight.value"}


@pytest.mark.parametrize("storage", ["none", "nf4", "fp4", "int8"])
def test_bfloat16_is_near_float32(tmp_path: Path, storage: str) -> None:
    save_tiny(tmp_path, QWEN, **DENSE)
    checks.check_bfloat16(tmp_path, storage)


def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, QWEN, num_experts_per_tok=8)
    checks.check_bfloat16_against_transformers(tmp_path, reference)


# --- config.json

# As Qwen3-30B-A3B's file has it.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": QWEN,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_published_file_is_read() -> None:
    config = Qwen3MoeConfig.parse(PUBLISHED, "")
    assert (config.dense, config.experts, config.chosen, config.normalise) == ((False,) * 48, 128, 8, True)
    attention = config.attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (32, 4, 128)
    assert (attention.bias, attention.output_bias, attention.norms, attention.gate) == (False, False, True, "none")
    assert len(config.rope.frequencies) == 64, "the whole of a head's 128 dimensions, in pairs"
    assert config.rope.frequencies[1] == pytest.approx(1e6 ** (-1 / 64))


def test_both_generations_of_config_json_read_alike() -> None:
    """What transformers 5 makes of the published file."""
    from transformers import Qwen3MoeConfig as Reference

    given = {key: value for key, value in PUBLISHED.items() if key not in ("model_type", "torch_dtype")}
    new = json.loads(Reference(**given).to_json_string(use_diff=False))
    assert new["num_local_experts"] == 128 and "num_experts" not in new
    assert new["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6} and "rope_theta" not in new
    assert Qwen3MoeConfig.parse(new, "new") == Qwen3MoeConfig.parse(PUBLISHED, "old")


def test_absent_keys_have_the_defaults_of_transformers() -> None:
    from transformers import Qwen3MoeConfig as Reference

    defaults = json.loads(Reference().to_json_string(use_diff=False))
    assert Qwen3MoeConfig.parse({}, "") == Qwen3MoeConfig.parse(defaults, "")


@pytest.mark.parametrize(
    "change",
    [
        {"num_local_experts": 16},  # beside num_experts
        {"mlp_only_layers": [0, 5, 99], "decoder_sparse_step": 3},
        {"mlp_only_layers": None, "decoder_sparse_step": 2},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.9}, "rope_theta": 5000000},
    ],
    ids=str,
)
def test_values_are_read_as_transformers_reads_them(change: dict[str, Any]) -> None:
    from transformers import Qwen3MoeConfig as Reference
    from transformers import Qwen3MoeModel

    given = {key: value for key, value in (PUBLISHED | change).items() if key not in ("model_type", "torch_dtype")}
    config = Reference(**given)
    with torch.device("meta"):
        model = Qwen3MoeModel(config)
    found = Qwen3MoeConfig.parse(PUBLISHED | change, "")
    assert found.experts == config.num_experts
    assert found.dense == tuple(not hasattr(layer.mlp, "experts") for layer in model.layers)
    rotary = type(model.rotary_emb)(config)
    assert_close(torch.tensor(found.rope.frequencies), rotary.inv_freq, 1e-6)
    assert found.rope.magnitude == pytest.approx(rotary.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True, "sliding_window": 4096}, "where: use_sliding_window is True; only False is im"),
        ({"use_sliding_window": "no"}, "where: use_sliding_window is 'no'; only False is implemented"),
        ({"use_qk_norm": False}, "where: use_qk_norm is False; only True is implemented"),
        ({"partial_rotary_factor": 0.5}, "where: partial_rotary_factor is 0.5; only 1, whole heads, is implemented"),
        (
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "where: partial_rotary_factor is 0.25; only 1",
        ),
        ({"head_dim": None}, "where: head_dim must be a positive integer, got None"),
        ({"num_experts": 0}, "where: num_experts must be a positive integer, got 0"),
        ({"num_experts_per_tok": 129}, "where: num_experts_per_tok is 129, but num_experts is 128; choose at most"),
        ({"num_local_experts": 4}, "where: num_experts_per_tok is 8, but num_local_experts is 4; choose at most"),
        ({"decoder_sparse_step": 0}, "where: decoder_sparse_step must be a positive integer, got 0"),
        ({"mlp_only_layers": 3}, "where: mlp_only_layers must be a list of layers' numbers, got 3"),
        ({"mlp_only_layers": {}}, "where: mlp_only_layers must be a list of layers' numbers, got {}"),
        ({"mlp_only_layers": ["0"]}, r"where: mlp_only_layers must be a list of layers' numbers, got \['0'\]"),
        ({"norm_topk_prob": None}, "where: norm_topk_prob must be true or false, got None"),
        ({"num_key_value_heads": 5}, "where: num_attention_heads 32 is no multiple of num_key_value_heads 5"),
        ({"attention_dropout": 0.1}, "where: attention_dropout is 0.1; only 0.0 is implemented"),
        ({"hidden_act": "gelu"}, "where: hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "where: rope_type 'dynamic' is not supported"),
    ],
)
def test_errors_of_config_json(change: dict[str, Any], message: str) -> None:
    checks.check_refused(PUBLISHED | change, message)
