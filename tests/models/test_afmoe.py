"""The native Trinity against transformers, on tiny random checkpoints that transformers saved.

Unless a variant says otherwise, a token sees 16 tokens in the sliding layers, and the fourth layer is global.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.afmoe import AfmoeConfig, build
from tests import architecture_checks as checks
from tests.helpers import assert_close, key_map_for, random_tokens, relative_error
from tests.tiny import save_tiny

AFMOE = "afmoe"
GROUPS = ("attention", "experts", "shared_experts", "dense_mlp", "router")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "every-second-layer-global": {"global_attn_every_n_layers": 2},
    "layer-types": {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]},
    "all-global": {"layer_types": ["full_attention"] * 4},
    "three-experts": {"num_experts_per_tok": 3},
    "two-shared-experts-without-mup": {"num_shared_experts": 2, "mup_enabled": False},
    "two-dense-layers": {"num_dense_layers": 2},
    "no-dense-layer": {"num_dense_layers": 0},
    "attention-bias": {"attention_bias": True},
    "as-many-key-heads": {"num_key_value_heads": 4},
    "key-heads-left-out": {"num_key_value_heads": None},
    "one-key-head": {"num_key_value_heads": 1},
    "other-rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_all_gradients_equal_transformers(tmp_path: Path, variant: str) -> None:
    reference = save_tiny(tmp_path, AFMOE, **VARIANTS[variant])
    checks.check_parity(tmp_path, reference, random_tokens((2, 48)))


@pytest.mark.parametrize(
    ("window", "length"), [(2, 9), (3, 48), (7, 50), (16, 15), (16, 16), (16, 17), (16, 32), (16, 41), (64, 48)]
)
def test_windows_and_lengths(tmp_path: Path, window: int, length: int) -> None:
    """Sequences that are shorter than the window, just as long, and no multiple of it."""
    reference = save_tiny(tmp_path, AFMOE, sliding_window=window, global_attn_every_n_layers=3)
    checks.check_parity(tmp_path, reference, random_tokens((2, length)))


def test_the_window_and_the_positions_have_an_effect_that_the_comparisons_see(tmp_path: Path) -> None:
    save_tiny(tmp_path, AFMOE)
    tokens = random_tokens((1, 48))
    with torch.no_grad():
        logits = checks.load(tmp_path)(tokens)
        wider, global_too = checks.load(tmp_path), checks.load(tmp_path)
        for layer in wider.model.layers[:3]:
            layer.self_attn.window = 17
        global_too.model.layers[3].sliding = True  # which gives it positions, and still no window
        assert relative_error(wider(tokens), logits) > 1e-3
        assert_close(wider(tokens)[:, :16], logits[:, :16])
        assert relative_error(global_too(tokens), logits) > 1e-3


@pytest.mark.parametrize(("storage", "double_quant"), checks.QUANTISED)
def test_quantised_model_equals_transformers_with_dequantised_weights(
    tmp_path: Path, storage: str, double_quant: bool
) -> None:
    reference = save_tiny(tmp_path, AFMOE, num_shared_experts=2)
    checks.check_quantised(tmp_path, reference, storage, double_quant)


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_packed_documents_equal_documents_alone(tmp_path: Path, storage: str) -> None:
    save_tiny(tmp_path, AFMOE)
    checks.check_packing(tmp_path, storage, [5, 15, 16, 17, 1, 33, 50], GROUPS)


def test_activation_checkpointing_changes_nothing_and_skips_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, AFMOE)
    calls, calls_recomputed = checks.check_recomputation(tmp_path, GROUPS, monkeypatch)
    assert calls == 3, "one call for each of the three sparse layers"
    assert calls_recomputed == 3, "the norm behind the experts keeps their output, so they are not computed again"


def test_casting_the_model_leaves_the_routers_in_float32(tmp_path: Path) -> None:
    save_tiny(tmp_path, AFMOE)
    checks.check_cast(tmp_path)


def test_what_is_loaded_in_float32(tmp_path: Path) -> None:
    """As transformers does, the norms too."""
    reference = save_tiny(tmp_path, AFMOE)
    norms = {"input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"}
    norms |= {"self_attn.q_norm", "self_attn.k_norm"}
    assert {name.split(".")[-1] for name in norms} <= set(reference._keep_in_fp32_modules)
    assert checks.float32_names(tmp_path) == {
        *(f"{name}.weight" for name in norms),
        "weight",  # of the final norm
        "mlp.gate.weight.value",
        "mlp.gate.e_score_correction_bias",
    }


@pytest.mark.parametrize("storage", ["none", "nf4", "fp4", "int8"])
def test_bfloat16_is_near_float32(tmp_path: Path, storage: str) -> None:
    save_tiny(tmp_path, AFMOE)
    checks.check_bfloat16(tmp_path, storage)


def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, AFMOE, num_experts_per_tok=8)
    checks.check_bfloat16_against_transformers(tmp_path, reference)


# --- config.json

# As Trinity-Mini's file has it, with what only its remote code reads.
PUBLISHED: dict[str, Any] = {
    "architectures": ["AfmoeForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_afmoe.AfmoeConfig", "AutoModel": "modeling_afmoe.AfmoeModel"},
    "dtype": "bfloat16",
    "global_attn_every_n_layers": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 131072,
    "model_type": AFMOE,
    "moe_intermediate_size": 1024,
    "mup_enabled": True,
    "n_group": 1,
    "num_attention_heads": 32,
    "num_dense_layers": 2,
    "num_expert_groups": 1,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "num_limited_groups": 1,
    "num_shared_experts": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "route_norm": True,
    "route_scale": 2.826,
    "score_func": "sigmoid",
    "sliding_window": 2048,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_grouped_mm": True,
    "vocab_size": 200192,
}


def test_the_published_file_is_read() -> None:
    config = AfmoeConfig.parse(PUBLISHED, "")
    assert (config.layers, config.dense_layers, config.window) == (32, 2, 2048)
    assert [index for index, sliding in enumerate(config.sliding) if not sliding] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert config.embedding_scale == 2048**0.5
    assert (config.routing.chosen, config.routing.scale, config.routing.groups) == (8, 2.826, 1)
    assert (config.attention.heads, config.attention.kv_heads, config.attention.head_dim) == (32, 4, 128)
    assert len(config.rope.frequencies) == 64
    assert not key_map_for(build, config).carried, "there is nothing that isn't computed with"


@pytest.mark.parametrize("spelling", ["null", "left out"])
def test_key_heads_that_the_file_does_not_name_are_as_many_as_query_heads(spelling: str) -> None:
    given = PUBLISHED | {"num_key_value_heads": None}
    if spelling == "left out":
        del given["num_key_value_heads"]
    assert AfmoeConfig.parse(given, "").attention.kv_heads == 32


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": None},  # counted from global_attn_every_n_layers
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        dict.fromkeys(("score_func", "route_norm", "n_group", "topk_group")),
    ],
)
def test_other_spellings_read_alike(change: dict[str, Any]) -> None:
    left_out = {key: value for key, value in (PUBLISHED | change).items() if value is not None}
    assert AfmoeConfig.parse(left_out, "") == AfmoeConfig.parse(PUBLISHED, "")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_theta": 5000.0},
        {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"head_dim": 96},
    ],
)
def test_positions_are_read_as_transformers_reads_them(change: dict[str, Any]) -> None:
    from transformers import AfmoeConfig as Reference
    from transformers.models.afmoe.modeling_afmoe import AfmoeRotaryEmbedding

    given = {key: value for key, value in (PUBLISHED | change).items() if key != "model_type"}
    rotary = AfmoeRotaryEmbedding(Reference(**given))
    rope = AfmoeConfig.parse(PUBLISHED | change, "").rope
    assert_close(torch.tensor(rope.frequencies), rotary.inv_freq, 1e-6)
    assert rope.magnitude == pytest.approx(rotary.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_func": "softmax"}, "where: score_func is 'softmax'; only 'sigmoid' is implemented, and another value"),
        ({"route_norm": False}, "where: route_norm is False; only True is implemented"),
        ({"n_group": 2}, "where: n_group is 2; only 1 is implemented"),
        ({"topk_group": 2}, "where: topk_group is 2; only 1 is implemented"),
        ({"num_expert_groups": 4}, "where: num_expert_groups is 4; only 1 is implemented"),
        ({"num_limited_groups": 4}, "where: num_limited_groups is 4; only 1 is implemented"),
        (
            {"num_experts_per_tok": 129},
            "where: num_experts_per_tok is 129, but num_experts is 128; choose at most that many",
        ),
        (
            {"num_key_value_heads": 5},
            "where: num_attention_heads 32 is no multiple of num_key_value_heads 5, so that the query heads can't",
        ),
        ({"num_key_value_heads": 0}, "where: num_key_value_heads must be a positive integer, got 0"),
        (
            {"layer_types": ["sliding_attention", "chunked_attention"]},
            r"where: layer_types must be a list of 'sliding_attention' and 'full_attention', got \[",
        ),
        ({"layer_types": "full_attention"}, "where: layer_types must be a list of .*, got 'full_attention'"),
        (
            {"layer_types": ["full_attention"]},
            "where: layer_types names 1 layers, num_hidden_layers is 32; make them agree",
        ),
        ({"sliding_window": 0}, "where: sliding_window must be a positive integer, got 0"),
        ({"sliding_window": None}, "where: sliding_window must be a positive integer, got None"),
        ({"global_attn_every_n_layers": 0}, "where: global_attn_every_n_layers must be a positive integer, got 0"),
        ({"num_dense_layers": -1}, "where: num_dense_layers must be an integer of at least 0, got -1"),
        ({"num_shared_experts": 0}, "where: num_shared_experts must be a positive integer, got 0"),
        ({"mup_enabled": 1}, "where: mup_enabled must be true or false, got 1"),
        ({"route_scale": 0}, "where: route_scale must be a positive number, got 0"),
        ({"head_dim": 127}, "where: 127 rotary dimensions of a head can't be paired"),
        ({"attention_dropout": 0.1}, "where: attention_dropout is 0.1; only 0.0 is implemented"),
        ({"hidden_act": "gelu"}, "where: hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "where: rope_type 'llama3' is not supported"),
    ],
)
def test_errors_of_config_json(change: dict[str, Any], message: str) -> None:
    checks.check_refused(PUBLISHED | change, message)
