"""What a config.json says that can't be, or that would be another computation than the one that is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models import load_model
from models.registry import ARCHITECTURES, architecture_for
from quant.common.errors import NibbleError
from tests.tiny import TINY, save_tiny

TEXT = [name for name in sorted(TINY) if name != "qwen3_5_moe"]  # that one has the text model in a section


def parse(model_type: str, **changes: Any) -> Any:
    config = {**TINY[model_type], "model_type": model_type, **changes}
    return architecture_for(config, "file").parse_config(config, "file")


def test_every_architecture_is_here() -> None:
    assert set(ARCHITECTURES) == {*TEXT, "qwen3_5_moe"}


@pytest.mark.parametrize("model_type", TEXT)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 10**29}, "num_hidden_layers is 1000"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers is 1001; more than 1,000 can't be computed with."),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776; more than 16,777,216 can't be computed with."),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True."),
        ({"vocab_size": "x" * 10**6}, "vocab_size must be a positive integer, got 'xxxx"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number, got 1000"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be a positive number, got -1.0."),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0.0 is implemented"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is implemented"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; only None is implemented"),
        ({"attn_logit_softcapping": 50}, "attn_logit_softcapping is 50; only None is implemented"),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22; only 1.0 is implemented"),
        ({"logits_scaling": 8}, "logits_scaling is 8; only 1.0 is implemented"),
    ],
)
def test_values_that_no_model_has(model_type: str, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(NibbleError) as error:
        parse(model_type, **change)
    assert f"file: {expected}" in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        *(
            (name, change)
            for name in ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa")
            for change in ({"scoring_func": "softmax"}, {"topk_method": "greedy"}, {"moe_layer_freq": 2})
        ),
        *(
            (name, change)
            for name in ("glm4_moe_lite", "glm_moe_dsa")
            # Keys of all heads come from one latent; transformers would repeat them.
            for change in ({"num_key_value_heads": 2}, {"use_qk_norm": True})
        ),
        *((name, {"use_sliding_window": True}) for name in TEXT if name != "afmoe"),
        *((name, {"use_qk_norm": False}) for name in ("afmoe", "qwen3_moe", "qwen3_5_moe_text")),
        ("afmoe", {"use_sliding_window": False}),
        ("afmoe", {"score_func": "softmax"}),
        ("afmoe", {"scoring_func": "softmax"}),
        ("qwen3_moe", {"scoring_func": "sigmoid"}),
        ("qwen3_moe", {"n_shared_experts": 1}),
        ("qwen3_5_moe_text", {"scoring_func": "sigmoid"}),
        ("qwen3_5_moe_text", {"norm_topk_prob": False}),
        ("qwen3_5_moe_text", {"decoder_sparse_step": 2}),
    ],
)
def test_settings_that_contradict_what_is_computed(model_type: str, change: dict[str, Any]) -> None:
    (key, value), *_ = change.items()
    with pytest.raises(NibbleError, match=rf"^file: {key} is {value!r}; only .* is implemented, and another value"):
        parse(model_type, **change)
    usual = {"scoring_func": "softmax" if model_type.startswith("qwen") else "sigmoid", "moe_layer_freq": None}
    parse(model_type, **usual)


@pytest.mark.parametrize("key", ["head_dim", "qk_rope_head_dim"])
def test_more_rotary_dimensions_than_can_be(key: str) -> None:
    model_type = "glm4_moe_lite" if key == "qk_rope_head_dim" else "qwen3_moe"
    with pytest.raises(NibbleError, match=r"file: 1,048,576 rotary dimensions of a head; at most 65,536"):
        parse(model_type, **{key: 2**20})
    with pytest.raises(NibbleError, match=rf"file: {key} is 2147483648; more than"):
        parse(model_type, **{key: 2**31})


@pytest.mark.parametrize("value", [{}, [], None, 3, "x\x1b[2J"])
def test_a_model_type_that_is_none(value: Any) -> None:
    with pytest.raises(NibbleError, match=r"file: model_type .* is not supported\. Supported: afmoe, glm4_moe, "):
        architecture_for({"model_type": value}, "file")


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_more_experts_or_layers_than_the_weights_have(tmp_path: Path, model_type: str) -> None:
    """Refused by the names in the files, before a model of that size is made."""
    save_tiny(tmp_path, model_type)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config["text_config"] if model_type == "qwen3_5_moe" else config
    experts = "n_routed_experts" if "glm" in model_type else "num_experts"
    for key, name in ((experts, "the number of experts"), ("num_hidden_layers", "num_hidden_layers")):
        given = "num_local_experts" if key == experts and "num_local_experts" in text else key
        before = text[given]
        text[given] = 900 if key == "num_hidden_layers" else 10**6
        lists = {name: text.pop(name) for name in ("layer_types", "mlp_layer_types", "indexer_types") if name in text}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(NibbleError, match=rf"config\.json: {name} is [0-9,]+, but the weights are of {before}\."):
            load_model(tmp_path, "none", torch.float32)
        text.update(lists)
        text[given] = before
