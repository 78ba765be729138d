"""What is gathered together and how every tensor is cut, on models without weights."""

from __future__ import annotations

import re

import pytest
import torch

from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.decoder import CausalLM
from models.registry import architecture_for
from parallel.mesh import MeshSizes
from parallel.plan import FIRST, ROWS, SECOND, STACK, WHOLE, cuts, units
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.tiny import TINY, _reference


def model_of(model_type: str, kind: str = "nf4", dtype: torch.dtype = torch.float32, **changes: object) -> CausalLM:
    with torch.device("meta"):
        described = _reference(model_type, {**TINY[model_type], **changes}).config.to_dict()
    architecture = architecture_for(described, "config.json")
    config = architecture.parse_config(described, "config.json")
    model = architecture.build(config, StorageSpec(kind), dtype, "meta")  # type: ignore[arg-type]
    model.requires_grad_(False)
    return model


def names_of_units(model: CausalLM, sizes: MeshSizes) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for _, module in units(model, sizes)]


@pytest.mark.parametrize("model_type", TINY)
def test_units_are_layers_embedding_and_head(model_type: str) -> None:
    layers = [f"model.layers.{index}" for index in range(4)]
    model = model_of(model_type)
    assert names_of_units(model, MeshSizes(shard=2)) == ["model.embed_tokens", *layers, "lm_head", ""]
    routed = [f"{layer}.mlp.experts" for layer in layers if f"{layer}.mlp.experts" in dict(model.named_modules())]
    assert len(routed) >= 3
    # What lies inside another unit comes before it.
    expected = ["model.embed_tokens", *routed, *layers, "lm_head", ""]
    assert names_of_units(model, MeshSizes(expert=2)) == expected


def test_a_tied_embedding_is_in_one_unit() -> None:
    model = model_of("glm4_moe_lite", tie_word_embeddings=True)
    assert names_of_units(model, MeshSizes(shard=2)) == [*(f"model.layers.{index}" for index in range(4)), ""]


@pytest.mark.parametrize("kind", ["nf4", "int8", "none"])
def test_how_tensors_are_cut(kind: str) -> None:
    model = model_of("glm4_moe_lite", kind)
    add_lora(model, AdapterSpec(("attention", "experts", "router"), 6, 8.0))
    rules, held = cuts(model, MeshSizes(shard=4)), dict(model.named_parameters())
    assert rules.keys() == held.keys()
    matrix, stack = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.experts.down_proj"
    tensors = {"nf4": ("packed", "absmax"), "int8": ("packed", "scale"), "none": ("value",)}[kind]
    for tensor in tensors:
        assert rules[f"{matrix}.weight.{tensor}"] is (FIRST if kind == "none" else ROWS)
        assert rules[f"{stack}.weight.{tensor}"] is STACK
    assert rules[f"{stack}.lora.A"] is STACK and rules[f"{stack}.lora.B"] is STACK
    # Six rows of A can't be cut into four, its columns can.
    assert rules[f"{matrix}.lora.A"] is SECOND and rules[f"{matrix}.lora.B"] is FIRST
    assert rules["model.embed_tokens.weight"] is FIRST and rules["model.norm.weight"] is FIRST
    if kind == "nf4":
        assert rules[f"{matrix}.weight.nested_offset"] is WHOLE
        assert rules[f"{matrix}.weight.nested_absmax"] is FIRST
        assert rules[f"{stack}.weight.nested_offset"] is STACK


def test_full_fine_tuning_in_bfloat16_leaves_float32_tensors_whole() -> None:
    model = model_of("qwen3_5_moe_text", "none", torch.bfloat16)
    model.requires_grad_(True)
    rules = cuts(model, MeshSizes(shard=2))
    whole = {name.rpartition("layers.")[2].partition(".")[2] for name, rule in rules.items() if rule is WHOLE}
    assert whole == {"mlp.gate.weight.value", "linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight"}
    # Where all is float32, or the router is frozen, nothing has to be.
    assert WHOLE not in cuts(model_of("qwen3_5_moe_text", "none"), MeshSizes(shard=2)).values()
    frozen = cuts(model_of("qwen3_5_moe_text", "none", torch.bfloat16), MeshSizes(shard=2))
    assert frozen["model.layers.0.mlp.gate.weight.value"] is FIRST


def test_experts_that_cannot_be_cut_are_named() -> None:
    model = model_of("afmoe")
    with pytest.raises(NibbleError) as error:
        cuts(model, MeshSizes(expert=3))
    assert str(error.value) == (
        "model.layers.1.mlp.experts.gate_up_proj.weight has 8 experts, which can't be cut into 3 equal parts "
        "(parallel.expert 3 × parallel.shard 1).\n"
        "This model can be cut into 1, 2, 4, 8. More processes are put to use with parallel.replicate."
    )


def test_rows_that_cannot_be_cut_are_named() -> None:
    model = model_of("glm4_moe", "int8", n_routed_experts=9, hidden_size=64)
    with pytest.raises(
        NibbleError, match=re.escape("model.layers.0.self_attn.q_proj.weight has 64 rows, which can't be cut into 3")
    ):
        cuts(model, MeshSizes(shard=3))
    # A matrix that isn't quantised may be cut unevenly.
    assert cuts(model_of("glm4_moe", "none", n_routed_experts=9), MeshSizes(shard=3))
