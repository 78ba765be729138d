"""Which matrices a target names, how LoRA starts, what the table counts, and every error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from models.adapters.lora import adapted, add_lora, initial_a, trainable_parameters, without_adapter
from models.adapters.targets import AdapterSpec, Target, resolve
from models.blocks.linear import LoRA
from models.checkpoint.keymap import key_map_of
from models.decoder import CausalLM
from models.glm4_moe_lite import Glm4MoeLiteConfig, build
from models.registry import ARCHITECTURES
from quant.common.errors import NibbleError
from quant.storage import Storage, StorageSpec
from tests.helpers import TINY_GLM, key_map_for, random_tokens
from tests.tiny import TINY
from train.output.parameter_table import parameter_table

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
PUBLISHED = Glm4MoeLiteConfig.parse({"model_type": "glm4_moe_lite"}, "defaults")


def tiny(storage: str = "none", dtype: torch.dtype = torch.float32, double_quant: bool = True) -> CausalLM:
    """A native model of 3 layers, the first one dense, with random weights; the same ones for every storage."""
    spec = StorageSpec(storage, double_quant)  # type: ignore[arg-type]
    architecture = ARCHITECTURES["glm4_moe_lite"]
    config = architecture.parse_config(dict(TINY_GLM), "tiny")
    model = architecture.build(config, spec, dtype, "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key in key_map_of(model).keys:
            owner, _, leaf = key.native.rpartition(".")
            held = getattr(model.get_submodule(owner), leaf)
            values = 0.15 * torch.randn(key.shape, generator=generator) + ("norm" in key.native)
            if isinstance(held, Storage):
                held.load_dense(values.to(held.dtype))
            else:
                held.copy_(values)
    return model


def spec(*targets: str, rank: int | Mapping[str, int] = 4, alpha: float | Mapping[str, float] = 8, **rest: Any) -> Any:
    return AdapterSpec(targets, rank, alpha, **rest)


def found(*targets: str, **rest: Any) -> list[Target]:
    config = Glm4MoeLiteConfig.parse(dict(TINY_GLM), "tiny")
    return resolve(key_map_for(build, config), spec(*targets, **rest), "glm4_moe_lite")


def modules(*targets: str, **rest: Any) -> list[str]:
    return [target.module.removeprefix("model.layers.") for target in found(*targets, **rest)]


def message(*targets: str, **rest: Any) -> str:
    with pytest.raises(NibbleError) as error:
        found(*targets, **rest)
    return str(error.value)


# --- names


def test_groups() -> None:
    assert modules("attention") == [f"{layer}.self_attn.{name}" for layer in range(3) for name in ATTENTION]
    assert modules("experts") == [f"{n}.mlp.experts.{name}" for n in (1, 2) for name in ("gate_up_proj", "down_proj")]
    assert modules("router") == ["1.mlp.gate", "2.mlp.gate"]
    swiglu = ("gate_proj", "up_proj", "down_proj")
    assert modules("dense_mlp") == [f"0.mlp.{name}" for name in swiglu]
    assert modules("shared_experts") == [f"{n}.mlp.shared_experts.{name}" for n in (1, 2) for name in swiglu]
    everything = ("attention", "experts", "shared_experts", "dense_mlp", "router")
    assert modules(*everything) == modules(*reversed(everything)), "the model's order, whatever the config's"
    assert len(modules(*everything)) == 15 + 4 + 6 + 3 + 2


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("o_proj", ["0.self_attn.o_proj", "1.self_attn.o_proj", "2.self_attn.o_proj"]),
        ("self_attn.o_proj", ["0.self_attn.o_proj", "1.self_attn.o_proj", "2.self_attn.o_proj"]),
        ("self_attn.o_proj.weight", ["0.self_attn.o_proj", "1.self_attn.o_proj", "2.self_attn.o_proj"]),
        ("model.layers.1.self_attn.o_proj", ["1.self_attn.o_proj"]),
        ("mlp.experts.gate_up_proj", ["1.mlp.experts.gate_up_proj", "2.mlp.experts.gate_up_proj"]),
        ("gate_up_proj", ["1.mlp.experts.gate_up_proj", "2.mlp.experts.gate_up_proj"]),
        ("mlp.experts.down_proj", ["1.mlp.experts.down_proj", "2.mlp.experts.down_proj"]),
        ("experts.down_proj", ["1.mlp.experts.down_proj", "2.mlp.experts.down_proj"]),
        ("mlp.gate", ["1.mlp.gate", "2.mlp.gate"]),
        ("mlp.gate.weight", ["1.mlp.gate", "2.mlp.gate"]),
        ("gate", ["1.mlp.gate", "2.mlp.gate"]),
        ("mlp.shared_experts.gate_proj", ["1.mlp.shared_experts.gate_proj", "2.mlp.shared_experts.gate_proj"]),
        ("mlp.shared_experts.gate_proj.weight", ["1.mlp.shared_experts.gate_proj", "2.mlp.shared_experts.gate_proj"]),
        ("mlp.gate_proj.weight", ["0.mlp.gate_proj"]),
        # A bare name means the matrices, dense and shared, and never a stack of experts beside them.
        ("gate_proj", ["0.mlp.gate_proj", "1.mlp.shared_experts.gate_proj", "2.mlp.shared_experts.gate_proj"]),
        ("down_proj", ["0.mlp.down_proj", "1.mlp.shared_experts.down_proj", "2.mlp.shared_experts.down_proj"]),
    ],
)
def test_names(target: str, expected: list[str]) -> None:
    assert modules(target) == expected


def test_layers() -> None:
    assert modules("attention", "experts", layers=(0, 2)) == [
        *(f"0.self_attn.{name}" for name in ATTENTION),
        *(f"2.self_attn.{name}" for name in ATTENTION),
        "2.mlp.experts.gate_up_proj",
        "2.mlp.experts.down_proj",
    ]


def test_overlapping_targets_are_adapted_once() -> None:
    assert modules("attention", "o_proj", "self_attn.o_proj") == modules("attention")


def test_numbers_per_group_and_per_name() -> None:
    numbers = {"attention": 8, "experts": 2, "o_proj": 16, "model.layers.1.self_attn.o_proj": 32}
    alphas = {"attention": 4.0, "experts": 1.0}
    ranks = {t.module: (t.rank, t.alpha) for t in found("attention", "experts", rank=numbers, alpha=alphas)}
    assert ranks["model.layers.0.self_attn.kv_b_proj"] == (8, 4.0)
    assert ranks["model.layers.0.self_attn.o_proj"] == (16, 4.0)
    assert ranks["model.layers.1.self_attn.o_proj"] == (32, 4.0)
    assert ranks["model.layers.2.mlp.experts.down_proj"] == (2, 1.0)


# --- errors of names and numbers


def test_a_name_of_another_attention_lists_this_one() -> None:
    for target in ("q_proj", "self_attn.q_proj", "k_proj", "v_proj"):
        assert message(target) == (
            f"adapter.targets: {target!r} matches nothing in glm4_moe_lite (multi-head latent attention).\n"
            "Its attention projections are q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj; "
            "'attention' names them all."
        )


def test_nearest_names() -> None:
    assert message("experts.gate_up") == (
        "adapter.targets: 'experts.gate_up' matches nothing in glm4_moe_lite (multi-head latent attention).\n"
        "Its routed experts' tensors are mlp.experts.gate_up_proj, mlp.experts.down_proj; 'experts' names them all."
    )
    assert "'shared_experts' names them all" in message("mlp.shared_expert.gate_proj")
    assert message("expert") == "adapter.targets: 'expert' matches nothing in glm4_moe_lite. Did you mean 'experts'?"
    for target in ("all-linear", "w1", "weight", "", "_proj"):
        text = message(target)
        assert text.startswith(f"adapter.targets: {target!r} matches nothing in glm4_moe_lite")
        assert "attention" in text, "says what there is"
    assert message("all-linear").splitlines()[1:] == [
        "  attention: q_a_proj, q_b_proj, kv_a_proj_with_mqa, kv_b_proj, o_proj",
        "  experts: mlp.experts.gate_up_proj, mlp.experts.down_proj",
        "  shared_experts: mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj, mlp.shared_experts.down_proj",
        "  dense_mlp: mlp.gate_proj, mlp.up_proj, mlp.down_proj",
        "  router: mlp.gate",
    ]


@pytest.mark.parametrize(
    "target",
    [
        "embed_tokens",
        "lm_head",
        "lm_head.weight",
        "head",
        "norm",
        "model.norm",
        "kv_a_layernorm",
        "e_score_correction_bias",
    ],
)
def test_what_lora_does_not_adapt(target: str) -> None:
    assert message(target) == (
        f"adapter.targets: {target!r} can't be adapted: LoRA is for the matrices of "
        "attention, experts, shared_experts, dense_mlp, router, not for norms, biases, "
        "convolutions, embeddings or the output head."
    )


def test_a_group_that_the_model_lacks() -> None:
    config = Glm4MoeLiteConfig.parse({**TINY_GLM, "first_k_dense_replace": 0}, "tiny")
    with pytest.raises(NibbleError) as error:
        resolve(key_map_for(build, config), spec("dense_mlp"), "glm4_moe_lite")
    assert str(error.value) == (
        "adapter.targets: 'dense_mlp': this glm4_moe_lite has no dense layers' matrices.\n"
        "Its groups: attention, experts, shared_experts, router."
    )


def test_errors_of_layers() -> None:
    assert message("attention", layers=(1, 3, -1)) == (
        "adapter.layers: -1, 3 out of range; glm4_moe_lite has layers 0 to 2 here."
    )
    assert message("attention", layers=()) == (
        "adapter.layers is empty: nothing to adapt. Leave it out (null) for all layers."
    )
    assert message("attention", "experts", layers=(0,)) == (
        "adapter.targets: 'experts' matches nothing in adapter.layers (layer 0): "
        "in glm4_moe_lite it is in layers 1 to 2."
    )


def test_errors_of_numbers() -> None:
    assert message() == (
        "adapter.targets is empty: nothing to adapt.\nGroups: attention, experts, shared_experts, dense_mlp, router."
    )
    assert message("attention", "experts", rank={"attention": 8}) == (
        "adapter.rank has no number for 'experts', which adapter.targets adapts (it has attention).\n"
        "Add experts: N, or give one number for all."
    )
    assert message("experts", alpha={"attention": 8, "experts": 2}) == (
        "adapter.alpha.attention: 'attention' names nothing that adapter.targets adapts. Adapted here: experts."
    )
    assert message("experts", rank={"expert": 8}) == (
        "adapter.rank.expert: 'expert' names nothing that adapter.targets adapts. Did you mean 'experts'?"
    )
    for wrong in (0, -1, 2.5, True):
        assert message("experts", rank=wrong) == f"adapter.rank is {wrong!r}; a rank is a whole number, 1 or more."
    assert message("experts", rank={"experts": 0}) == "adapter.rank.experts is 0; a rank is a whole number, 1 or more."
    for wrong in (0, -1.0, math.inf, math.nan):
        assert message("experts", alpha=wrong) == f"adapter.alpha is {wrong!r}; it must be a positive number."


# --- adding


def test_add_lora_freezes_the_rest_and_takes_the_shapes_of_its_matrix() -> None:
    model = tiny("nf4", torch.bfloat16)
    add_lora(model, spec("attention", "experts", "router", rank={"attention": 4, "experts": 2, "router": 1}))
    names = [name for name, _ in trainable_parameters(model)]
    assert len(names) == 2 * (15 + 4 + 2)
    assert all(name.endswith((".lora.A", ".lora.B")) for name in names)
    assert all(parameter.dtype == torch.float32 for _, parameter in trainable_parameters(model))
    experts = model.get_submodule("model.layers.1.mlp.experts.gate_up_proj.lora")
    assert isinstance(experts, LoRA)
    assert experts.A.shape == (8, 2, 64)
    assert experts.B.shape == (8, 128, 2)
    assert (experts.rank, experts.alpha, experts.scaling) == (2, 8.0, 4.0)
    router = model.get_submodule("model.layers.2.mlp.gate.lora")
    assert isinstance(router, LoRA)
    assert (router.A.shape, router.B.shape) == ((1, 64), (8, 1))
    with pytest.raises(NibbleError, match="has an adapter already; load the base model again"):
        add_lora(model, spec("attention"))


def test_rslora_and_dtype() -> None:
    model = tiny()
    add_lora(model, spec("o_proj", rank=16, alpha=8.0, rslora=True, dtype=torch.bfloat16))
    lora = model.get_submodule("model.layers.0.self_attn.o_proj.lora")
    assert isinstance(lora, LoRA)
    assert lora.scaling == 2.0
    assert lora.A.dtype == lora.B.dtype == torch.bfloat16


def test_start_depends_on_seed_and_name_alone() -> None:
    def start(*targets: str, seed: int = 0, storage: str = "none") -> dict[str, torch.Tensor]:
        model = tiny(storage)
        add_lora(model, spec(*targets), seed)
        return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model)}

    alone, among = start("experts"), start("router", "attention", "experts", storage="int8")
    assert alone
    for name, value in alone.items():
        assert torch.equal(value, among[name]), name
        assert name.endswith(".B") == (value.count_nonzero() == 0), name
    other = start("experts", seed=1)
    for name, value in alone.items():
        assert torch.equal(value, other[name]) == name.endswith(".B"), name
    first, second = (alone[f"model.layers.{n}.mlp.experts.gate_up_proj.lora.A"] for n in (1, 2))
    assert not torch.equal(first, second)


def test_start_has_the_distribution_of_kaiming_uniform() -> None:
    shape = (16, 64, 32)
    drawn = initial_a(shape, "name", 0)
    reference = nn.init.kaiming_uniform_(torch.empty(16 * 64, 32), a=math.sqrt(5))  # as PEFT draws it
    bound = 1 / math.sqrt(32)
    for values in (drawn, reference):
        assert 0.99 * bound < values.abs().max() <= bound
        assert values.mean().abs() < 0.02 * bound
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["none", "nf4", "fp4", "int8"])
def test_zero_b_changes_no_bit(storage: str, dtype: torch.dtype) -> None:
    model = tiny(storage, dtype)
    tokens = random_tokens((2, 24))
    with torch.no_grad():
        base = model(tokens)
        for lora_dtype in (torch.float32, torch.bfloat16):
            with_lora = tiny(storage, dtype)
            add_lora(with_lora, spec("attention", "experts", "shared_experts", "dense_mlp", "router", dtype=lora_dtype))
            assert torch.equal(with_lora(tokens), base)
        for name, parameter in with_lora.named_parameters():
            if name.endswith("lora.B"):
                parameter.fill_(0.05)
        assert not torch.equal(with_lora(tokens), base), "the comparison sees an adapter"


# --- the table


def test_without_its_adapter_a_model_is_its_base_bit_for_bit() -> None:
    tokens = random_tokens((2, 9))
    with torch.no_grad():
        base = tiny("nf4")(tokens)
        model = tiny("nf4")
        add_lora(model, spec("attention", "experts", "router"))
        for _, lora in adapted(model):
            torch.nn.init.normal_(lora.B, generator=torch.Generator().manual_seed(1))
        changed = model(tokens)
        with without_adapter(model):
            assert torch.equal(model(tokens), base)
        assert torch.equal(model(tokens), changed)
        assert not torch.equal(changed, base)


def test_table_counts_the_published_model() -> None:
    model = ARCHITECTURES["glm4_moe_lite"].build(PUBLISHED, StorageSpec("nf4"), torch.bfloat16, "meta")
    add_lora(model, spec("attention", "experts", rank=32))
    rows = {row.group: row for row in parameter_table(model)}
    assert list(rows) == [
        *("attention", "experts", "shared_experts", "dense_mlp", "router", "norm", "embedding", "head", "total"),
    ]
    total = rows["total"]
    assert total.parameters == 29_943_390_976
    assert total.nbytes / 2**30 == pytest.approx(15.283, abs=0.001)
    experts = rows["experts"]
    assert experts.parameters == 46 * 64 * 3 * 1536 * 2048
    assert experts.trained == 46 * 64 * 32 * ((2048 + 2 * 1536) + (1536 + 2048))
    assert (experts.stored, experts.ranks) == (("nf4",), (32,))
    assert rows["shared_experts"].trained == 0
    assert rows["shared_experts"].ranks == ()
    assert rows["router"].parameters == 46 * 64 * 2048, "the router's bias is a buffer, no parameter"
    assert rows["router"].stored == ("float32",)
    assert rows["head"].parameters == rows["embedding"].parameters == 154880 * 2048
    assert rows["head"].stored == ("bfloat16",)
    for field in ("parameters", "nbytes", "trained"):
        assert sum(getattr(row, field) for row in rows.values()) == 2 * getattr(total, field)


def test_table_of_full_training_and_of_a_tied_head() -> None:
    config = {**TINY_GLM, "tie_word_embeddings": True}
    architecture = ARCHITECTURES["glm4_moe_lite"]
    model = architecture.build(architecture.parse_config(config, "tiny"), StorageSpec("none"), torch.bfloat16, "cpu")
    model.requires_grad_(True)
    rows = {row.group: row for row in parameter_table(model)}
    assert "head" not in rows, "counted once, with the embedding"
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert rows["total"].parameters == rows["total"].trained == sum(parameters.values())
    assert rows["total"].ranks == ()
    assert rows["total"].stored[0] == "bfloat16"
    assert {key.group for key in key_map_of(model).keys} == set(rows) - {"total"}


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "glm_moe_dsa"])
def test_table_has_every_group(model_type: str) -> None:
    architecture = ARCHITECTURES[model_type]
    config = architecture.parse_config(dict(TINY[model_type]), "tiny")
    model = architecture.build(config, StorageSpec("none"), torch.float32, "meta")
    rows = {row.group: row.parameters for row in parameter_table(model)}
    groups = {key.group for key in key_map_of(model).keys}
    assert {"linear_attention", "indexer"} & groups, "one of the groups that GLM-4.7-Flash lacks"
    assert set(rows) == groups | {"total"}
    assert rows["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert rows["total"] == sum(rows.values()) // 2
