"""The native Qwen3.5 against transformers, on tiny random checkpoints that transformers saved.

Both forms are checked: the text model (`qwen3_5_moe_text`), and the vision-language model saved whole, of which the
text model is loaded (`qwen3_5_moe`). Unless a variant says otherwise, the fourth layer has attention, the others
Gated DeltaNet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.checkpoint.hub import HubCheckpoint
from models.checkpoint.stream import HubReader
from models.qwen3_5_moe import Qwen3_5MoeConfig, build
from tests import architecture_checks as checks
from tests.helpers import assert_close, key_map_for, random_tokens, relative_error
from tests.tiny import save_tiny

TEXT, VISION = "qwen3_5_moe_text", "qwen3_5_moe"
FORMS = (TEXT, VISION)
GROUPS = ("attention", "linear_attention", "experts", "shared_experts", "router")
# Gradients of one number per head are sums over tokens that nearly cancel. To compare them to five digits, both models
# need small round-off before the sum, and some heads of which one has a large gradient.
STEADY: dict[str, Any] = {"initializer_range": 0.06, "linear_num_value_heads": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "every-second-layer-attends": {"full_attention_interval": 2},
    "layer-types": {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    "attention-only": {"layer_types": ["full_attention"] * 4},
    "three-experts": {"num_experts_per_tok": 3},
    "attention-bias": {"attention_bias": True},
    "as-many-key-heads": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "half-rotated": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "short-convolution": {"linear_conv_kernel_dim": 2},
    "as-many-delta-net-keys": {"linear_num_value_heads": 2},
    "one-delta-net-key": {"linear_num_key_heads": 1},
}


def not_computed(form: str) -> str | None:
    return "model.visual." if form == VISION else None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_logits_loss_and_all_gradients_equal_transformers(tmp_path: Path, form: str, variant: str) -> None:
    reference = save_tiny(tmp_path, form, **{**STEADY, **VARIANTS[variant]})
    checks.check_parity(tmp_path, reference, random_tokens((2, 48)), not_computed(form))


@pytest.mark.parametrize("length", [3, 63, 64, 65, 130])
def test_lengths_around_a_chunk(tmp_path: Path, length: int) -> None:
    reference = save_tiny(tmp_path, TEXT, **STEADY)
    checks.check_parity(tmp_path, reference, random_tokens((2, length)))


def test_a_single_token(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, TEXT)
    tokens = random_tokens((5, 1))
    assert_close(checks.load(tmp_path)(tokens), reference(input_ids=tokens).logits)


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True)])
def test_the_outer_section_decides_whether_embeddings_are_tied(tmp_path: Path, outer: bool, inner: bool) -> None:
    from transformers import Qwen3_5MoeForConditionalGeneration

    save_tiny(tmp_path, VISION, tie_word_embeddings=outer, **STEADY)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["tie_word_embeddings"] == outer
    config["text_config"]["tie_word_embeddings"] = inner
    path.write_text(json.dumps(config))
    reference = Qwen3_5MoeForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (reference.lm_head.weight is reference.model.language_model.embed_tokens.weight) == outer
    assert Qwen3_5MoeConfig.parse_vision_language(config, "").tied == outer
    checks.check_parity(tmp_path, reference, random_tokens((2, 20)), not_computed(VISION))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("storage", "double_quant"), checks.QUANTISED)
def test_quantised_model_equals_transformers_with_dequantised_weights(
    tmp_path: Path, form: str, storage: str, double_quant: bool
) -> None:
    reference = save_tiny(tmp_path, form)
    checks.check_quantised(tmp_path, reference, storage, double_quant)


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_packed_documents_equal_documents_alone(tmp_path: Path, storage: str) -> None:
    save_tiny(tmp_path, TEXT, **STEADY)
    checks.check_packing(tmp_path, storage, [5, 70, 129], GROUPS)


def test_many_short_documents_equal_documents_alone(tmp_path: Path) -> None:
    """Of which some are shorter than the convolution, and several begin in one chunk."""
    save_tiny(tmp_path, VISION, **STEADY)
    checks.check_packing(tmp_path, "nf4", [2, 1, 3, 20, 1, 40, 4, 64], GROUPS)


def test_activation_checkpointing_changes_nothing_and_skips_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, TEXT)
    calls, calls_recomputed = checks.check_recomputation(tmp_path, GROUPS, monkeypatch)
    assert calls == 4, "one call for each of the four layers"
    assert calls_recomputed == 4, "the recomputation stops before the experts' products"


@pytest.mark.parametrize("form", FORMS)
def test_casting_the_model_leaves_the_routers_in_float32(tmp_path: Path, form: str) -> None:
    save_tiny(tmp_path, form)
    checks.check_cast(tmp_path)
    delta_net = {"linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight"}
    assert checks.float32_names(tmp_path) == {"mlp.gate.weight.value", *delta_net}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("storage", ["none", "nf4", "fp4", "int8"])
def test_bfloat16_is_near_float32(tmp_path: Path, form: str, storage: str) -> None:
    save_tiny(tmp_path, form)
    checks.check_bfloat16(tmp_path, storage)


def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    reference = save_tiny(tmp_path, TEXT, num_experts_per_tok=8)
    checks.check_bfloat16_against_transformers(tmp_path, reference)


# --- how checkpoints spell it


def unfused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a key for every expert's matrix instead of the stacks."""
    found = {}
    for name, tensor in state.items():
        prefix, stack, _ = name.partition("gate_up_proj" if "gate_up_proj" in name else "down_proj")
        if not prefix.endswith(".experts."):
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for part, piece in (parts if stack == "gate_up_proj" else {"down_proj": matrix}).items():
                found[f"{prefix}{expert}.{part}.weight"] = piece.clone()
    return found


