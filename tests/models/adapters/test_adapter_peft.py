"""Adapters against PEFT itself, on tiny random models of transformers in float32.

Sizes are chosen so that no two dimensions of a matrix are alike: a swapped or transposed layout can't fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import load_model
from models.adapters.files import load_adapter, save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from tests.helpers import assert_close, random_tokens, relative_error, save_tiny_glm
from tests.peft_helpers import (
    PATTERN_WARNING,
    check_gradients,
    check_training,
    config_of,
    native,
    peft_load,
    peft_make,
    randomise,
)

SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "n_routed_experts": 6,
    "q_lora_rank": 40,
    "kv_lora_rank": 48,
    "v_head_dim": 12,
}
TOKENS = random_tokens((2, 32))
GROUPS = ("attention", "experts", "shared_experts", "dense_mlp", "router")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    save_tiny_glm(path, **SIZES)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import Glm4MoeLiteForCausalLM

    return Glm4MoeLiteForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def base_logits(reference: Any) -> Tensor:
    with torch.no_grad():
        return reference(input_ids=TOKENS).logits


PROJECTIONS = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]
STACKS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
SHARED = [f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
DENSE = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]

# The adapter's spec, and what the config must say.
CASES: dict[str, tuple[AdapterSpec, dict[str, Any]]] = {
    "experts": (
        AdapterSpec(("experts",), 4, 8.0),
        {"target_modules": [], "target_parameters": STACKS, "r": 4, "lora_alpha": 8, "rank_pattern": {}},
    ),
    "experts-attention": (
        AdapterSpec(("experts", "attention"), 3, 7.5),
        {"target_modules": PROJECTIONS, "target_parameters": STACKS, "lora_alpha": 7.5, "layers_to_transform": None},
    ),
    "attention": (AdapterSpec(("attention",), 4, 8.0), {"target_modules": PROJECTIONS, "target_parameters": None}),
    "shared": (
        AdapterSpec(("experts", "attention", "shared_experts"), 4, 8.0),
        {"target_parameters": [*STACKS, *SHARED]},
    ),
    "router": (
        AdapterSpec(("experts", "attention", "router"), 4, 8.0),
        {"target_parameters": [*STACKS, "mlp.gate.weight"]},
    ),
    "dense": (AdapterSpec(("experts", "attention", "dense_mlp"), 4, 8.0), {"target_parameters": [*STACKS, *DENSE]}),
    "all": (AdapterSpec(GROUPS, 4, 8.0), {"target_parameters": [*STACKS, *SHARED, *DENSE, "mlp.gate.weight"]}),
    "gate_up": (AdapterSpec(("mlp.experts.gate_up_proj",), 4, 8.0), {"target_parameters": [STACKS[1]]}),
    "down": (AdapterSpec(("mlp.experts.down_proj",), 4, 8.0), {"target_parameters": [STACKS[0]]}),
    "numbers-of-two-groups": (
        AdapterSpec(("attention", "experts"), {"attention": 8, "experts": 2}, {"attention": 4.0, "experts": 10.0}),
        {
            "r": 2,
            "lora_alpha": 10,
            "rank_pattern": dict.fromkeys(PROJECTIONS, 8),
            "alpha_pattern": dict.fromkeys(PROJECTIONS, 4),
        },
    ),
    "numbers-of-all-groups": (
        AdapterSpec(
            GROUPS,
            {"attention": 8, "experts": 2, "shared_experts": 3, "dense_mlp": 5, "router": 1},
            {"attention": 4.0, "experts": 10.0, "shared_experts": 9.0, "dense_mlp": 2.5, "router": 1.0},
        ),
        {},
    ),
    "rslora": (
        AdapterSpec(("attention", "experts"), {"attention": 8, "experts": 2}, 8.0, rslora=True),
        {"use_rslora": True, "alpha_pattern": {}},
    ),
    "layers": (
        AdapterSpec(("attention", "experts", "router"), 4, 8.0, layers=(0, 2)),
        {
            "layers_to_transform": [0, 2],
            "target_modules": PROJECTIONS,
            "target_parameters": [
                *(f"model.layers.2.{name}" for name in STACKS),
                "model.layers.2.mlp.gate.weight",
            ],
        },
    ),
    "layers-and-numbers": (
        AdapterSpec(GROUPS, {"attention": 8, "experts": 2, "shared_experts": 3, "dense_mlp": 5, "router": 1}, 8.0,
                    layers=(0, 1, 3)),
        {},
    ),
    "one-matrix": (
        AdapterSpec(("model.layers.2.self_attn.o_proj", "q_a_proj", "model.layers.3.mlp.experts.down_proj"), 4, 8.0),
        {
            "layers_to_transform": None,
            "target_modules": ["model.layers.2.self_attn.o_proj", "q_a_proj"],
            "target_parameters": ["model.layers.3.mlp.experts.down_proj"],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_the_saved_adapter_computes_here(
    folder: Path, reference: Any, base_logits: Tensor, tmp_path: Path, case: str
) -> None:
    spec, says = CASES[case]
    model = native(folder)
    add_lora(model, spec)
    randomise(trainable_parameters(model))
    with torch.no_grad():
        logits = model(TOKENS)
    save_adapter(model, tmp_path / "adapter", "org/base")
    config = config_of(tmp_path / "adapter")
    for name, value in says.items():
        found = sorted(config[name]) if isinstance(config[name], list) else config[name]
        assert found == (sorted(value) if isinstance(value, list) else value), name
    assert config["base_model_name_or_path"] == "org/base"

    peft, warned = peft_load(reference, tmp_path / "adapter")
    assert [text for text in warned if PATTERN_WARNING not in text] == []
    if case in ("experts", "experts-attention", "all", "numbers-of-two-groups", "rslora", "layers"):
        assert warned == [], "no warning at all where the parameters have one number"
    with torch.no_grad():
        theirs = peft(input_ids=TOKENS).logits
    assert_close(logits, theirs, what=case)
    assert relative_error(theirs, base_logits) > 1e-2, "the adapter has an effect that the comparison sees"

    again = native(folder)
    loaded = load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(TOKENS), logits)
    assert (loaded.rslora, loaded.dtype) == (spec.rslora, torch.float32)
    save_adapter(again, tmp_path / "again", "org/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    # The spec that loading returns says the same as the one that made the adapter.
    same = native(folder)
    add_lora(same, loaded)
    assert [(name, parameter.shape) for name, parameter in trainable_parameters(same)] == [
        (name, parameter.shape) for name, parameter in trainable_parameters(model)
    ]
    load_adapter(native(folder), tmp_path / "adapter", expected=spec)


@pytest.mark.parametrize("case", CASES)
def test_the_config_is_peft_s_own(folder: Path, tmp_path: Path, case: str) -> None:
    from peft import LoraConfig, PeftConfig

    model = native(folder)
    add_lora(model, CASES[case][0])
    save_adapter(model, tmp_path, "org/base")
    written = config_of(tmp_path)
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert type(read) is LoraConfig
    # Made by PEFT of what isn't its default, and read by it: the same, but for the version that it was made by.
    stated = {name: value for name, value in written.items() if name not in ("bias", "lora_dropout", "use_dora")}
    made = {**LoraConfig(**stated).to_dict(), "peft_version": "0.19.1"}
    assert read.to_dict() == made
    assert {name: made[name] for name in written} == {**written, "target_modules": set(written["target_modules"])}
    plain = {**LoraConfig().to_dict(), **{name: made[name] for name in written}}
    assert made == plain, "what the file leaves out has PEFT's default"


OTHER_SHAPES: dict[str, dict[str, Any]] = {
    "direct-queries": {"q_lora_rank": None, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2, "attention_bias": True},
    "tied": {"tie_word_embeddings": True, "n_shared_experts": 2},
}


@pytest.mark.parametrize("variant", OTHER_SHAPES)
def test_other_shapes_of_the_architecture(tmp_path: Path, variant: str) -> None:
    reference = save_tiny_glm(tmp_path / "base", **{**SIZES, **OTHER_SHAPES[variant]})
    model = native(tmp_path / "base")
    add_lora(model, AdapterSpec(GROUPS, 4, 8.0))
    randomise(trainable_parameters(model))
    save_adapter(model, tmp_path / "adapter", "org/base")
    peft, warned = peft_load(reference, tmp_path / "adapter")
    assert warned == []
    with torch.no_grad():
        assert_close(model(TOKENS), peft(input_ids=TOKENS).logits)


# --- adapters that PEFT makes


PEFT_CASES: dict[str, dict[str, Any]] = {
    "both-stacks": {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "target_parameters": STACKS},
    "bare-names": {"r": 4, "target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    "dropout": {"r": 4, "target_modules": ["o_proj"], "lora_dropout": 0.1},
    "one-stack": {"r": 4, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "matrices": {"r": 4, "target_modules": [], "target_parameters": [*SHARED, *DENSE, "mlp.gate.weight"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": PROJECTIONS,
        "target_parameters": STACKS,
        "rank_pattern": {r".*\.gate_up_proj": 2, r"layers\.[12]\.self_attn\.o_proj": 6, "kv_b_proj": 3},
        "alpha_pattern": {r"^model.layers.1.mlp.experts.down_proj": 5, "q_a_proj": 1.5},
    },
    "layers": {
        "r": 4,
        "target_modules": ["o_proj", "model.layers.3.self_attn.q_a_proj"],
        "target_parameters": STACKS,
        "layers_to_transform": [1, 2],
    },
    "one-layer": {"r": 4, "target_modules": ["o_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
    # PEFT itself makes the fused tensors of these names of transformers 4, with rank 2r for gate and up.
    "names-of-transformers-4": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["o_proj", "gate", "gate_proj", "up_proj", "down_proj"],
    },
    # What most adapters of GLM-4.7-Flash on the hub name: of these only o_proj and what the experts have are there.
    "usual-seven": {
        "r": 4,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "pattern": {"r": 4, "target_modules": r".*\.layers\.[12]\..*\.(o_proj|kv_b_proj)"},
    "all-linear": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["kv_b_proj"]},
    "excluded": {"r": 4, "target_modules": PROJECTIONS, "exclude_modules": r".*\.layers\.0\..*"},
    "attention-as-parameter": {"r": 4, "target_modules": [], "target_parameters": ["self_attn.o_proj.weight"]},
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_adapters_made_by_peft_load_here(
    folder: Path, reference: Any, base_logits: Tensor, tmp_path: Path, case: str
) -> None:
    peft = peft_make(reference, tmp_path / "adapter", **PEFT_CASES[case]).eval()
    with torch.no_grad():
        theirs = peft(input_ids=TOKENS).logits
        model = load_model(folder, storage="none", dtype=torch.float32, adapter=tmp_path / "adapter")
        assert_close(model(TOKENS), theirs, what=case)
    assert relative_error(theirs, base_logits) > 1e-2

    # Saved again, it is the same adapter in this project's terms.
    save_adapter(model, tmp_path / "again", "org/base")
    again, _ = peft_load(reference, tmp_path / "again")
    with torch.no_grad():
        assert_close(again(input_ids=TOKENS).logits, theirs, what=f"{case}, saved again")
    spec = load_adapter(native(folder), tmp_path / "again")
    same = native(folder)
    add_lora(same, spec)
    assert [(name, parameter.shape) for name, parameter in trainable_parameters(same)] == [
        (name, parameter.shape) for name, parameter in trainable_parameters(model)
    ]


# --- gradients and training


TRAINED = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": PROJECTIONS,
    "target_parameters": [*STACKS, *SHARED, *DENSE, "mlp.gate.weight"],
}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_those_of_peft(folder: Path, reference: Any, tmp_path: Path, recompute: bool) -> None:
    count = check_gradients(folder, reference, tmp_path, TOKENS, recompute, **TRAINED)
    assert count == 2 * (4 * 5 + 3 * 2 + 3 * 3 + 3 + 3)


def test_five_steps_of_sgd_follow_peft(folder: Path, reference: Any, tmp_path: Path) -> None:
    check_training(folder, reference, tmp_path, TOKENS, steps=5, rate=0.02, **TRAINED)
