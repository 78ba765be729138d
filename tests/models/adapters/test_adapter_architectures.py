"""Adapters of every architecture against PEFT: what is saved, what PEFT made, gradients and training, in float32.

GLM-4.7-Flash has more cases in test_adapter_peft.py. Here too no two dimensions of a matrix are alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import load_model
from models.adapters.files import load_adapter, save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec, adaptable, groups_of
from models.checkpoint.keymap import key_map_of
from models.decoder import CausalLM
from models.registry import ARCHITECTURES
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import assert_close, random_tokens, relative_error
from tests.peft_helpers import (
    PATTERN_WARNING,
    check_gradients,
    check_training,
    config_of,
    logits_of,
    native,
    peft_load,
    peft_make,
    randomise,
)
from tests.tiny import TINY, save_tiny

TOKENS = random_tokens((2, 40))
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTER = ["mlp.gate.weight"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
GROUPED_QUERY = ["q_proj", "k_proj", "v_proj", "o_proj"]
DELTA_NET = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]


def swiglu(name: str) -> list[str]:
    return [f"{name}.{part}_proj.weight" for part in ("gate", "up", "down")]


_SIZES = {"hidden_size": 48, "moe_intermediate_size": 24}
_GLM = {**_SIZES, "intermediate_size": 56, "n_routed_experts": 6}
_QWEN = {**_SIZES, "shared_expert_intermediate_size": 40, "num_experts": 6}
_GLM_GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "experts": ([], STACKS),
    "shared_experts": ([], swiglu("mlp.shared_experts")),
    "dense_mlp": ([], swiglu("mlp")),
    "router": ([], ROUTER),
}
_QWEN_GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "attention": (GROUPED_QUERY, []),
    "linear_attention": (DELTA_NET, []),
    "experts": ([], STACKS),
    "shared_experts": (["shared_expert_gate"], swiglu("mlp.shared_expert")),
    "router": ([], ROUTER),
}
_SIZES_OF: dict[str, dict[str, Any]] = {
    "afmoe": {**_SIZES, "intermediate_size": 56, "num_experts": 6},
    "glm4_moe": {**_GLM, "attention_bias": True},
    "glm_moe_dsa": {**_GLM, "q_lora_rank": 40},
    "qwen3_moe": {**_SIZES, "intermediate_size": 56, "num_experts": 6, "mlp_only_layers": [0]},
    "qwen3_5_moe_text": _QWEN,
    "qwen3_5_moe": _QWEN,
}
# Of each group: the config's target_modules and target_parameters.
GROUPS: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "afmoe": {
        **_GLM_GROUPS,
        "attention": (GROUPED_QUERY, ["self_attn.gate_proj.weight"]),
        "router": ([], ["mlp.router.gate.weight"]),
    },
    "glm4_moe": {"attention": (GROUPED_QUERY, []), **_GLM_GROUPS},
    "glm_moe_dsa": {"attention": (LATENT, []), **_GLM_GROUPS},
    "qwen3_moe": {
        "attention": (GROUPED_QUERY, []),
        "experts": ([], STACKS),
        "dense_mlp": ([], swiglu("mlp")),
        "router": ([], ROUTER),
    },
    "qwen3_5_moe_text": _QWEN_GROUPS,
    "qwen3_5_moe": _QWEN_GROUPS,
}
TYPES = list(GROUPS)
RANKS = {"attention": 5, "linear_attention": 4, "experts": 2, "shared_experts": 3, "dense_mlp": 6, "router": 1}
ALPHAS = {"attention": 4, "linear_attention": 7, "experts": 6.5, "shared_experts": 9, "dense_mlp": 5, "router": 2}


@dataclass(frozen=True)
class Base:
    model_type: str
    folder: Path
    reference: Any
    logits: Tensor

    @property
    def groups(self) -> dict[str, tuple[list[str], list[str]]]:
        return GROUPS[self.model_type]

    def numbers(self, of: dict[str, Any]) -> dict[str, Any]:
        return {group: of[group] for group in self.groups}


@pytest.fixture(scope="module", params=TYPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(request.param)
    reference = save_tiny(folder, request.param, **_SIZES_OF[request.param])
    return Base(request.param, folder, reference, logits_of(reference, TOKENS))


def check_saved(base: Base, spec: AdapterSpec, directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Saves a random adapter and compares it in PEFT and loaded again; returns its config and PEFT's warnings."""
    model = native(base.folder)
    add_lora(model, spec)
    randomise(trainable_parameters(model))
    logits = logits_of(model, TOKENS)
    save_adapter(model, directory / "adapter", "org/base")
    peft, warned = peft_load(base.reference, directory / "adapter")
    theirs = logits_of(peft, TOKENS)
    assert_close(logits, theirs)
    assert relative_error(theirs, base.logits) > 1e-2, "the adapter has an effect that the comparison sees"

    again = native(base.folder)
    loaded = load_adapter(again, directory / "adapter", expected=spec)
    assert torch.equal(logits_of(again, TOKENS), logits)
    save_adapter(again, directory / "again", "org/base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (directory / "again" / name).read_bytes() == (directory / "adapter" / name).read_bytes()
    load_adapter(native(base.folder), directory / "adapter", expected=loaded)
    return config_of(directory / "adapter"), warned


def test_every_architecture_is_here() -> None:
    assert {"glm4_moe_lite", *_SIZES_OF} == {"glm4_moe_lite", *PEFT_MADE} == {"glm4_moe_lite", *TYPES} == set(TINY)


def test_groups(base: Base) -> None:
    assert set(groups_of(adaptable(key_map_of(native(base.folder))))) == set(base.groups)


def test_each_group_alone(base: Base, tmp_path: Path) -> None:
    for group, (modules, parameters) in base.groups.items():
        config, warned = check_saved(base, AdapterSpec((group,), 3, 6.0), tmp_path / group)
        assert warned == [], group
        assert sorted(config["target_modules"]) == sorted(modules), group
        assert sorted(config["target_parameters"] or ()) == sorted(parameters), group
        assert config["layers_to_transform"] is None
        assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, {}, {})