@pytest.mark.parametrize("spelling", ["fused", "per-expert"])
@pytest.mark.parametrize("form", FORMS)
def test_experts_are_read_fused_and_one_by_one(tmp_path: Path, form: str, spelling: str) -> None:
    from safetensors.torch import load_file, save_file

    reference = save_tiny(tmp_path, form)
    tokens = random_tokens((2, 20))
    saved, logits = load_file(tmp_path / "model.safetensors"), checks.load(tmp_path)(tokens)
    state = reference.state_dict()
    written = unfused(state) if spelling == "per-expert" else state
    stacks = [name for name in written if name.endswith("experts.gate_up_proj")]
    assert len(stacks) == (4 if spelling == "fused" else 0)
    assert (written.keys() == saved.keys()) == (spelling == "per-expert"), "as transformers saved it"
    save_file(written, tmp_path / "model.safetensors")
    assert torch.equal(checks.load(tmp_path)(tokens), logits)


@pytest.mark.parametrize("form", FORMS)
def test_vision_and_prediction_layers_are_carried(tmp_path: Path, form: str) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path, form)
    tensors = load_file(tmp_path / "model.safetensors")
    vision = {name for name in tensors if name.startswith("model.visual.")}
    assert len(vision) > 5 if form == VISION else not vision
    prediction = {"mtp.fc.weight", "mtp.layers.0.mlp.experts.gate_up_proj", "mtp.norm.weight"}
    save_file(tensors | {name: torch.zeros(2, 2) for name in prediction}, tmp_path / "model.safetensors")
    checkpoint = HubCheckpoint(tmp_path)
    parse = Qwen3_5MoeConfig.parse_text if form == TEXT else Qwen3_5MoeConfig.parse_vision_language
    keys = key_map_for(build, parse(checkpoint.config, ""))
    assert set(HubReader(checkpoint, keys).carried) == vision | prediction


# --- config.json

# As Qwen3.5-35B-A3B's file has it.
PUBLISHED_TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": TEXT,
    "moe_intermediate_size": 512,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 248320,
}
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": VISION,
    "text_config": PUBLISHED_TEXT,
    "tie_word_embeddings": False,
    "video_token_id": 248057,
    "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": VISION, "deepstack_visual_indexes": []},
}


def test_the_published_file_is_read() -> None:
    config = Qwen3_5MoeConfig.parse_vision_language(PUBLISHED, "")
    assert [index for index, linear in enumerate(config.linear) if not linear] == list(range(3, 40, 4))
    attention, delta_net = config.attention, config.delta_net
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.query_width) == (16, 2, 256, 8192)
    assert (delta_net.keys, delta_net.values, delta_net.convolution) == (2048, 4096, 4)
    assert len(config.rope.frequencies) == 32, "a quarter of a head's 256 dimensions, in pairs"
    assert config.rope.frequencies[1] == pytest.approx(1e7 ** (-1 / 32))
    keys = key_map_for(build, config)
    assert keys.is_carried("model.visual.blocks.0.attn.qkv.weight") and keys.is_carried("mtp.fc.weight")
    assert not keys.is_carried("model.language_model.layers.0.linear_attn.A_log")
    assert {key.hub.split(".")[0] for key in keys.keys} == {"model", "lm_head"}
    layers = [key.hub for key in keys.keys if ".layers." in key.hub]
    assert all(name.startswith("model.language_model.layers.") for name in layers)