def test_groups_together(base: Base, tmp_path: Path) -> None:
    config, warned = check_saved(base, AdapterSpec(("experts", "attention", "router"), 4, 8.0), tmp_path)
    assert warned == []
    modules, parameters = base.groups["attention"]
    assert sorted(config["target_modules"]) == sorted(modules)
    assert sorted(config["target_parameters"]) == sorted([*parameters, *STACKS, *base.groups["router"][1]])


def test_all_groups_with_numbers_of_their_own(base: Base, tmp_path: Path) -> None:
    spec = AdapterSpec(tuple(base.groups), base.numbers(RANKS), base.numbers(ALPHAS), rslora=True)
    _, warned = check_saved(base, spec, tmp_path)
    assert [text for text in warned if PATTERN_WARNING not in text] == []


def test_some_layers(base: Base, tmp_path: Path) -> None:
    config, _ = check_saved(base, AdapterSpec(tuple(base.groups), base.numbers(RANKS), 8.0, layers=(0, 3)), tmp_path)
    assert config["layers_to_transform"] == [0, 3]
    model = "model.language_model" if base.model_type == "qwen3_5_moe" else "model"
    assert f"{model}.layers.3.mlp.experts.down_proj" in config["target_parameters"]


@pytest.mark.parametrize("stack", STACKS)
def test_one_stack_of_two(base: Base, tmp_path: Path, stack: str) -> None:
    config, warned = check_saved(base, AdapterSpec((stack,), 2, 4.0), tmp_path)
    assert (config["target_modules"], config["target_parameters"], warned) == ([], [stack], [])


# --- adapters that PEFT makes

# As people write them: leaf names, where PEFT leaves them alone; Qwen's shared expert needs no parameters.
PEFT_MADE: dict[str, dict[str, Any]] = {
    "afmoe": {
        "target_modules": GROUPED_QUERY,
        "target_parameters": [*STACKS, "self_attn.gate_proj.weight", "router.gate.weight", *swiglu("mlp")],
        "rank_pattern": {"gate_up_proj": 3, r"layers\.[13]\.self_attn\.o_proj": 6},
    },
    "glm4_moe": {
        "target_modules": ["q_proj", "self_attn.o_proj", "gate", "gate_proj", "up_proj", "down_proj"],
    },
    "glm_moe_dsa": {
        "target_modules": LATENT,
        "target_parameters": [STACKS[0], *swiglu("shared_experts")],
        "layers_to_transform": [1, 3],
        "alpha_pattern": {"kv_b_proj": 5},
    },
    "qwen3_moe": {
        "target_modules": [*GROUPED_QUERY, "gate", "gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {r"layers\.[13]\.self_attn\.o_proj": 6},
    },
    "qwen3_5_moe_text": {
        "target_modules": [*GROUPED_QUERY, *DELTA_NET, "shared_expert_gate", "gate_proj", "up_proj", "down_proj"],
        "target_parameters": ["gate_up_proj", "experts.down_proj", "mlp.gate.weight"],
        "rank_pattern": {r"^model.layers.0.linear_attn.in_proj_qkv": 7},
        "use_rslora": True,
    },
    "qwen3_5_moe": {
        "target_modules": ["q_proj", "v_proj", "in_proj_qkv", "out_proj", "shared_expert.down_proj"],
        "target_parameters": STACKS,
        "rank_pattern": {r"^model.language_model.layers.0.linear_attn.in_proj_qkv": 7},
    },
}


def test_adapters_made_by_peft_load_here(base: Base, tmp_path: Path) -> None:
    peft = peft_make(base.reference, tmp_path / "adapter", r=4, lora_alpha=8, **PEFT_MADE[base.model_type]).eval()
    theirs = logits_of(peft, TOKENS)
    model = load_model(base.folder, storage="none", dtype=torch.float32, adapter=tmp_path / "adapter")
    assert_close(logits_of(model, TOKENS), theirs)
    assert relative_error(theirs, base.logits) > 1e-2
    save_adapter(model, tmp_path / "again", "org/base")
    again, _ = peft_load(base.reference, tmp_path / "again")
    assert_close(logits_of(again, TOKENS), theirs, what="saved again")


# --- gradients and training


def everything(base: Base) -> dict[str, Any]:
    """PEFT's config of an adapter of all groups."""
    modules = [name for names, _ in base.groups.values() for name in names]
    parameters = [name for _, names in base.groups.values() for name in names]
    return {"r": 4, "lora_alpha": 8, "target_modules": modules, "target_parameters": parameters}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_those_of_peft(base: Base, tmp_path: Path, recompute: bool) -> None:
    count = check_gradients(base.folder, base.reference, tmp_path, TOKENS, recompute, **everything(base))
    assert count == 2 * len(adaptable(key_map_of(native(base.folder))))


def test_steps_of_sgd_follow_peft(base: Base, tmp_path: Path) -> None:
    check_training(base.folder, base.reference, tmp_path, TOKENS, steps=4, rate=0.1, **everything(base))


# --- what can't be adapted


def model_without_values(model_type: str, device: str = "meta") -> CausalLM:
    """A native model without values."""
    settings = TINY[model_type]
    architecture = ARCHITECTURES[model_type]
    config = architecture.parse_config({"text_config": settings} if model_type == "qwen3_5_moe" else settings, "tiny")
    return architecture.build(config, StorageSpec("none"), torch.float32, device)


@pytest.mark.parametrize(
    ("model_type", "target", "expected"),
    [
        (
            "glm4_moe",
            "linear_attention",
            "'linear_attention': this glm4_moe has no linear-attention projections.\n"
            "Its groups: attention, experts, shared_experts, dense_mlp, router.",
        ),
        (
            "qwen3_5_moe",
            "dense_mlp",
            "'dense_mlp': this qwen3_5_moe has no dense layers' matrices.\n"
            "Its groups: attention, linear_attention, experts, shared_experts, router.",
        ),
        (
            "afmoe",
            "indexer",
            "'indexer': this afmoe has no indexer.\nIts groups: attention, experts, shared_experts, dense_mlp, router.",
        ),
        *(
            (
                "glm_moe_dsa",
                target,
                f"'{target}' can't be adapted: the indexer only chooses which keys a query sees, and a choice has no "
                "gradient.\nLoRA is for the matrices of attention, experts, shared_experts, dense_mlp, router.",
            )
            for target in ("indexer", "wq_b", "indexer.wk", "weights_proj", "k_norm")
        ),
        *(
            (
                "qwen3_5_moe",
                target,
                f"'{target}' can't be adapted: LoRA is for the matrices of attention, linear_attention, experts, "
                "shared_experts, router, not for norms, biases, convolutions, embeddings or the output head.",
            )
            for target in ("conv1d", "linear_attn.A_log", "dt_bias", "linear_attn.norm")
        ),
        (
            "afmoe",
            "qkv_proj",
            "'qkv_proj' matches nothing in afmoe.\n"
            "Its attention projections are q_proj, k_proj, v_proj, self_attn.gate_proj, o_proj; "
            "'attention' names them all.",
        ),
        (
            "glm4_moe",
            "in_proj_qkv",
            "'in_proj_qkv' matches nothing in glm4_moe. Its groups, and the names in them:\n"
            "  attention: q_proj, k_proj, v_proj, o_proj\n"
            "  experts: mlp.experts.gate_up_proj, mlp.experts.down_proj\n"
            "  shared_experts: mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj, "
            "mlp.shared_experts.down_proj\n"
            "  dense_mlp: mlp.gate_proj, mlp.up_proj, mlp.down_proj\n"
            "  router: mlp.gate",
        ),
        (
            "qwen3_5_moe_text",
            "in_proj_qkvz",
            "'in_proj_qkvz' matches nothing in qwen3_5_moe_text.\n"
            "Its linear-attention projections are in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, out_proj; "
            "'linear_attention' names them all.",
        ),
    ],
)
def test_targets_that_match_nothing(model_type: str, target: str, expected: str) -> None:
    model = model_without_values(model_type)
    with pytest.raises(NibbleError) as error:
        add_lora(model, AdapterSpec((target,), 4, 8.0))
    assert str(error.value) == f"adapter.targets: {expected}"


def test_a_bare_name_means_all_matrices_of_that_name() -> None:
    """As in PEFT; `self_attn.gate_proj` is attention's alone."""
    for target, expected in (("gate_proj", 4 + 1 + 3), ("self_attn.gate_proj", 4), ("mlp.gate_proj", 1)):
        model = model_without_values("afmoe")
        add_lora(model, AdapterSpec((target,), 4, 8.0))
        assert len(trainable_parameters(model)) == 2 * expected, target


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"target_modules": ["conv1d"]},
            "target_modules and target_parameters ('conv1d') match nothing that LoRA can adapt in this qwen3_5_moe "
            "model: attention, linear_attention, experts, shared_experts, router.",
        ),
        (
            {"target_modules": ["qkv"]},
            "target_modules and target_parameters ('qkv') match nothing that LoRA can adapt in this qwen3_5_moe "
            "model: attention, linear_attention, experts, shared_experts, router.",
        ),
    ],
)
def test_adapters_of_other_parts(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    model = model_without_values("qwen3_5_moe", device="cpu")
    add_lora(model, AdapterSpec(("attention",), 4, 8.0))
    save_adapter(model, tmp_path, "org/base")
    config = {**config_of(tmp_path), **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(NibbleError) as error:
        load_adapter(model_without_values("qwen3_5_moe"), tmp_path)
    assert str(error.value) == f"{tmp_path}: {expected}"