def test_both_forms_read_alike() -> None:
    from dataclasses import replace

    text = Qwen3_5MoeConfig.parse_text(PUBLISHED_TEXT, "")
    assert replace(Qwen3_5MoeConfig.parse_vision_language(PUBLISHED, ""), vision_language=False) == text


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ...},  # counted from full_attention_interval
        {"attn_output_gate": ..., "mlp_only_layers": ..., "mtp_num_hidden_layers": ..., "mamba_ssm_dtype": ...},
        {"mlp_only_layers": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}},  # then a quarter of a head is rotated
        {"rope_parameters": ..., "rope_theta": 10000000, "partial_rotary_factor": 0.25, "rope_scaling": None},
    ],
)
def test_other_spellings_read_alike(change: dict[str, Any]) -> None:
    changed = {key: value for key, value in (PUBLISHED_TEXT | change).items() if value is not ...}
    assert Qwen3_5MoeConfig.parse_text(changed, "") == Qwen3_5MoeConfig.parse_text(PUBLISHED_TEXT, "")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_dim": 128},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.75}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                             "original_max_position_embeddings": 65536, "mrope_section": [11, 11, 10]}},
    ],
)  # fmt: skip
def test_positions_are_read_as_transformers_reads_them(change: dict[str, Any]) -> None:
    from transformers import Qwen3_5MoeTextConfig as Reference
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

    given = {key: value for key, value in (PUBLISHED_TEXT | change).items() if key != "model_type"}
    rotary = Qwen3_5MoeTextRotaryEmbedding(Reference(**given))
    rope = Qwen3_5MoeConfig.parse_text(PUBLISHED_TEXT | change, "").rope
    assert_close(torch.tensor(rope.frequencies), rotary.inv_freq, 1e-6)
    assert rope.magnitude == pytest.approx(rotary.attention_scaling, rel=1e-6)


ERRORS = [
    ({"attn_output_gate": False}, "attn_output_gate is False; only True is implemented"),
    ({"mlp_only_layers": [0, 1]}, r"mlp_only_layers is \[0, 1\]; only \[\] is implemented"),
    ({"num_experts_per_tok": 257}, "num_experts_per_tok is 257, but num_experts is 256; choose at most that many"),
    (
        {"linear_num_value_heads": 24},
        "linear_num_value_heads 24 is no multiple of linear_num_key_heads 16",
    ),
    ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim must be a positive integer, got 0"),
    (
        {"num_key_value_heads": 3},
        "num_attention_heads 16 is no multiple of num_key_value_heads 3, so that the query heads can't share them",
    ),
    (
        {"layer_types": ["linear_attention", "sliding_attention"]},
        r"layer_types must be a list of 'linear_attention' and 'full_attention', got \[",
    ),
    ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers is 40; make them agree"),
    ({"layer_types": ..., "full_attention_interval": 0}, "full_attention_interval must be a positive integer, got 0"),
    ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be a positive integer, got 0"),
    ({"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor is 2.0; it is a share of a head"),
    ({"head_dim": 20}, "5 rotary dimensions of a head can't be paired"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0.0 is implemented"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is implemented"),
    ({"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS)
def test_errors_of_config_json(change: dict[str, Any], message: str) -> None:
    text = {key: value for key, value in (PUBLISHED_TEXT | change).items() if value is not ...}
    checks.check_refused(text, f"^where: {message}")
    checks.check_refused(PUBLISHED | {"text_config": text}, f"^where, text_config: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text_config": None},
            "^where: text_config must be an object that describes the text model, got None.\nThe file of a text model",
        ),
        ({"tie_word_embeddings": "yes"}, "^where: tie_word_embeddings must be true or false, got 'yes'"),
    ],
)
def test_errors_of_the_outer_section(change: dict[str, Any], message: str) -> None:
    checks.check_refused(PUBLISHED | change, message)


def test_what_a_delta_net_layer_does_has_an_effect_that_the_comparisons_see(tmp_path: Path) -> None:
    save_tiny(tmp_path, TEXT)
    tokens = random_tokens((1, 80))
    with torch.no_grad():
        logits = checks.load(tmp_path)(tokens)
        for name in ("A_log", "dt_bias", "conv1d.weight", "in_proj_b.weight.value", "norm.weight"):
            model = checks.load(tmp_path)
            checks.native_tensor(model, f"model.layers.1.linear_attn.{name}").add_(0.1)
            assert relative_error(model(tokens), logits) > 1e-3, name
